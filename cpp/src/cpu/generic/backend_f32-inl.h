// A backend whose products are all in fp32.
#pragma once

#include "cpu/generic/backend-inl.h"
#include "cpu/quantize_microscaled.h"

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

constexpr Backend kBackendF32{quantize_weight,    quantize_scales,    quantize_microscaled_on_cpu,
                              dequantize_weight,  linear_forward_f32, linear_backward_input_f32,
                              lora_gradients_f32, optimizer_step};

}  // namespace
}  // namespace qlora_native
