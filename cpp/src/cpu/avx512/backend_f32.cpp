// The backend for AVX-512 without BF16: all products in fp32.
#include "cpu/isa.h"

#include "cpu/avx512/simd.h"

#include "cpu/generic/backend-inl.h"

namespace qlora_native {
namespace {

void linear_forward_f32(const LinearForwardArgs& args, const Stream&) {
  with_dtype(args.x.dtype, [&](auto dtype) { Linear<DotF32<dtype()>>::forward(args); });
}
void linear_backward_input_f32(const LinearBackwardInputArgs& args, const Stream&) {
  with_dtype(args.dy.dtype, [&](auto dtype) { Linear<DotF32<dtype()>>::backward_input(args); });
}
void lora_gradients_f32(const LoraGradientsArgs& args, const Stream&) {
  with_dtype(args.x.dtype, [&](auto dtype) { Linear<DotF32<dtype()>>::lora_gradients(args); });
}

}  // namespace

const Backend& avx512_backend() {
  static const Backend backend{quantize_weight,    quantize_scales,           dequantize_weight,
                               linear_forward_f32, linear_backward_input_f32, lora_gradients_f32};
  return backend;
}

}  // namespace qlora_native
