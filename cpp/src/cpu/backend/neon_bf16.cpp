// The backend for Advanced SIMD with BF16: bfloat16 products in pairs, the rest as without.
#define QLN_ISA neon_bf16

#include "cpu/backend/isa.h"

#include "cpu/isa/neon/dot_bf16.h"

#include "cpu/backend/backend_bf16-inl.h"
#include "cpu/product/linear-inl.h"

namespace qlora_native {

const CpuBackend& neon_bf16_backend() {
  using namespace neon_bf16;
  static const CpuBackend backend = with_bf16_products<DotBf16, kProductsOf<DotBf16>, neon_backend>();
  return backend;
}

}  // namespace qlora_native
