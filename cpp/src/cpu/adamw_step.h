// What every instruction set's AdamW shares: whether a step happens at all, and its cutting into tasks.
// An instruction set brings two functions over a stretch of one tensor's blocks.
#pragma once

#include "common/adamw.h"

namespace qlora_native {

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
