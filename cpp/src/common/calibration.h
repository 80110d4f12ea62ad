// What the CPU's kernels of calibrated quantization and their scalar oracle must agree on.
#pragma once

namespace qlora_native {

constexpr int kMaxScaleSteps = 1024;

// Candidate i of weighted_scales, as a part of absmax. The function is static because files that are compiled for wider
// instructions call it: the linker must not share their copies.
static constexpr float scale_candidate(float lo, float hi, int steps, int i) {
  if (steps == 1) return lo;
  return static_cast<float>(double{lo} + (double{hi} - double{lo}) * i / (steps - 1));
}

}  // namespace qlora_native
