// The backend for AVX2.
#define QLN_ISA avx2

#include "cpu/backend/isa.h"

#include "cpu/isa/avx2/simd.h"

#include "cpu/backend/backend_f32-inl.h"

namespace qlora_native {

const CpuBackend& avx2_backend() { return avx2::kBackendF32; }

}  // namespace qlora_native
