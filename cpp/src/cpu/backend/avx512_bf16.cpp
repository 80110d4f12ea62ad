// The backend for AVX-512 with BF16 and VBMI: bfloat16 products in pairs, the optimizer's tables as bytes, the rest as
// without.
#define QLN_ISA avx512_bf16

#include "cpu/backend/isa.h"

#include "cpu/isa/avx512/table_vbmi.h"

#include "cpu/isa/avx512/dot_bf16.h"

#include "cpu/backend/backend-inl.h"
#include "cpu/backend/backend_bf16-inl.h"

namespace qlora_native {

const CpuBackend& avx512_bf16_backend() {
  using namespace avx512_bf16;
  static const CpuBackend backend = [] {
    CpuBackend with_pairs = with_bf16_products<DotBf16, kProductsOf<DotBf16>, avx512_backend>();
    with_pairs.table.optimizer_8bit_step = optimizer_step;
    return with_pairs;
  }();
  return backend;
}

}  // namespace qlora_native
