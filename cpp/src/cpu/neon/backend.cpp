// The backend for Advanced SIMD without BF16.
#define QLN_ISA neon

#include "cpu/isa.h"

#include "cpu/neon/simd.h"

#include "cpu/generic/backend_f32-inl.h"

namespace qlora_native {

const CpuBackend& neon_backend() { return neon::kBackendF32; }

}  // namespace qlora_native
