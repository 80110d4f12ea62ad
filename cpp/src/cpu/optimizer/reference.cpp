// The scalar optimizer_8bit_step: optimizer.h in plain loops, and the same bits as the other instruction sets give.
#include <algorithm>
#include <cmath>

#include "common/codebook.h"
#include "cpu/isa/scalar/reference.h"
#include "cpu/optimizer/optimizer_step.h"

namespace qlora_native::reference {
namespace {

bool is_usable(const OptimizerSegment& segment, float inv_scale) {
  const Optimizer8bitTensor& tensor = *segment.tensor;
  for (std::int64_t i = segment.first; i < segment.end; ++i) {
    const float g = load(tensor.grad, tensor.grad_dtype, i) * inv_scale;
    if (!(std::fabs(g) <= kLargestGradient)) return false;  // NaN too
  }
  return true;
}

// The number of midpoints below t is the nearest level's.
std::uint8_t nearest(const std::array<float, 256>& midpoints, float t) {
  return static_cast<std::uint8_t>(std::lower_bound(midpoints.begin(), midpoints.end(), t) - midpoints.begin());
}

// One element, its moments given multiplied by `decode_factor`.
template <class Rule>
void update_element(const Optimizer8bitTensor& tensor, const StepCoefficients& c, std::int64_t i,
                    float (&moments)[Rule::kMoments]) {
  const float param = load(tensor.param, tensor.param_dtype, i), grad = load(tensor.grad, tensor.grad_dtype, i);
  store(tensor.param, tensor.param_dtype, i, Rule::template update<FloatMath>(c, param, grad, moments));
}

// Elements [first, end), which are one block.
template <class Rule>
void update_8bit(const Optimizer8bitTensor& tensor, const StepCoefficients& c, std::int64_t first, std::int64_t end) {
  constexpr int kMoments = Rule::kMoments;
  const auto codes = [&](int k) { return static_cast<std::uint8_t*>(state_of(tensor, k)) + first; };
  const auto absmax = [&](int k) -> float& { return absmax_of(tensor, k)[first / kOptimizer8bitBlocksize]; };
  float values[kOptimizer8bitBlocksize][kMoments], largest[kMoments] = {};
  for (std::int64_t i = 0; i < end - first; ++i) {
    for (int k = 0; k < kMoments; ++k) {
      const auto& levels = is_signed(k) ? kDynamicMap : kUnsignedDynamicMap;
      values[i][k] = levels[codes(k)[i]] * (absmax(k) * Rule::decode_factor(c, k));
    }
    update_element<Rule>(tensor, c, first + i, values[i]);
    for (int k = 0; k < kMoments; ++k) largest[k] = std::max(largest[k], std::fabs(values[i][k]));
  }
  for (int k = 0; k < kMoments; ++k) {
    absmax(k) = largest[k];
    const auto& midpoints = is_signed(k) ? kDynamicMidpoints : kUnsignedDynamicMidpoints;
    for (std::int64_t i = 0; i < end - first; ++i) {
      codes(k)[i] = nearest(midpoints, values[i][k] * inverse_absmax(largest[k]));
    }
  }
}

template <class Rule>
void update_32bit(const Optimizer8bitTensor& tensor, const StepCoefficients& c, std::int64_t i) {
  float values[Rule::kMoments];
  const auto state = [&](int k) -> float& { return static_cast<float*>(state_of(tensor, k))[i]; };
  for (int k = 0; k < Rule::kMoments; ++k) values[k] = state(k) * Rule::decode_factor(c, k);
  update_element<Rule>(tensor, c, i, values);
  for (int k = 0; k < Rule::kMoments; ++k) state(k) = values[k];
}

void update(Algorithm algorithm, const OptimizerSegment& segment, const StepCoefficients& c) {
  const Optimizer8bitTensor& tensor = *segment.tensor;
  with_rule(algorithm, [&]<class Rule>() {
    if (tensor.absmax1 != nullptr) {
      for (std::int64_t i = segment.first; i < segment.end; i += kOptimizer8bitBlocksize) {
        update_8bit<Rule>(tensor, c, i, std::min(segment.end, i + kOptimizer8bitBlocksize));
      }
    } else {
      for (std::int64_t i = segment.first; i < segment.end; ++i) update_32bit<Rule>(tensor, c, i);
    }
  });
}

}  // namespace

void optimizer_8bit_step(const Optimizer8bitArgs& args, const Stream&) {
  qlora_native::optimizer_8bit_step(args, OptimizerKernels{.is_usable = is_usable, .update = update});
}

}  // namespace qlora_native::reference
