// What every instruction set's AdamW shares: whether a step happens at all, its constants, and its cutting into tasks.
// An instruction set brings two functions over a stretch of one tensor's blocks.
#pragma once

#include "qlora_native/adamw.h"

namespace qlora_native {

// The coefficients of one tensor's step, in the order of the kernels' operations:
//
//   s = g * inv_scale                                v = level2 * (absmax2 * beta2) + (s * s) * grad_to_v
//   m = level1 * (absmax1 * beta1) + s * grad_to_m   p = p * decay - step_size * (m / (sqrt(v) + eps))
//
// step_size and eps hold both bias corrections: m / (sqrt(v / c) + eps) = sqrt(c) * (m / (sqrt(v) + sqrt(c) * eps)).
struct AdamWCoefficients {
  float inv_scale, beta1, grad_to_m, beta2, grad_to_v, decay, step_size, eps;
};

// |g * inv_scale| may be so large: the largest float whose square is finite.
constexpr float kLargestGradient = 0x1.fffffep63f;

// Elements [first, end) of `tensor`; first is a multiple of the blocksize.
struct AdamWStretch {
  const AdamW8bitTensor* tensor;
  std::int64_t first, end;
};

struct AdamWKernels {
  bool (*is_usable)(const AdamWStretch& stretch, float inv_scale);  // every gradient is at most kLargestGradient
  void (*update)(const AdamWStretch& stretch, const AdamWCoefficients& coefficients);
};

void adamw_8bit_step(const AdamW8bitArgs& args, const AdamWKernels& kernels);

}  // namespace qlora_native
