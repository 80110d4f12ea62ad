// Softmax cross-entropy of rows of logits, and its gradient in their place:
//
//   z         = s * l, or with a soft cap c: c * tanh(s * l / c)                 (Gemma 2, section 2; s is Granite's)
//   loss      = lse(z) - (1 - e) * z[label] - e / V * sum(z) + a * lse(z)^2      e: label smoothing, a: z-loss
//   gradient  = g[row] * d loss / d l, rounded once to the dtype of the logits
//
// lse is the logarithm of the sum of exponentials, in fp32 less the largest. With it a program that makes logits a few
// rows at a time, and multiplies their gradient on, never holds all of them.
#pragma once

#include "qlora_native/export.h"
#include "qlora_native/types.h"

namespace qlora_native {

struct CrossEntropyArgs {
  Matrix logits;                         // [rows, V], in; with `gradient` their gradient, out
  const std::int64_t* labels = nullptr;  // [rows]: 0 ... V-1, or ignore_index
  std::int64_t ignore_index = -100;      // a row with it has no loss: 0, and a gradient of zeros
  float scale = 1.0f;                    // s; finite
  float softcap = 0.0f;                  // c > 0; 0: none
  float label_smoothing = 0.0f;          // e in [0, 1]
  float z_loss = 0.0f;                   // a >= 0 (PaLM, section 5)
  bool gradient = false;
  const float* row_gradients = nullptr;  // [rows]: what a row's gradient is multiplied by before it is rounded; or null
  float* loss = nullptr;                 // out, [rows]
  float* log_probability = nullptr;      // out, [rows]: z[label] - lse(z); or null
};
// Labels are checked on the cpu. On cuda, where the host cannot read them without waiting for the device, a label out
// of range makes its row NaN.
QLN_API void cross_entropy(const CrossEntropyArgs& args, const Stream& stream = {});

}  // namespace qlora_native
