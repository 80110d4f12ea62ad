// The operations of a transformer block between its products: the gated activation of the feed-forward part, and the
// normalization. Each is a single pass. A trainer that composes them of autograd operations keeps a tensor for each
// intermediate result; with these it keeps only the operands.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {

// The function f of a gated linear unit (Shazeer, "GLU variants improve transformer"):
//   silu        x / (1 + e^-x), as in SwiGLU
//   gelu_tanh   x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), as in Gemma's GEGLU
enum class Activation : std::int8_t { silu, gelu_tanh };

// h = f(gate) * up, computed in fp32 and rounded once.
struct GatedActivationArgs {
  Activation activation = Activation::silu;
  ConstMatrix gate;  // [rows, N]
  ConstMatrix up;    // [rows, N]; all matrices have the dtype of gate
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
  float shift = 0.0f;            // finite; 1 if weights are stored as their distance from 1 (Gemma)
  float eps = 1e-6f;             // finite, >= 0
  Matrix y;                      // [rows, N], of the dtype of x, out
  float* r = nullptr;            // [rows], out
};
QLN_API void rms_norm(const RmsNormArgs& args, const Stream& stream = {});

// dx = r * (g - x * r^2 * mean(x * g)) with g = dy * (shift + weight). The gradient of the weight, which is the sum
// over rows of dy * x * r, is left to the caller, because a frozen base model does not need it.
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
