// The softmax cross-entropy of rows of logits. Its gradient overwrites the logits:
//
//   z         = s * l, or with a soft cap c: c * tanh(s * l / c)                 (Gemma 2, section 2; s is Granite's)
//   loss      = lse(z) - (1 - e) * z[label] - e / V * sum(z) + a * lse(z)^2      e: label smoothing, a: z-loss
//   gradient  = g[row] * d loss / d l, rounded once to the dtype of the logits
//
// l are the logits. lse is the logarithm of the sum of exponentials; it is computed in fp32, with the largest z taken
// out. A program can compute the logits of a few rows, call this, and multiply the gradient on, and so never holds the
// logits of all rows.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {

struct CrossEntropyArgs {
  Matrix logits;                         // [rows, V], in; with `gradient` also out: their gradient
  const std::int64_t* labels = nullptr;  // [rows]: 0 ... V-1, or ignore_index
  std::int64_t ignore_index = -100;      // a row with this label has the loss 0, and a gradient of zeros
  float scale = 1.0f;                    // s; finite
  float softcap = 0.0f;                  // c > 0; 0 for no soft cap
  float label_smoothing = 0.0f;          // e in [0, 1]
  float z_loss = 0.0f;                   // a >= 0 (PaLM, section 5)
  bool gradient = false;
  const float* row_gradients = nullptr;  // g, [rows]: factors of the rows' gradients, before rounding; or null
  float* loss = nullptr;                 // out, [rows]
  float* log_probability = nullptr;      // out, [rows]: z[label] - lse(z); or null
};
// On the cpu, a label out of range is an Error. On cuda the host cannot read the labels without waiting for the device,
// so there the row of a label out of range becomes NaN.
QLN_API void cross_entropy(const CrossEntropyArgs& args, const Stream& stream = {});

}  // namespace qlora_native
