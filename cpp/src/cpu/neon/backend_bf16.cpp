// The backend for Advanced SIMD with BF16: bfloat16 products in pairs, the rest as without.
#include "cpu/isa.h"

#include "cpu/neon/dot_bf16.h"

#include "cpu/generic/linear-inl.h"

namespace qlora_native {
namespace {

void linear_forward_bf16(const LinearForwardArgs& args, const Stream& stream) {
  if (args.x.dtype == DType::bf16)
    Linear<DotBf16>::forward(args);
  else
    neon_backend().linear_forward(args, stream);
}
void linear_backward_input_bf16(const LinearBackwardInputArgs& args, const Stream& stream) {
  if (args.dy.dtype == DType::bf16)
    Linear<DotBf16>::backward_input(args);
  else
    neon_backend().linear_backward_input(args, stream);
}
void lora_gradients_bf16(const LoraGradientsArgs& args, const Stream& stream) {
  if (args.x.dtype == DType::bf16)
    Linear<DotBf16>::lora_gradients(args);
  else
    neon_backend().lora_gradients(args, stream);
}

}  // namespace

const Backend& neon_bf16_backend() {
  static const Backend backend = [] {
    Backend with_bf16 = neon_backend();
    with_bf16.linear_forward = linear_forward_bf16;
    with_bf16.linear_backward_input = linear_backward_input_bf16;
    with_bf16.lora_gradients = lora_gradients_bf16;
    return with_bf16;
  }();
  return backend;
}

}  // namespace qlora_native
