// What calibrated quantization computes: the second moments of a layer's inputs, scales that suit them, and codes that
// make up for each other's errors. Only the CPU has these operations.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {

// gram += X^T X in fp32: the second moments of the inputs of a layer, which is half the Hessian of its squared error.
//
// The rows of X are added in chains of 256, in their order, and each chain to what stands in gram. A processor that
// multiplies bfloat16 takes subnormal elements of it as zero. A thread needs 1.9 MB of scratch.
struct GramArgs {
  ConstMatrix x;          // [T, K]
  float* gram = nullptr;  // [K, K], in and out, symmetric: what stands below the diagonal is not read but overwritten
};
QLN_API void gram(const GramArgs& args, const Stream& stream = {});

// For each block of W the scale s = absmax * r that minimizes the error which weighs in the output, the sum of
// importance[k] * (w - s * level)^2 over the elements w of the block, k being an element's column, where `level` is the
// one nearest to w / s. The candidates r are `steps` equally spaced ones from lo to hi; of equal errors the first wins.
// With importance = diag(X^T X) that is the squared error of the layer's output, if its inputs are uncorrelated.
//
// A block whose elements all have importance 0 takes them as equally important. A block of zeros has the scale 0. The
// results have the same bits with every instruction set.
struct WeightedScalesArgs {
  const float* weight = nullptr;  // [N, K], contiguous, finite
  std::int64_t N = 0;
  std::int64_t K = 0;
  const float* importance = nullptr;  // [K], finite, >= 0
  int bits = 4;                       // 4: levels are code[16]; 8: they are -127 ... 127, divided by 127
  int blocksize = 64;                 // a power of two, 16 ... 4096; blocks run over the flat weight
  const float* code = nullptr;        // [16]; not used with 8 bits
  float lo = 0.5f;                    // > 0
  float hi = 1.15f;                   // >= lo
  int steps = 40;                     // 1 ... 1024
  float* scales = nullptr;            // out, [ceil(N * K / blocksize)]
};
QLN_API void weighted_scales(const WeightedScalesArgs& args, const Stream& stream = {});

// Codes of W for given scales by error feedback (Frantar et al., "GPTQ", algorithm 1). Columns are quantized in the
// given order, i = 0 ... K-1, and what one loses is added to those that follow:
//
//   q_i = level nearest to w_i / scale, times scale      e_i = (w_i - q_i) / U[i,i]      w_j -= e_i U[i,j]  for j > i
//
// where U is the upper Cholesky factor of the inverse of the damped X^T X, rows and columns in this order. All
// arithmetic is fp32, -e_i U[i,j] + w_j is rounded once, so the codes are the same with every instruction set. Scales
// may be negative. With a scale of 0 an element becomes the level nearest to 0, as in `quantize`.
//
// A thread needs 640 K bytes of scratch and 0.1 MB.
struct QuantizeWithFeedbackArgs {
  const float* weight = nullptr;  // [N, K], contiguous, finite
  std::int64_t N = 0;
  std::int64_t K = 0;
  const std::int64_t* order = nullptr;  // [K], a permutation of the columns
  const float* factor = nullptr;  // [K, K], contiguous: U. Below the diagonal it is not read; on it, finite and > 0
  const float* scales = nullptr;  // [ceil(N * K / blocksize)], finite; as decoded, if they are double-quantized
  int bits = 4;                   // 4: levels are code[16]; 8: they are -127 ... 127, divided by 127
  int blocksize = 64;             // a power of two, 16 ... 4096; blocks run over the flat weight
  const float* code = nullptr;    // [16]; not used with 8 bits
  std::uint8_t* codes = nullptr;  // out, [ceil(N * K * bits / 8)], as QuantizedWeightView has them
};
QLN_API void quantize_with_feedback(const QuantizeWithFeedbackArgs& args, const Stream& stream = {});

}  // namespace qlora_native
