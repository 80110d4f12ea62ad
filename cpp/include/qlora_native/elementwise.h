// What a transformer block computes between its products, in one pass each: the gated activation of its feed-forward
// part and its normalization. Autograd over their parts keeps a tensor for each part; with these a trainer keeps the
// operands alone.
#pragma once

#include "qlora_native/export.h"
#include "qlora_native/types.h"

namespace qlora_native {

// f of a gated linear unit (Shazeer, "GLU variants improve transformer"):
//   silu        x / (1 + e^-x), SwiGLU's
//   gelu_tanh   x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), GEGLU's by the tanh of Gemma
enum class Activation : std::int8_t { silu, gelu_tanh };

// h = f(gate) * up, computed in fp32 and rounded once.
struct GatedActivationArgs {
  Activation activation = Activation::silu;
  ConstMatrix gate;  // [rows, N]
  ConstMatrix up;    // [rows, N], of the dtype of gate, as all matrices here
  Matrix h;          // [rows, N], out
};
QLN_API void gated_activation(const GatedActivationArgs& args, const Stream& stream = {});

// dgate = dh * up * f'(gate), dup = dh * f(gate).
struct GatedActivationBackwardArgs {
  Activation activation = Activation::silu;
  ConstMatrix gate;  // [rows, N]
  ConstMatrix up;    // [rows, N]
  ConstMatrix dh;    // [rows, N]
  Matrix dgate;      // [rows, N], out
  Matrix dup;        // [rows, N], out
};
QLN_API void gated_activation_backward(const GatedActivationBackwardArgs& args, const Stream& stream = {});

// y = x * r * (shift + weight) with r = 1 / sqrt(mean(x^2) + eps) of each row (Zhang and Sennrich, "Root mean square
// layer normalization"), computed in fp32 and rounded once.
struct RmsNormArgs {
  ConstMatrix x;                 // [rows, N]
  const void* weight = nullptr;  // [N], of the dtype of x
  float shift = 0.0f;            // finite; 1 where weights are kept as their distance from 1 (Gemma)
  float eps = 1e-6f;             // finite, >= 0
  Matrix y;                      // [rows, N], of the dtype of x, out
  float* r = nullptr;            // [rows], out
};
QLN_API void rms_norm(const RmsNormArgs& args, const Stream& stream = {});

// dx = r * (g - x * r^2 * mean(x * g)) with g = dy * (shift + weight). The weight's gradient, sum over rows of
// dy * x * r, is left to the caller: a frozen base model has none.
struct RmsNormBackwardArgs {
  ConstMatrix x;                 // [rows, N]
  const void* weight = nullptr;  // [N]
  float shift = 0.0f;
  ConstMatrix dy;            // [rows, N]
  const float* r = nullptr;  // [rows], as rms_norm gave it
  Matrix dx;                 // [rows, N], out
};
QLN_API void rms_norm_backward(const RmsNormBackwardArgs& args, const Stream& stream = {});

}  // namespace qlora_native
