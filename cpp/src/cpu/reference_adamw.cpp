// The scalar adamw_8bit_step: adamw.h in plain loops, and the same bits as the other instruction sets give.
#include <algorithm>
#include <cmath>

#include "common/codebook.h"
#include "cpu/adamw_step.h"
#include "cpu/isa.h"
#include "cpu/reference.h"

namespace qlora_native::reference {
namespace {

bool is_usable(const AdamWStretch& stretch, float inv_scale) {
  const AdamW8bitTensor& tensor = *stretch.tensor;
  for (std::int64_t i = stretch.first; i < stretch.end; ++i) {
    const float g = load(tensor.grad, tensor.grad_dtype, i) * inv_scale;
    if (!(std::fabs(g) <= kLargestGradient)) return false;  // NaN too
  }
  return true;
}

// The number of midpoints below t is the nearest level's.
std::uint8_t nearest(const std::array<float, 256>& midpoints, float t) {
  return static_cast<std::uint8_t>(std::lower_bound(midpoints.begin(), midpoints.end(), t) - midpoints.begin());
}

// One element, its moments given decayed.
void update_element(const AdamW8bitTensor& tensor, const AdamWCoefficients& c, std::int64_t i, float& m, float& v) {
  const float param = load(tensor.param, tensor.param_dtype, i), grad = load(tensor.grad, tensor.grad_dtype, i);
  store(tensor.param, tensor.param_dtype, i, adamw_update(c, param, grad, m, v));
}

// Elements [first, end), which are one block.
void update_8bit(const AdamW8bitTensor& tensor, const AdamWCoefficients& c, std::int64_t first, std::int64_t end) {
  auto* const state1 = static_cast<std::uint8_t*>(tensor.state1) + first;
  auto* const state2 = static_cast<std::uint8_t*>(tensor.state2) + first;
  float& absmax1 = tensor.absmax1[first / kAdamW8bitBlocksize];
  float& absmax2 = tensor.absmax2[first / kAdamW8bitBlocksize];
  const float decayed1 = absmax1 * c.beta1, decayed2 = absmax2 * c.beta2;
  float ms[kAdamW8bitBlocksize], vs[kAdamW8bitBlocksize];
  absmax1 = absmax2 = 0.0f;
  for (std::int64_t i = 0; i < end - first; ++i) {
    ms[i] = kDynamicMap[state1[i]] * decayed1;
    vs[i] = kUnsignedDynamicMap[state2[i]] * decayed2;
    update_element(tensor, c, first + i, ms[i], vs[i]);
    absmax1 = std::max(absmax1, std::fabs(ms[i]));
    absmax2 = std::max(absmax2, vs[i]);
  }
  for (std::int64_t i = 0; i < end - first; ++i) {
    state1[i] = nearest(kDynamicMidpoints, ms[i] * inverse_absmax(absmax1));
    state2[i] = nearest(kUnsignedDynamicMidpoints, vs[i] * inverse_absmax(absmax2));
  }
}

void update(const AdamWStretch& stretch, const AdamWCoefficients& c) {
  const AdamW8bitTensor& tensor = *stretch.tensor;
  if (tensor.absmax1 != nullptr) {
    for (std::int64_t i = stretch.first; i < stretch.end; i += kAdamW8bitBlocksize) {
      update_8bit(tensor, c, i, std::min(stretch.end, i + kAdamW8bitBlocksize));
    }
    return;
  }
  auto* const m = static_cast<float*>(tensor.state1);
  auto* const v = static_cast<float*>(tensor.state2);
  for (std::int64_t i = stretch.first; i < stretch.end; ++i) {
    m[i] *= c.beta1;
    v[i] *= c.beta2;
    update_element(tensor, c, i, m[i], v[i]);
  }
}

}  // namespace

void adamw_8bit_step(const AdamW8bitArgs& args, const Stream&) {
  qlora_native::adamw_8bit_step(args, AdamWKernels{.is_usable = is_usable, .update = update});
}

}  // namespace qlora_native::reference
