// The backend for Advanced SIMD without BF16.
#include "cpu/isa.h"

#include "cpu/neon/simd.h"

#include "cpu/generic/backend_f32-inl.h"

namespace qlora_native {

const CpuBackend& neon_backend() { return kBackendF32; }

}  // namespace qlora_native
