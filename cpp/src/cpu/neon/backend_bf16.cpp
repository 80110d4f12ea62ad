// The backend for Advanced SIMD with BF16: bfloat16 products in pairs, the rest as without.
#include "cpu/isa.h"

#include "cpu/neon/dot_bf16.h"

#include "cpu/generic/backend_bf16-inl.h"

namespace qlora_native {

const Backend& neon_bf16_backend() {
  static const Backend backend = with_bf16_products<neon_backend>();
  return backend;
}

}  // namespace qlora_native
