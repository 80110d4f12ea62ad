// The backend for AVX-512 with BF16 and VBMI: bfloat16 products in pairs, AdamW's tables as bytes, the rest as without.
#include "cpu/isa.h"

#include "cpu/avx512/table_vbmi.h"

#include "cpu/generic/backend-inl.h"

#include "cpu/avx512/dot_bf16.h"

namespace qlora_native {
namespace {

void linear_forward_bf16(const LinearForwardArgs& args, const Stream& stream) {
  if (args.x.dtype == DType::bf16)
    Linear<DotBf16>::forward(args);
  else
    avx512_backend().linear_forward(args, stream);
}
void linear_backward_input_bf16(const LinearBackwardInputArgs& args, const Stream& stream) {
  if (args.dy.dtype == DType::bf16)
    Linear<DotBf16>::backward_input(args);
  else
    avx512_backend().linear_backward_input(args, stream);
}
void lora_gradients_bf16(const LoraGradientsArgs& args, const Stream& stream) {
  if (args.x.dtype == DType::bf16)
    Linear<DotBf16>::lora_gradients(args);
  else
    avx512_backend().lora_gradients(args, stream);
}

}  // namespace

const Backend& avx512_bf16_backend() {
  static const Backend backend{avx512_backend().quantize,
                               avx512_backend().quantize_absmax,
                               avx512_backend().dequantize,
                               linear_forward_bf16,
                               linear_backward_input_bf16,
                               lora_gradients_bf16,
                               adamw_step};
  return backend;
}

}  // namespace qlora_native
