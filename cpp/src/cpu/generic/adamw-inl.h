// adamw_8bit_step: a block of 256 at a time. Its gradients and parameters are read as fp32, both moments decoded and
// updated into a buffer that stays in the first cache, and encoded again when the block's largest are known.
#pragma once

#include "common/codebook.h"
#include "cpu/adamw_step.h"
#include "cpu/generic/rows-inl.h"

namespace qlora_native {
namespace {

constexpr int kAdamWBlock = kAdamW8bitBlocksize;

// The code of the nearest level of a dynamic map, exactly, by its closed form (common/codebook.h).
template <bool kSigned>
class Encoder {
 public:
  // Vectors of values in [-1, 1], or [0, 1], or a rounding error beyond: what guess() makes of them is the code or one
  // less, and finish() decides. Two steps, so that two encoders can take them in turn, each while the other waits for
  // its results.
  Codes guess(const F32 (&t)[kTableVectors]) const {
    I32 code[kTableVectors];
    for (int k = 0; k < kTableVectors; ++k) code[k] = guess(t[k]);
    return pack(code);
  }
  void finish(const F32 (&t)[kTableVectors], const Codes& guessed, std::uint8_t* codes) const {
    F32 midpoint[kTableVectors];
    lookup(midpoints_, guessed, midpoint);
    store_codes(codes, guessed, t, midpoint);
  }

 private:
  I32 guess(F32 t) const {
    const F32 size = max(kSigned ? abs(t) : t, set1(kLines.kSmallest));
    const I32 line = shift_right<24>(as_i32(size));
    const F32 rise = mul(size, lookup(slopes_, line)), intercept = lookup(intercepts_, line);
    const F32 second = fma(intercept, set1(2.0f), set1(kLines.kIntercept));
    F32 position = min(add(rise, intercept), fma(rise, set1(kLines.kSlope), second));
    if constexpr (kSigned) position = add(with_sign_of(position, t), set1(127.0f));
    return truncate_to_i32(position);
  }

  static constexpr PairsOfLines<kSigned> kLines{};
  Table16 slopes_ = table16(kLines.slope), intercepts_ = table16(kLines.intercept);
  Table256 midpoints_{(kSigned ? kDynamicMidpoints : kUnsignedDynamicMidpoints).data()};
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
      most1 = max(most1, abs(m[k]));
      most2 = max(most2, v[k]);
    }
  }
  *absmax1 = reduce_max(most1);
  *absmax2 = reduce_max(most2);
  const F32 inverse1 = set1(inverse_absmax(*absmax1)), inverse2 = set1(inverse_absmax(*absmax2));
  for (int i = 0; i < kAdamWBlock; i += kTableVectors * kLanes) {
    F32 m[kTableVectors], v[kTableVectors];
    for (int k = 0; k < kTableVectors; ++k) {
      m[k] = mul(load(ms + i + k * kLanes), inverse1);
      v[k] = mul(load(vs + i + k * kLanes), inverse2);
    }
    const Codes guessed1 = tables.encoder1.guess(m), guessed2 = tables.encoder2.guess(v);
    tables.encoder1.finish(m, guessed1, state1 + i);
    tables.encoder2.finish(v, guessed2, state2 + i);
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
