// The part of the optimizers that is the same for every instruction set: whether a step happens at all, and how it is
// cut into tasks. An instruction set adds two functions over some blocks of one tensor.
#pragma once

#include "common/optimizer.h"

namespace qlora_native {

// Elements [first, end) of `tensor`; first is a multiple of the blocksize.
struct OptimizerSegment {
  const Optimizer8bitTensor* tensor;
  std::int64_t first, end;
};

struct OptimizerKernels {
  bool (*is_usable)(const OptimizerSegment& segment, float inv_scale);  // every gradient is at most kLargestGradient
  void (*update)(Algorithm algorithm, const OptimizerSegment& segment, const StepCoefficients& coefficients);
};

void optimizer_8bit_step(const Optimizer8bitArgs& args, const OptimizerKernels& kernels);

}  // namespace qlora_native
