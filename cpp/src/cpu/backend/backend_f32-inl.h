// A backend whose products are all in fp32.
#pragma once

#include "cpu/attention/attention_backward-inl.h"
#include "cpu/attention/attention_forward-inl.h"
#include "cpu/backend/backend-inl.h"
#include "cpu/backend/isa.h"
#include "cpu/calibrate/feedback-inl.h"
#include "cpu/calibrate/gram-inl.h"
#include "cpu/calibrate/weighted_scales-inl.h"
#include "cpu/quantize/quantize_microscaled.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr Products kProductsF32{
    [](const LinearForwardArgs& args, const WeightRows& part) {
      return with_dtype(args.x.dtype, [&](auto dtype) { return Linear<DotF32<dtype()>>::forward(args, part); });
    },
    [](const LinearBackwardInputArgs& args, const WeightRows& part) {
      return with_dtype(args.dy.dtype, [&](auto dtype) { return Linear<DotF32<dtype()>>::backward_input(args, part); });
    },
    [](Gradient gradient, const LoraGradientsArgs& args, const AdapterRows& part, std::int64_t first) {
      return with_dtype(args.x.dtype,
                        [&](auto dtype) { return lora_gradient<DotF32<dtype()>>(gradient, args, part, first); });
    }};

inline void attention_in_f32(const AttentionArgs& args, const Stream&) {
  with_dtype(args.in.dtype, [&](auto dtype) { AttentionForward<DotF32<dtype()>>::run(args); });
}
inline void attention_backward_in_f32(const AttentionBackwardArgs& args, const Stream&) {
  with_dtype(args.in.dtype, [&](auto dtype) { AttentionBackward<DotF32<dtype()>>::run(args); });
}
inline void gram_in_f32(const GramArgs& args, const Stream&) {
  with_dtype(args.x.dtype, [&](auto dtype) { Gram<DotF32<dtype()>>::run(args); });
}

constexpr CpuBackend kBackendF32{
    {quantize_weight, quantize_scales, quantize_microscaled_on_cpu, dequantize_weight,
     [](const LinearForwardArgs& args, const Stream&) { linear_forward(args, kProductsF32); },
     [](const LinearBackwardInputArgs& args, const Stream&) { linear_backward_input(args, kProductsF32); },
     [](const LoraGradientsArgs& args, const Stream&) { lora_gradients(args, kProductsF32); }, cross_entropy_rows,
     gated_activation_rows, gated_activation_backward_rows, rms_norm_rows, rms_norm_backward_rows, attention_in_f32,
     attention_backward_in_f32, rotate_rows, gram_in_f32, weighted_scales_of_blocks, feedback_rows, optimizer_step},
    &kProductsF32};

}  // namespace
}  // namespace qlora_native::QLN_ISA
