// A parameter of an optimizer with its state, and its step by the definition of common/optimizer.h.
#pragma once

#include <array>
#include <cmath>
#include <vector>

#include "common/codebook.h"
#include "common/optimizer.h"
#include "qlora_native/optimizer.h"
#include "tensor.h"

constexpr qn::Algorithm kAlgorithms[] = {qn::Algorithm::adamw, qn::Algorithm::lion, qn::Algorithm::ademamix};

struct Parameter {
  Tensor param, grad;
  bool in_8_bits;
  std::vector<std::uint8_t> codes[qn::kMaxMoments];
  std::vector<float> absmax[qn::kMaxMoments], moments[qn::kMaxMoments];
  std::int64_t step = 0;

  explicit Parameter(std::int64_t elements, DType param_dtype = DType::f32, DType grad_dtype = DType::f32,
                     bool in_8_bits = true)
      : param(param_dtype, 1, elements), grad(grad_dtype, 1, elements), in_8_bits(in_8_bits) {
    Random random(static_cast<std::uint64_t>(elements));
    param.fill(random, 1.0f);
    grad.fill(random, 1.0f);
    for (int k = 0; k < qn::kMaxMoments; ++k) {
      codes[k] = std::vector<std::uint8_t>(elements, qn::zero_code(k));
      absmax[k] = std::vector<float>((elements + 255) / 256);
      moments[k] = std::vector<float>(elements);
    }
  }
  qn::Optimizer8bitTensor view(int group = 0) {
    qn::Optimizer8bitTensor tensor{.param = param.data(),
                                   .grad = grad.data(),
                                   .param_dtype = param.dtype(),
                                   .grad_dtype = grad.dtype(),
                                   .elements = param.cols(),
                                   .step = &step,
                                   .group = group};
    for (int k = 0; k < qn::kMaxMoments; ++k) {
      qn::state_of(tensor, k) = in_8_bits ? static_cast<void*>(codes[k].data()) : moments[k].data();
      qn::absmax_of(tensor, k) = in_8_bits ? absmax[k].data() : nullptr;
    }
    return tensor;
  }
  template <class Rule>
  void step_by_definition(const qn::Optimizer8bitGroup& group, float inv_scale) {
    const qn::StepCoefficients c = Rule::coefficients(group, ++step, inv_scale);
    const std::size_t elements = moments[0].size();
    for (std::size_t first = 0; first < elements; first += 256) {
      const std::size_t end = std::min(elements, first + 256);
      float scale[Rule::kMoments], largest[Rule::kMoments] = {};
      for (int k = 0; k < Rule::kMoments; ++k) scale[k] = absmax[k][first / 256] * Rule::decode_factor(c, k);
      for (std::size_t i = first; i < end; ++i) {
        float m[Rule::kMoments];
        for (int k = 0; k < Rule::kMoments; ++k) {
          m[k] = in_8_bits ? map_of(k)[codes[k][i]] * scale[k] : moments[k][i] * Rule::decode_factor(c, k);
        }
        const auto at = static_cast<std::int64_t>(i);
        param.set(0, at, Rule::template update<qn::FloatMath>(c, param.at(0, at), grad.at(0, at), m));
        for (int k = 0; k < Rule::kMoments; ++k) {
          moments[k][i] = m[k];
          largest[k] = std::max(largest[k], std::fabs(m[k]));
        }
      }
      for (int k = 0; k < Rule::kMoments && in_8_bits; ++k) {
        absmax[k][first / 256] = largest[k];
        for (std::size_t i = first; i < end; ++i) {
          codes[k][i] = nearest(map_of(k), moments[k][i] * qn::inverse_absmax(largest[k]));
        }
      }
    }
  }
  bool operator==(const Parameter& other) const {
    if (param.bytes() != other.param.bytes() || step != other.step) return false;
    for (int k = 0; k < qn::kMaxMoments; ++k) {
      if (in_8_bits && (codes[k] != other.codes[k] || absmax[k] != other.absmax[k])) return false;
      if (!in_8_bits && moments[k] != other.moments[k]) return false;
    }
    return true;
  }

 private:
  static const std::array<float, 256>& map_of(int moment) {
    return qn::is_signed(moment) ? qn::kDynamicMap : qn::kUnsignedDynamicMap;
  }
  static std::uint8_t nearest(const std::array<float, 256>& map, double value) {  // a tie takes the lower level
    int code = 0;
    while (code < 255 && value > (double{map[code]} + double{map[code + 1]}) / 2.0) ++code;
    return static_cast<std::uint8_t>(code);
  }
};

// Two parameters of a group with ragged blocks, one with moments in 8 bits and one in fp32.
struct Optimizer {
  Parameter parameters[2] = {Parameter(300), Parameter(70, DType::f32, DType::f32, false)};
  qn::Optimizer8bitTensor tensors[2] = {parameters[0].view(), parameters[1].view()};
  qn::Optimizer8bitGroup groups[1] = {{.lr = 0.01, .weight_decay = 0.1}};
  std::int64_t skipped = 0;

  qn::Optimizer8bitArgs args() {
    return {.tensors = tensors, .count = 2, .groups = groups, .group_count = 1, .skipped = &skipped};
  }
};
