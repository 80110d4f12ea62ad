// The arithmetic of the 8-bit optimizers (qlora_native/optimizer.h), one element and one tensor at a time. Every
// backend must agree with it.
//
// A rule is one algorithm. It says how many moments it has, what they are multiplied by when they are decoded, and how
// an element moves. Everything around it (blocks, codes, lists of tensors, skipped steps, paging) is the same for every
// rule.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "qlora_native/optimizer.h"

namespace qlora_native {

// No rule has more moments. They are counted from 0: moment 0 is state1, with absmax1.
constexpr int kMaxMoments = 3;

// Whether a moment has the signed dynamic map. That is the same in every rule: only state2 is never negative.
constexpr bool is_signed(int moment) { return moment != 1; }
// The code whose level is 0.
constexpr std::uint8_t zero_code(int moment) { return is_signed(moment) ? 127 : 0; }

constexpr int moments_of(Algorithm algorithm) {
  return algorithm == Algorithm::lion ? 1 : algorithm == Algorithm::adamw ? 2 : 3;
}

// state_of() is the array of a moment, absmax_of() the array of its scales.
QLN_HOST_DEVICE inline void*& state_of(Optimizer8bitTensor& tensor, int moment) {
  return moment == 0 ? tensor.state1 : moment == 1 ? tensor.state2 : tensor.state3;
}
QLN_HOST_DEVICE inline void* state_of(const Optimizer8bitTensor& tensor, int moment) {
  return moment == 0 ? tensor.state1 : moment == 1 ? tensor.state2 : tensor.state3;
}
QLN_HOST_DEVICE inline float*& absmax_of(Optimizer8bitTensor& tensor, int moment) {
  return moment == 0 ? tensor.absmax1 : moment == 1 ? tensor.absmax2 : tensor.absmax3;
}
QLN_HOST_DEVICE inline float* absmax_of(const Optimizer8bitTensor& tensor, int moment) {
  return moment == 0 ? tensor.absmax1 : moment == 1 ? tensor.absmax2 : tensor.absmax3;
}

// The functions that a rule computes with when its values are floats. Each instruction set has its own such struct for
// its vectors. The operators come from the compiler in both cases.
struct FloatMath {
  using Value = float;
  QLN_HOST_DEVICE static float root(float x) { return std::sqrt(x); }
  QLN_HOST_DEVICE static float sign(float x) { return static_cast<float>(x > 0.0f) - static_cast<float>(x < 0.0f); }
};

// The coefficients of one tensor's step. A vector holds the same number in every lane. A rule uses only some of them.
template <class Math>
struct CoefficientsOf {
  using Value = typename Math::Value;
  Value inv_scale;     // the factor of the gradient
  Value beta1, grad1;  // grad1 is 1 - beta1, the weight of the gradient in the moment
  Value beta2, grad2;
  Value decay;               // the factor of the parameter, 1 - lr * weight_decay
  Value step_size, eps;      // include the bias corrections, if the rule has any
  Value beta3, grad3, slow;  // for the slow moment; `slow` is its weight beside the fast one
};
using StepCoefficients = CoefficientsOf<FloatMath>;

// The largest |g * inv_scale| that is usable: the largest float whose square is finite.
constexpr float kLargestGradient = 0x1.fffffep63f;

// The learning rate of a group. It reads device_lr, so it must run where that memory can be read.
QLN_HOST_DEVICE inline double lr_of(const Optimizer8bitGroup& group) {
  return group.device_lr != nullptr ? double{*group.device_lr} : group.lr;
}
// Whether the value is a finite number >= 0; NaN is not.
QLN_HOST_DEVICE inline bool is_finite_size(double value) { return value >= 0.0 && value <= 0x1.fffffffffffffp1023; }

// A number's power, for an exponent >= 1. A host's std::pow and a device's differ in their last bits, products do not.
QLN_HOST_DEVICE inline double power(double base, std::int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

// Both bias corrections, c1 and c2, are part of two coefficients:
//
//   lr * (m / c1) / (sqrt(v / c2) + eps) = step_size * (m / (sqrt(v) + sqrt(c2) * eps))
//   step_size = lr * sqrt(c2) / c1
struct AdamW {
  static constexpr int kMoments = 2;

  // `step` is the number of this step, counted from 1.
  QLN_HOST_DEVICE static StepCoefficients coefficients(const Optimizer8bitGroup& group, std::int64_t step,
                                                       float inv_scale) {
    const double lr = lr_of(group);
    const double correction1 = 1.0 - power(group.beta1, step);
    const double correction2 = std::sqrt(1.0 - power(group.beta2, step));
    return {
        .inv_scale = inv_scale,
        .beta1 = static_cast<float>(group.beta1),
        .grad1 = static_cast<float>(1.0 - group.beta1),
        .beta2 = static_cast<float>(group.beta2),
        .grad2 = static_cast<float>(1.0 - group.beta2),
        .decay = static_cast<float>(1.0 - lr * group.weight_decay),
        .step_size = static_cast<float>(lr * correction2 / correction1),
        .eps = static_cast<float>(group.eps * correction2),
    };
  }

  // The factor of a moment, or of its scale, when it is decoded.
  QLN_HOST_DEVICE static float decode_factor(const StepCoefficients& c, int moment) {
    return moment == 1 ? c.beta2 : c.beta1;
  }

  // Returns the new value of a parameter and updates its moments, which are given already multiplied by
  // `decode_factor`.
  template <class Math>
  QLN_HOST_DEVICE static typename Math::Value update(const CoefficientsOf<Math>& c, typename Math::Value param,
                                                     typename Math::Value grad, typename Math::Value (&m)[kMoments]) {
    const typename Math::Value g = grad * c.inv_scale;
    m[0] = m[0] + g * c.grad1;
    m[1] = m[1] + g * g * c.grad2;
    return param * c.decay - c.step_size * (m[0] / (Math::root(m[1]) + c.eps));
  }
};

// With alpha = 0 the results are AdamW's, bit for bit. The slow moment has no bias correction, so `slow` cancels that
// of the fast one:
//
//   m / c1 + alpha s = (m + slow * s) / c1                                                  slow = alpha * c1
struct AdEMAMix {
  static constexpr int kMoments = 3;

  QLN_HOST_DEVICE static StepCoefficients coefficients(const Optimizer8bitGroup& group, std::int64_t step,
                                                       float inv_scale) {
    StepCoefficients c = AdamW::coefficients(group, step, inv_scale);
    const double t = static_cast<double>(step);
    const double alpha = t < group.t_alpha ? t / group.t_alpha * group.alpha : group.alpha;
    c.slow = static_cast<float>(alpha * (1.0 - power(group.beta1, step)));
    double beta3 = group.beta3;
    if (t < group.t_beta3) {
      const double part = t / group.t_beta3, log1 = std::log(group.beta1), log3 = std::log(beta3);
      beta3 = std::min(beta3, std::exp(log1 * log3 / ((1.0 - part) * log3 + part * log1)));
    }
    c.beta3 = static_cast<float>(beta3);
    c.grad3 = static_cast<float>(1.0 - beta3);
    return c;
  }

  QLN_HOST_DEVICE static float decode_factor(const StepCoefficients& c, int moment) {
    return moment == 1 ? c.beta2 : moment == 2 ? c.beta3 : c.beta1;
  }

  template <class Math>
  QLN_HOST_DEVICE static typename Math::Value update(const CoefficientsOf<Math>& c, typename Math::Value param,
                                                     typename Math::Value grad, typename Math::Value (&m)[kMoments]) {
    const typename Math::Value g = grad * c.inv_scale;
    m[0] = m[0] + g * c.grad1;
    m[1] = m[1] + g * g * c.grad2;
    m[2] = m[2] + g * c.grad3;
    return param * c.decay - c.step_size * ((m[0] + c.slow * m[2]) / (Math::root(m[1]) + c.eps));
  }
};

struct Lion {
  static constexpr int kMoments = 1;

  QLN_HOST_DEVICE static StepCoefficients coefficients(const Optimizer8bitGroup& group, std::int64_t, float inv_scale) {
    const double lr = lr_of(group);
    return {
        .inv_scale = inv_scale,
        .beta1 = static_cast<float>(group.beta1),
        .grad1 = static_cast<float>(1.0 - group.beta1),
        .beta2 = static_cast<float>(group.beta2),
        .grad2 = static_cast<float>(1.0 - group.beta2),
        .decay = static_cast<float>(1.0 - lr * group.weight_decay),
        .step_size = static_cast<float>(lr),
    };
  }

  // The rule needs the moment itself, because it multiplies it by beta1 for the direction and by beta2 for the update.
  QLN_HOST_DEVICE static float decode_factor(const StepCoefficients&, int) { return 1.0f; }

  template <class Math>
  QLN_HOST_DEVICE static typename Math::Value update(const CoefficientsOf<Math>& c, typename Math::Value param,
                                                     typename Math::Value grad, typename Math::Value (&m)[kMoments]) {
    const typename Math::Value g = grad * c.inv_scale;
    const typename Math::Value direction = Math::sign(m[0] * c.beta1 + g * c.grad1);
    m[0] = m[0] * c.beta2 + g * c.grad2;
    return param * c.decay - c.step_size * direction;
  }
};

// Calls f.template operator()<Rule>() with the rule of an algorithm.
template <class F>
decltype(auto) with_rule(Algorithm algorithm, const F& f) {
  switch (algorithm) {
    case Algorithm::lion:
      return f.template operator()<Lion>();
    case Algorithm::ademamix:
      return f.template operator()<AdEMAMix>();
    case Algorithm::adamw:
      break;
  }
  return f.template operator()<AdamW>();
}

}  // namespace qlora_native
