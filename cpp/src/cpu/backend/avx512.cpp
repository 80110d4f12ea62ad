// The backend for AVX-512 without BF16.
#define QLN_ISA avx512

#include "cpu/backend/isa.h"

#include "cpu/isa/avx512/table_bw.h"

#include "cpu/backend/backend_f32-inl.h"

namespace qlora_native {

const CpuBackend& avx512_backend() { return avx512::kBackendF32; }

}  // namespace qlora_native
