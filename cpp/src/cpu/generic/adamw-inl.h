// adamw_8bit_step: a block of 256 at a time. Its gradients and parameters are read as fp32, both moments decoded and
// updated into a buffer that stays in the first cache, and encoded again when the block's largest are known.
#pragma once

#include "cpu/adamw_step.h"
#include "cpu/generic/dynamic_map-inl.h"
#include "cpu/generic/rows-inl.h"

namespace qlora_native {
namespace {

constexpr int kAdamWBlock = kAdamW8bitBlocksize;

// The code of the nearest level of a dynamic map by its closed form (dynamic_map-inl.h).
template <bool kSigned>
class Encoder {
 public:
  static constexpr DynamicMapNumber<kSigned> kNumber{};

  // The number of the level in fixed point, 16 bits of it below the point, and kUncertain more: where those 16 bits are
  // below kEdge the level may be the one before. `scaled`: the value in [-1, 1], or [0, 1], or a rounding error beyond,
  // times kScale.
  F32 number(F32 scaled) const {
    const F32 size = kSigned ? max_abs(scaled, set1(kNumber.kSmallest)) : max(scaled, set1(kNumber.kSmallest));
    const I32 item = shift_right<24>(as_i32(size));
    const F32 a = fma(size, lookup(slopes_, item), lookup(intercepts_, item));
    const F32 third = fma(a, set1(kNumber.kThird), set1(-kNumber.kThird * kFixed));
    return add(min(a, min(third, mul(a, set1(kNumber.kFifth)))), lookup(ks_, item));
  }
  static constexpr float kFixed = 0x1p16f;
  static constexpr int kEdge = static_cast<int>(2.0f * kNumber.kUncertain * kFixed);

  // `scaled`: the values as above, for their signs.
  void store_nearest(const I32 (&number)[kTableVectors], const F32 (&scaled)[kTableVectors],
                     std::uint8_t* codes) const {
    if constexpr (kSigned)
      store_high_halves_around(codes, 127, number, scaled);
    else
      store_high_halves(codes, number);
  }
  // By comparison with the midpoint, exactly. `t`: the values.
  void store_exact(const F32 (&number)[kTableVectors], const F32 (&t)[kTableVectors], std::uint8_t* codes) const {
    I32 code[kTableVectors];  // or one less: half a level nearer to the first code than t is
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

struct AdamWTables {
  Table256 levels1{kDynamicMap.data()}, levels2{kUnsignedDynamicMap.data()};
  Encoder<true> encoder1;
  Encoder<false> encoder2;
};

struct AdamWVectors {
  F32 inv_scale, grad_to_m, grad_to_v, decay, step_size, eps;
  explicit AdamWVectors(const AdamWCoefficients& c)
      : inv_scale(set1(c.inv_scale)),
        grad_to_m(set1(c.grad_to_m)),
        grad_to_v(set1(c.grad_to_v)),
        decay(set1(c.decay)),
        step_size(set1(-c.step_size)),
        eps(set1(c.eps)) {}

  // One vector: m and v are given decayed, and updated.
  void update(const float* grad, float* param, F32& m, F32& v) const {
    const F32 g = mul(load(grad), inv_scale);
    m = add(m, mul(g, grad_to_m));
    v = add(v, mul(mul(g, g), grad_to_v));
    const F32 direction = divide(m, add(square_root(v), eps));
    store(param, add(mul(load(param), decay), mul(step_size, direction)));
  }
};

// Out of line: one copy serves every pair of dtypes.
[[gnu::noinline]] void update_block(const AdamWTables& tables, const AdamWCoefficients& coefficients, const float* grad,
                                    float* param, std::uint8_t* state1, std::uint8_t* state2, float* absmax1,
                                    float* absmax2) {
  const AdamWVectors c(coefficients);
  alignas(64) float ms[kAdamWBlock], vs[kAdamWBlock];
  const F32 decayed1 = set1(*absmax1 * coefficients.beta1), decayed2 = set1(*absmax2 * coefficients.beta2);
  F32 most1 = zero(), most2 = zero();
  for (int i = 0; i < kAdamWBlock; i += kTableVectors * kLanes) {
    F32 m[kTableVectors], v[kTableVectors];
    lookup_bytes(tables.levels1, state1 + i, m);
    lookup_bytes(tables.levels2, state2 + i, v);
    for (int k = 0; k < kTableVectors; ++k) {
      const int at = i + k * kLanes;
      m[k] = mul(m[k], decayed1);
      v[k] = mul(v[k], decayed2);
      c.update(grad + at, param + at, m[k], v[k]);
      store(ms + at, m[k]);
      store(vs + at, v[k]);
      most1 = max_abs(most1, m[k]);
      most2 = max(most2, v[k]);
    }
  }
  *absmax1 = reduce_max(most1);
  *absmax2 = reduce_max(most2);
  const float inverse1 = inverse_absmax(*absmax1), inverse2 = inverse_absmax(*absmax2);
  const F32 scaled1 = set1(inverse1 * tables.encoder1.kNumber.kScale);
  const F32 scaled2 = set1(inverse2 * tables.encoder2.kNumber.kScale);
  constexpr int kStep = kTableVectors * kLanes;
  std::uint32_t uncertain = 0;  // bits of those steps
  for (int step = 0; step < kAdamWBlock / kStep; ++step) {
    const int i = step * kStep;
    F32 m[kTableVectors], v[kTableVectors];
    I32 number1[kTableVectors], number2[kTableVectors], least = set1_i32(-1);
    for (int k = 0; k < kTableVectors; ++k) {
      m[k] = mul(load(ms + i + k * kLanes), scaled1);
      v[k] = mul(load(vs + i + k * kLanes), scaled2);
      number1[k] = round_to_i32(tables.encoder1.number(m[k]));
      number2[k] = round_to_i32(tables.encoder2.number(v[k]));
      least = min_u16(least, min_u16(number1[k], number2[k]));
    }
    tables.encoder1.store_nearest(number1, m, state1 + i);
    tables.encoder2.store_nearest(number2, v, state2 + i);
    uncertain |= static_cast<std::uint32_t>(any_low_half_below(least, Encoder<true>::kEdge)) << step;
  }
  static_assert(Encoder<true>::kEdge == Encoder<false>::kEdge);
  for (; uncertain != 0; uncertain &= uncertain - 1) {  // in a separate loop: no processor foresees a branch to it
    const int i = __builtin_ctz(uncertain) * kStep;
    F32 m[kTableVectors], v[kTableVectors], number1[kTableVectors], number2[kTableVectors];
    for (int k = 0; k < kTableVectors; ++k) {
      m[k] = load(ms + i + k * kLanes);
      v[k] = load(vs + i + k * kLanes);
      number1[k] = tables.encoder1.number(mul(m[k], scaled1));
      number2[k] = tables.encoder2.number(mul(v[k], scaled2));
      m[k] = mul(m[k], set1(inverse1));
      v[k] = mul(v[k], set1(inverse2));
    }
    tables.encoder1.store_exact(number1, m, state1 + i);
    tables.encoder2.store_exact(number2, v, state2 + i);
  }
}

// The same for fp32 state.
[[gnu::noinline]] void update_block(const AdamWVectors& c, const AdamWCoefficients& coefficients, const float* grad,
                                    float* param, float* state1, float* state2) {
  const F32 beta1 = set1(coefficients.beta1), beta2 = set1(coefficients.beta2);
  for (int i = 0; i < kAdamWBlock; i += kLanes) {
    F32 m = mul(load(state1 + i), beta1), v = mul(load(state2 + i), beta2);
    c.update(grad + i, param + i, m, v);
    store(state1 + i, m);
    store(state2 + i, v);
  }
}

// The element type as it lies in memory.
template <DType kType>
using Element = std::conditional_t<kType == DType::f32, float, std::uint16_t>;

// The code whose level is 0.
constexpr std::uint8_t kZeroCode1 = 127, kZeroCode2 = 0;
static_assert(kDynamicMap[kZeroCode1] == 0.0f && kUnsignedDynamicMap[kZeroCode2] == 0.0f);

// `count` <= 256 elements as a whole block. In place where it is one already, else a copy with zeros past the end,
// which change nothing: neither the block's largest moments nor another element's code. `zero`: the bytes of a zero.
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
  bool is_whole() const { return count_ == kAdamWBlock; }
  T* data_;
  std::size_t count_;
  alignas(64) T copy_[kAdamWBlock];
};

// The same as fp32.
template <DType kType>
class BlockF32 {
 public:
  BlockF32(void* data, std::int64_t first, std::int64_t count) : block_(data, first, count) {
    if constexpr (kType != DType::f32) {
      for (int i = 0; i < kAdamWBlock; i += kLanes) store(values_ + i, load_as_f32<kType>(block_.get() + i));
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
      for (int i = 0; i < kAdamWBlock; i += kLanes) store_from_f32<kType>(block_.get() + i, load(values_ + i));
    }
    block_.put();
  }

 private:
  Block<Element<kType>> block_;
  alignas(64) float values_[kType == DType::f32 ? kLanes : kAdamWBlock];
};

template <class F>
inline void for_each_block(const AdamWStretch& stretch, const F& f) {
  for (std::int64_t first = stretch.first; first < stretch.end; first += kAdamWBlock)
    f(first, smaller<std::int64_t>(kAdamWBlock, stretch.end - first));
}

inline void adamw_update(const AdamWStretch& stretch, const AdamWCoefficients& coefficients) {
  static const AdamWTables tables;
  const AdamW8bitTensor& tensor = *stretch.tensor;
  const AdamWVectors c(coefficients);
  with_dtype(tensor.param_dtype, [&](auto param_dtype) {
    with_dtype(tensor.grad_dtype, [&](auto grad_dtype) {
      for_each_block(stretch, [&](std::int64_t first, std::int64_t count) {
        BlockF32<param_dtype()> param(tensor.param, first, count);
        BlockF32<grad_dtype()> grad(const_cast<void*>(tensor.grad), first, count);
        if (tensor.absmax1 != nullptr) {
          const std::int64_t block = first / kAdamWBlock;
          Block<std::uint8_t> state1(tensor.state1, first, count, kZeroCode1);
          Block<std::uint8_t> state2(tensor.state2, first, count, kZeroCode2);
          update_block(tables, coefficients, grad.get(), param.get(), state1.get(), state2.get(),
                       tensor.absmax1 + block, tensor.absmax2 + block);
          state1.put();
          state2.put();
        } else {
          Block<float> state1(tensor.state1, first, count), state2(tensor.state2, first, count);
          update_block(c, coefficients, grad.get(), param.get(), state1.get(), state2.get());
          state1.put();
          state2.put();
        }
        param.put();
      });
    });
  });
}

inline bool adamw_is_usable(const AdamWStretch& stretch, float inv_scale) {
  I32 most = set1_i32(0);  // as bits: those of NaN lie above those of infinity
  with_dtype(stretch.tensor->grad_dtype, [&](auto dtype) {
    for_each_block(stretch, [&](std::int64_t first, std::int64_t count) {
      Block<Element<dtype()>> block(const_cast<void*>(stretch.tensor->grad), first, count);
      const auto* grad = block.get();
      for (int i = 0; i < kAdamWBlock; i += kLanes)
        most = max_i32(most, as_i32(abs(mul(load_as_f32<dtype()>(grad + i), set1(inv_scale)))));
    });
  });
  std::uint32_t limit;
  __builtin_memcpy(&limit, &kLargestGradient, sizeof(limit));
  return static_cast<std::uint32_t>(reduce_max_i32(most)) <= limit;
}

inline void adamw_step(const AdamW8bitArgs& args, const Stream&) {
  adamw_8bit_step(args, AdamWKernels{.is_usable = adamw_is_usable, .update = adamw_update});
}

}  // namespace
}  // namespace qlora_native
