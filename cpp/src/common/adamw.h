// The arithmetic of AdamW8bit (adamw.h), one element and one tensor at a time: what every backend must agree with.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
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

// The learning rate of a group, where its memory can be read.
QLN_HOST_DEVICE inline double lr_of(const AdamW8bitGroup& group) {
  return group.device_lr != nullptr ? double{*group.device_lr} : group.lr;
}
// A size: not NaN either.
QLN_HOST_DEVICE inline bool is_finite_size(double value) { return value >= 0.0 && value <= 0x1.fffffffffffffp1023; }

// `step` is this one's, counted from 1.
QLN_HOST_DEVICE inline AdamWCoefficients adamw_coefficients(const AdamW8bitGroup& group, std::int64_t step,
                                                            float inv_scale) {
  const double t = static_cast<double>(step);
  const double lr = lr_of(group);
  const double correction1 = 1.0 - std::pow(group.beta1, t);
  const double correction2 = std::sqrt(1.0 - std::pow(group.beta2, t));
  return {
      .inv_scale = inv_scale,
      .beta1 = static_cast<float>(group.beta1),
      .grad_to_m = static_cast<float>(1.0 - group.beta1),
      .beta2 = static_cast<float>(group.beta2),
      .grad_to_v = static_cast<float>(1.0 - group.beta2),
      .decay = static_cast<float>(1.0 - lr * group.weight_decay),
      .step_size = static_cast<float>(lr * correction2 / correction1),
      .eps = static_cast<float>(group.eps * correction2),
  };
}

// The new value of a parameter. Its moments are given decayed, and updated.
QLN_HOST_DEVICE inline float adamw_update(const AdamWCoefficients& c, float param, float grad, float& m, float& v) {
  const float g = grad * c.inv_scale;
  m = m + g * c.grad_to_m;
  v = v + g * g * c.grad_to_v;
  return param * c.decay - c.step_size * (m / (std::sqrt(v) + c.eps));
}

}  // namespace qlora_native
