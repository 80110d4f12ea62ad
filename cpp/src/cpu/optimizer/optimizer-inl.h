// optimizer_8bit_step, a block of 256 elements at a time. The gradients and parameters of a block are read as fp32. All
// its moments are decoded, updated into a buffer that stays in the first-level cache, and encoded again when the
// largest of each are known. What happens to an element between decoding and encoding is up to the rule
// (common/optimizer.h).
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "cpu/isa/utility-inl.h"
#include "cpu/optimizer/dynamic_map-inl.h"
#include "cpu/optimizer/optimizer_step.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kOptimizerBlock = kOptimizer8bitBlocksize;

// Finds the code of the nearest level of a dynamic map by its closed form (dynamic_map-inl.h).
template <bool kSigned>
class Encoder {
 public:
  static constexpr DynamicMapNumber<kSigned> kNumber{};

  // Returns the number of the level, plus kUncertain, in fixed point with 16 bits below the point. Where these 16 bits
  // are below kEdge the level may be the one before. `scaled` is kScale times the value, which is in [-1, 1], or [0,
  // 1], or a rounding error beyond.
  F32 number(F32 scaled) const {
    const F32 size = kSigned ? max_abs(scaled, set1(kNumber.kSmallest)) : max(scaled, set1(kNumber.kSmallest));
    const I32 item = shift_right<24>(as_i32(size));
    const F32 a = fma(size, lookup(slopes_, item), lookup(intercepts_, item));
    const F32 third = fma(a, set1(kNumber.kThird), set1(-kNumber.kThird * kFixed));
    return add(min(a, min(third, mul(a, set1(kNumber.kFifth)))), lookup(ks_, item));
  }
  static constexpr float kFixed = 0x1p16f;
  static constexpr int kEdge = static_cast<int>(2.0f * kNumber.kUncertain * kFixed);

  // `scaled` are the values as above; their signs are what is used.
  void store_nearest(const I32 (&number)[kTableVectors], const F32 (&scaled)[kTableVectors],
                     std::uint8_t* codes) const {
    if constexpr (kSigned)
      store_high_halves_around(codes, 127, number, scaled);
    else
      store_high_halves(codes, number);
  }
  // Compares the values `t` with a midpoint, which is exact.
  void store_exact(const F32 (&number)[kTableVectors], const F32 (&t)[kTableVectors], std::uint8_t* codes) const {
    I32 code[kTableVectors];  // of what is half a level nearer to the first code than t is: the code of t, or one less
    for (int k = 0; k < kTableVectors; ++k) {
      F32 position = add(mul(number[k], set1(1.0f / kFixed)), set1(-0.5f));
      if constexpr (kSigned) position = max(add(with_sign_of(position, t[k]), set1(127.0f)), zero());
      code[k] = truncate_to_i32(position);
    }
    const Codes guessed = pack(code);
    F32 midpoint[kTableVectors];
    lookup(midpoints_, guessed, midpoint);
    store_codes(codes, guessed, t, midpoint);
  }

 private:
  struct Fixed {
    float slope[16], intercept[16], k[16];
    constexpr Fixed() : slope{}, intercept{}, k{} {
      for (int i = 0; i < 16; ++i) {
        slope[i] = kNumber.slope[i] * kFixed;
        intercept[i] = kNumber.intercept[i] * kFixed;
        k[i] = (kNumber.k[i] + kNumber.kUncertain) * kFixed;
      }
    }
  };
  static constexpr Fixed kTables{};
  Table16 slopes_ = table16(kTables.slope), intercepts_ = table16(kTables.intercept), ks_ = table16(kTables.k);
  Table256 midpoints_{kNumber.kMidpoints.data()};
};

struct MomentTables {
  Table256 signed_levels{kDynamicMap.data()}, unsigned_levels{kUnsignedDynamicMap.data()};
  Encoder<true> signed_encoder;
  Encoder<false> unsigned_encoder;

  template <int kMoment>
  const Table256& levels() const {
    return is_signed(kMoment) ? signed_levels : unsigned_levels;
  }
  template <int kMoment>
  const Encoder<is_signed(kMoment)>& encoder() const {
    if constexpr (is_signed(kMoment))
      return signed_encoder;
    else
      return unsigned_encoder;
  }
};

// Calls f(k) for each moment of a rule; k is a constant.
template <class Rule, class F>
inline void each_moment(const F& f) {
  [&]<int... k>(std::integer_sequence<int, k...>) {
    (f(std::integral_constant<int, k>()), ...);
  }(std::make_integer_sequence<int, Rule::kMoments>());
}

// The operations of a rule on vectors.
struct VectorMath {
  using Value = F32;
  static F32 root(F32 x) { return square_root(x); }
  // -1, 0 or 1. The two products make the smallest subnormal number larger than 1; the sum makes a 0 of -0.
  static F32 sign(F32 x) {
    const F32 large = set1(0x1p100f);
    return add(min(max(mul(mul(x, large), large), set1(-1.0f)), set1(1.0f)), zero());
  }
};

inline CoefficientsOf<VectorMath> in_every_lane(const StepCoefficients& c) {
  return {.inv_scale = set1(c.inv_scale),
          .beta1 = set1(c.beta1),
          .grad1 = set1(c.grad1),
          .beta2 = set1(c.beta2),
          .grad2 = set1(c.grad2),
          .decay = set1(c.decay),
          .step_size = set1(c.step_size),
          .eps = set1(c.eps),
          .beta3 = set1(c.beta3),
          .grad3 = set1(c.grad3),
          .slow = set1(c.slow)};
}

template <class Rule>
void update_8bit(const MomentTables& tables, const StepCoefficients& coefficients, const float* grad, float* param,
                 std::uint8_t* const (&codes)[Rule::kMoments], float* const (&absmax)[Rule::kMoments]) {
  constexpr int kMoments = Rule::kMoments, kStep = kTableVectors * kLanes;
  const CoefficientsOf<VectorMath> c = in_every_lane(coefficients);
  alignas(64) float values[kMoments][kOptimizerBlock];
  F32 decode_scale[kMoments], largest[kMoments];
  for (int k = 0; k < kMoments; ++k) {
    decode_scale[k] = set1(*absmax[k] * Rule::decode_factor(coefficients, k));
    largest[k] = zero();
  }
  for (int i = 0; i < kOptimizerBlock; i += kStep) {
    F32 decoded[kMoments][kTableVectors];
    each_moment<Rule>([&](auto k) { lookup_bytes(tables.levels<k()>(), codes[k()] + i, decoded[k()]); });
    for (int vector = 0; vector < kTableVectors; ++vector) {
      const int at = i + vector * kLanes;
      F32 m[kMoments];
      for (int k = 0; k < kMoments; ++k) m[k] = mul(decoded[k][vector], decode_scale[k]);
      store(param + at, Rule::template update<VectorMath>(c, load(param + at), load(grad + at), m));
      for (int k = 0; k < kMoments; ++k) {
        store(values[k] + at, m[k]);
        largest[k] = is_signed(k) ? max_abs(largest[k], m[k]) : max(largest[k], m[k]);
      }
    }
  }
  float inverse[kMoments];
  F32 scale[kMoments];
  each_moment<Rule>([&](auto k) {
    *absmax[k()] = reduce_max(largest[k()]);
    inverse[k()] = inverse_absmax(*absmax[k()]);
    scale[k()] = set1(inverse[k()] * tables.encoder<k()>().kNumber.kScale);
  });
  static_assert(Encoder<true>::kEdge == Encoder<false>::kEdge);
  std::uint32_t uncertain = 0;  // bits of those steps
  for (int step = 0; step < kOptimizerBlock / kStep; ++step) {
    const int i = step * kStep;
    F32 scaled[kMoments][kTableVectors];
    I32 number[kMoments][kTableVectors], smallest = set1_i32(-1);
    each_moment<Rule>([&](auto k) {
      for (int vector = 0; vector < kTableVectors; ++vector) {
        scaled[k()][vector] = mul(load(values[k()] + i + vector * kLanes), scale[k()]);
        number[k()][vector] = round_to_i32(tables.encoder<k()>().number(scaled[k()][vector]));
        smallest = min_u16(smallest, number[k()][vector]);
      }
    });
    each_moment<Rule>([&](auto k) { tables.encoder<k()>().store_nearest(number[k()], scaled[k()], codes[k()] + i); });
    uncertain |= static_cast<std::uint32_t>(any_low_half_below(smallest, Encoder<true>::kEdge)) << step;
  }
  for (; uncertain != 0; uncertain &= uncertain - 1) {  // in a separate loop: no processor foresees a branch to it
    const int i = __builtin_ctz(uncertain) * kStep;
    each_moment<Rule>([&](auto k) {
      F32 t[kTableVectors], number[kTableVectors];
      for (int vector = 0; vector < kTableVectors; ++vector) {
        const F32 value = load(values[k()] + i + vector * kLanes);
        number[vector] = tables.encoder<k()>().number(mul(value, scale[k()]));
        t[vector] = mul(value, set1(inverse[k()]));
      }
      tables.encoder<k()>().store_exact(number, t, codes[k()] + i);
    });
  }
}

// Updates a block whose state is fp32.
template <class Rule>
void update_32bit(const StepCoefficients& coefficients, const float* grad, float* param,
                  float* const (&state)[Rule::kMoments]) {
  constexpr int kMoments = Rule::kMoments;
  const CoefficientsOf<VectorMath> c = in_every_lane(coefficients);
  for (int i = 0; i < kOptimizerBlock; i += kLanes) {
    F32 m[kMoments];
    for (int k = 0; k < kMoments; ++k) m[k] = mul(load(state[k] + i), set1(Rule::decode_factor(coefficients, k)));
    store(param + i, Rule::template update<VectorMath>(c, load(param + i), load(grad + i), m));
    for (int k = 0; k < kMoments; ++k) store(state[k] + i, m[k]);
  }
}

// The type of an element in memory.
template <DType kType>
using Element = std::conditional_t<kType == DType::f32, float, std::uint16_t>;

static_assert(kDynamicMap[zero_code(0)] == 0.0f && kUnsignedDynamicMap[zero_code(1)] == 0.0f);

// Shows `count` <= 256 elements as a whole block: in place where it is one already, else as a copy with zeros past the
// end, which change neither the block's largest moments nor another element's code. `zero` has the bytes of a zero.
template <class T>
class Block {
 public:
  Block(void* data, std::int64_t first, std::int64_t count, std::uint8_t zero = 0)
      : data_(static_cast<T*>(data) + first), count_(static_cast<std::size_t>(count)) {
    if (is_whole()) return;
    __builtin_memset(copy_, zero, sizeof(copy_));
    __builtin_memcpy(copy_, data_, count_ * sizeof(T));
  }
  T* get() { return is_whole() ? data_ : copy_; }
  void put() const {
    if (!is_whole()) __builtin_memcpy(data_, copy_, count_ * sizeof(T));
  }

 private:
  bool is_whole() const { return count_ == kOptimizerBlock; }
  T* data_;
  std::size_t count_;
  alignas(64) T copy_[kOptimizerBlock];
};

// Shows them as fp32.
template <DType kType>
class BlockF32 {
 public:
  BlockF32(void* data, std::int64_t first, std::int64_t count) : block_(data, first, count) {
    if constexpr (kType != DType::f32) {
      for (int i = 0; i < kOptimizerBlock; i += kLanes) store(values_ + i, load_as_f32<kType>(block_.get() + i));
    }
  }
  float* get() {
    if constexpr (kType == DType::f32)
      return block_.get();
    else
      return values_;
  }
  void put() {
    if constexpr (kType != DType::f32) {
      for (int i = 0; i < kOptimizerBlock; i += kLanes) store_from_f32<kType>(block_.get() + i, load(values_ + i));
    }
    block_.put();
  }

 private:
  Block<Element<kType>> block_;
  alignas(64) float values_[kType == DType::f32 ? kLanes : kOptimizerBlock];
};

template <class F>
inline void for_each_block(const OptimizerSegment& segment, const F& f) {
  for (std::int64_t first = segment.first; first < segment.end; first += kOptimizerBlock)
    f(first, smaller<std::int64_t>(kOptimizerBlock, segment.end - first));
}

// The state of a rule's moments.
template <class Rule, class T>
auto states_of(const Optimizer8bitTensor& tensor, std::int64_t first, std::int64_t count) {
  return [&]<int... k>(std::integer_sequence<int, k...>) {
    return std::array<Block<T>, Rule::kMoments>{
        Block<T>(state_of(tensor, k), first, count, sizeof(T) == 1 ? zero_code(k) : std::uint8_t{0})...};
  }(std::make_integer_sequence<int, Rule::kMoments>());
}

// It is called through a pointer, so that one copy is enough for every pair of dtypes.
template <class Rule>
void update_block(const MomentTables& tables, const StepCoefficients& coefficients, const float* grad, float* param,
                  const Optimizer8bitTensor& tensor, std::int64_t first, std::int64_t count) {
  if (tensor.absmax1 != nullptr) {
    auto states = states_of<Rule, std::uint8_t>(tensor, first, count);
    std::uint8_t* codes[Rule::kMoments];
    float* absmax[Rule::kMoments];
    for (int k = 0; k < Rule::kMoments; ++k) {
      codes[k] = states[static_cast<std::size_t>(k)].get();
      absmax[k] = absmax_of(tensor, k) + first / kOptimizerBlock;
    }
    update_8bit<Rule>(tables, coefficients, grad, param, codes, absmax);
    for (const auto& state : states) state.put();
  } else {
    auto states = states_of<Rule, float>(tensor, first, count);
    float* values[Rule::kMoments];
    for (int k = 0; k < Rule::kMoments; ++k) values[k] = states[static_cast<std::size_t>(k)].get();
    update_32bit<Rule>(coefficients, grad, param, values);
    for (const auto& state : states) state.put();
  }
}

inline void optimizer_update(Algorithm algorithm, const OptimizerSegment& segment,
                             const StepCoefficients& coefficients) {
  static const MomentTables tables;
  const Optimizer8bitTensor& tensor = *segment.tensor;
  const auto update = with_rule(algorithm, []<class Rule>() { return &update_block<Rule>; });
  with_dtype(tensor.param_dtype, [&](auto param_dtype) {
    with_dtype(tensor.grad_dtype, [&](auto grad_dtype) {
      for_each_block(segment, [&](std::int64_t first, std::int64_t count) {
        BlockF32<param_dtype()> param(tensor.param, first, count);
        BlockF32<grad_dtype()> grad(const_cast<void*>(tensor.grad), first, count);
        update(tables, coefficients, grad.get(), param.get(), tensor, first, count);
        param.put();
      });
    });
  });
}

inline bool optimizer_is_usable(const OptimizerSegment& segment, float inv_scale) {
  I32 largest = set1_i32(0);  // as bits: those of NaN lie above those of infinity
  with_dtype(segment.tensor->grad_dtype, [&](auto dtype) {
    for_each_block(segment, [&](std::int64_t first, std::int64_t count) {
      Block<Element<dtype()>> block(const_cast<void*>(segment.tensor->grad), first, count);
      const auto* grad = block.get();
      for (int i = 0; i < kOptimizerBlock; i += kLanes)
        largest = max_i32(largest, as_i32(abs(mul(load_as_f32<dtype()>(grad + i), set1(inv_scale)))));
    });
  });
  std::uint32_t limit;
  __builtin_memcpy(&limit, &kLargestGradient, sizeof(limit));
  return static_cast<std::uint32_t>(reduce_max_i32(largest)) <= limit;
}

inline void optimizer_step(const Optimizer8bitArgs& args, const Stream&) {
  optimizer_8bit_step(args, OptimizerKernels{.is_usable = optimizer_is_usable, .update = optimizer_update});
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
