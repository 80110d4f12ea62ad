// The backend for Advanced SIMD without BF16.
#define QLN_ISA neon

#include "cpu/backend/isa.h"

#include "cpu/isa/neon/simd.h"

#include "cpu/backend/backend_f32-inl.h"

namespace qlora_native {

const CpuBackend& neon_backend() { return neon::kBackendF32; }

}  // namespace qlora_native
