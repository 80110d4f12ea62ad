// cross_entropy: a row is a task, and is read twice, a block at a time: for lse(z), and for the gradient.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/isa/exp-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/runtime/parallel.h"
#include "qlora_native/cross_entropy.h"

namespace qlora_native::QLN_ISA {
namespace {

template <DType kType>
class CrossEntropy {
 public:
  explicit CrossEntropy(const CrossEntropyArgs& args) : args_(args) {}

  void row(std::int64_t row) const {
    const std::int64_t V = args_.logits.cols, label = args_.labels[row];
    char* logits = static_cast<char*>(args_.logits.data) + row * args_.logits.stride * kSize;
    args_.loss[row] = 0.0f;
    if (args_.log_probability != nullptr) args_.log_probability[row] = 0.0f;
    if (label == args_.ignore_index) {
      if (args_.gradient) __builtin_memset(logits, 0, static_cast<std::size_t>(V * kSize));
      return;
    }
    const Total total = total_of(logits);
    const F32 logit = load_as_f32<kType>(logits + label * kSize, 1);
    const double lse = total.largest + std::log(total.exponentials), z = double{first_lane(capped(logit))};
    const double smoothing = double{args_.label_smoothing};
    double loss = lse - (1.0 - smoothing) * z + double{args_.z_loss} * lse * lse;
    if (smoothing > 0.0) loss -= smoothing / static_cast<double>(V) * total.sum;
    const bool finite = total.is_finite();
    args_.loss[row] = finite ? static_cast<float>(loss) : kNaN;
    if (args_.log_probability != nullptr) args_.log_probability[row] = finite ? static_cast<float>(z - lse) : kNaN;
    if (args_.gradient) write_gradient(logits, row, logit, total, lse);
  }

 private:
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  // Elements that are summed in fp32 before they are added to a total in fp64, and that stay in the first-level cache
  // between the pass for the largest and that for the exponentials.
  static constexpr std::int64_t kBlock = 1024;

  // Of z: its largest element, the sum of e^(z - largest), and the sum.
  struct Total {
    double largest = -double{kInfinity}, exponentials = 0.0, sum = 0.0;

    // A row of -inf, or one with a NaN or inf, has no softmax.
    bool is_finite() const { return std::isfinite(largest) && !std::isnan(sum); }
    void add(double other_largest, double other_exponentials, double other_sum) {
      sum += other_sum;
      if (std::isinf(other_largest) && other_largest < 0.0) return;
      if (other_largest > largest) {
        exponentials *= std::exp(largest - other_largest);
        largest = other_largest;
      }
      exponentials += other_exponentials * std::exp(other_largest - largest);
    }
  };

  F32 capped(F32 logit) const {
    const F32 scaled = mul(logit, set1(args_.scale));
    if (args_.softcap == 0.0f) return scaled;
    return mul(tanh_of(mul(scaled, set1(1.0f / args_.softcap))), set1(args_.softcap));
  }
  static float first_lane(F32 x) {
    float lanes[kLanes];
    store(lanes, x);
    return lanes[0];
  }

  Total total_of(const char* logits) const {
    const std::int64_t V = args_.logits.cols;
    Total total;
    for (std::int64_t begin = 0; begin < V; begin += kBlock) {
      const std::int64_t count = smaller(kBlock, V - begin);
      float z[kBlock];
      F32 largest = set1(-kInfinity), sum = zero();
      for (std::int64_t i = 0; i < count; i += kLanes) {
        const int lanes = static_cast<int>(smaller<std::int64_t>(kLanes, count - i));
        const F32 value = capped(load_as_f32<kType>(logits + (begin + i) * kSize, lanes));
        sum = add(sum, value);  // zeros after the last
        store(z + i, value);
        for (int lane = lanes; lane < kLanes; ++lane) z[i + lane] = -kInfinity;
        largest = max(load(z + i), largest);
      }
      const float block_largest = reduce_max(largest);
      F32 exponentials = zero();
      for (std::int64_t i = 0; i < count; i += kLanes)
        exponentials = add(exponentials, exp_of_negative(add(load(z + i), set1(-block_largest))));
      total.add(double{block_largest}, double{reduce_add(exponentials)}, double{reduce_add(sum)});
    }
    return total;
  }

  // g * d loss / d l = g * (e^(z - lse) * (1 + 2 a lse) - e / V - (1 - e) [label]) * s * (1 - (z / c)^2)
  void write_gradient(char* logits, std::int64_t row, F32 logit, const Total& total, double lse) const {
    const std::int64_t V = args_.logits.cols, label = args_.labels[row];
    const F32 scale = set1(args_.scale * (args_.row_gradients != nullptr ? args_.row_gradients[row] : 1.0f));
    const auto smoothing = double{args_.label_smoothing};
    const F32 shift = set1(static_cast<float>(-lse));
    const F32 factor = set1(total.is_finite() ? static_cast<float>(1.0 + 2.0 * double{args_.z_loss} * lse) : kNaN);
    const F32 uniform = set1(static_cast<float>(-smoothing / static_cast<double>(V)));
    const auto gradient = [&](F32 l, F32 target) {
      const F32 z = capped(l);
      // Rounding may lift the likeliest above its lse.
      const F32 probability = exp_of_negative(min(add(z, shift), zero()));
      const F32 result = mul(add(fma(probability, factor, uniform), target), scale);
      if (args_.softcap == 0.0f) return result;
      const F32 t = mul(z, set1(1.0f / args_.softcap));
      return mul(result, fma(mul(t, set1(-1.0f)), t, set1(1.0f)));
    };
    for (std::int64_t i = 0; i < V; i += kLanes) {
      const int lanes = static_cast<int>(smaller<std::int64_t>(kLanes, V - i));
      store_from_f32<kType>(logits + i * kSize, gradient(load_as_f32<kType>(logits + i * kSize, lanes), zero()), lanes);
    }
    store_from_f32<kType>(logits + label * kSize, gradient(logit, set1(static_cast<float>(smoothing - 1.0))), 1);
  }

  const CrossEntropyArgs& args_;
};

inline void cross_entropy_rows(const CrossEntropyArgs& args, const Stream&) {
  with_dtype(args.logits.dtype, [&](auto dtype) {
    const CrossEntropy<dtype()> cross_entropy(args);
    parallel_for(args.logits.rows, [&](std::int64_t row) { cross_entropy.row(row); });
  });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
