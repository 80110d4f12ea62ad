// The operands of a product (product.cuh): each is a small object that gives element (i, k), already rounded to the
// dtype in which the product takes it. kAlongInner says along which index its memory runs.
//
// On CUDA cores a product asks for one element, in fp32. On tensor cores it asks for eight that are neighbours in
// memory, of which the first has an index that is a multiple of 8: fetch() starts their loads, and finish() makes
// 16-bit elements of what has come, after the multiply of the step before.
#pragma once

#include <bit>

#include "common/layout.h"
#include "common/philox.h"
#include "device/elements.cuh"
#include "device/problem.cuh"
#include "qlora_native/linear.h"

namespace qlora_native::QLN_CUDA {

template <class T>
__device__ __forceinline__ float rounded(float value) {
  return to_f32(from_f32<T>(value));
}

// (i, k) of a matrix with rows i.
template <class T>
struct Rows {
  using Element = T;
  using Raw = Eight;
  static constexpr bool kAlongInner = true;
  const T* data;
  std::int64_t stride;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return to_f32(data[i * stride + k]); }
  __device__ Raw fetch(std::int64_t i, std::int64_t k, int count) const {
    return load_eight_16bit(data + i * stride + k, count);
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const { return raw; }
};
// (i, k) of a matrix with columns i.
template <class T>
struct Columns {
  using Element = T;
  using Raw = Eight;
  static constexpr bool kAlongInner = false;
  const T* data;
  std::int64_t stride;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return to_f32(data[k * stride + i]); }
  __device__ Raw fetch(std::int64_t i, std::int64_t k, int count) const {
    return load_eight_16bit(data + k * stride + i, count);
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const { return raw; }
};

struct Dropout {
  std::uint64_t seed;
  const std::uint64_t* device_seed;  // null, or what prepared() adds to it
  std::uint32_t threshold;           // 0: everything is kept
  float scale;                       // 1 / (1 - p)
  explicit Dropout(const LoraView& lora)
      : seed(lora.seed),
        device_seed(lora.device_seed),
        threshold(dropout_threshold(lora.dropout)),
        scale(1.0f / (1.0f - lora.dropout)) {}
  // As a kernel uses it: its seed is read once.
  __device__ Dropout prepared() const {
    Dropout dropout = *this;
    dropout.seed = dropout_seed(seed, device_seed);
    return dropout;
  }
  __device__ bool keeps(std::int64_t m, std::int64_t k) const {
    return threshold == 0 || dropout_keeps(seed, m, k, threshold);
  }
  // What is kept of elements (m, k) ... (m, k+7), which share their random bits: k is a multiple of 8.
  __device__ __forceinline__ Eight kept_of(Eight values, std::int64_t m, std::int64_t k) const {
    if (threshold == 0) return values;
    const PhiloxBlock random = dropout_random(seed, m, k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!dropout_keeps(random, 2 * i, threshold)) values.at[i] &= 0xFFFF0000u;
      if (!dropout_keeps(random, 2 * i + 1, threshold)) values.at[i] &= 0x0000FFFFu;
    }
    return values;
  }
};

// X after dropout, not yet scaled: by rows m, or by columns k.
template <class T>
struct KeptRows {
  using Element = T;
  using Raw = Eight;
  static constexpr bool kAlongInner = true;
  Rows<T> x;
  Dropout dropout;
  __device__ float operator()(std::int64_t m, std::int64_t k) const { return dropout.keeps(m, k) ? x(m, k) : 0.0f; }
  __device__ Raw fetch(std::int64_t m, std::int64_t k, int count) const { return x.fetch(m, k, count); }
  __device__ Eight finish(const Raw& raw, std::int64_t m, std::int64_t k) const { return dropout.kept_of(raw, m, k); }
};
template <class T>
struct KeptColumns {
  using Element = T;
  using Raw = Eight;
  static constexpr bool kAlongInner = false;
  Columns<T> x;
  Dropout dropout;
  __device__ float operator()(std::int64_t k, std::int64_t m) const { return dropout.keeps(m, k) ? x(k, m) : 0.0f; }
  __device__ Raw fetch(std::int64_t k, std::int64_t m, int count) const { return x.fetch(k, m, count); }
  __device__ Eight finish(const Raw& raw, std::int64_t k, std::int64_t m) const { return dropout.kept_of(raw, m, k); }
};

// A source as a kernel uses it.
template <class Source>
__device__ Source prepared(const Source& source) {
  return source;
}
template <class T>
__device__ KeptRows<T> prepared(const KeptRows<T>& source) {
  return {source.x, source.dropout.prepared()};
}
template <class T>
__device__ KeptColumns<T> prepared(const KeptColumns<T>& source) {
  return {source.x, source.dropout.prepared()};
}

// Elements of a quantized weight. Four bits in a 16-bit dtype are multiplied elsewhere (gemm.cuh): eight at once are
// loaded as such where the weight has 8 bits, and one by one otherwise.
template <class T>
struct WeightElements {
  using Element = T;
  QuantizedWeightView w;
  WeightScales scales;
  bool eights;  // 8 bits, and eight neighbours are 8 aligned bytes with one scale

  explicit WeightElements(const QuantizedWeightView& w)
      : w(w), scales(scales_of(w)), eights(w.bits == 8 && is_aligned(w)) {}

  __device__ float value(std::int64_t e) const {
    return rounded<T>(value_of_element(w, e, scale_of_block(w, e / w.blocksize)));
  }
  // Codes, their scale or what multiplies its level, the level; or, without `eights`, the elements themselves.
  using Raw = Eight;
  __device__ Raw fetch_eight(std::int64_t e, int count) const {
    Raw raw{};
    if (!eights) {
#pragma unroll 1
      for (int i = 0; i < kEight; i += 2) {
        const float first = i < count ? value(e + i) : 0.0f, second = i + 1 < count ? value(e + i + 1) : 0.0f;
        raw = {{raw.at[1], raw.at[2], raw.at[3], pack_pair<T>(first, second)}};
      }
      return raw;
    }
    const auto codes = load_vector<std::uint32_t, 2>(reinterpret_cast<const std::uint32_t*>(w.codes + e));
    const std::int64_t block = e >> scales.block;
    raw.at[0] = codes.at[0];
    raw.at[1] = codes.at[1];
    raw.at[2] = std::bit_cast<std::uint32_t>(scales.of_blocks[block >> scales.sharing]);
    if (scales.nested) raw.at[3] = static_cast<const std::uint8_t*>(w.absmax)[block];
    return raw;
  }
  __device__ Eight finish_eight(const Raw& raw) const {
    if (!eights) return raw;
    float scale = std::bit_cast<float>(raw.at[2]);
    if (scales.nested) scale = nested_scale(w.nested_code[raw.at[3]], scale, *w.offset);
    scale /= 127.0f;
    const auto at = [&](int i) {
      const auto code = static_cast<std::int8_t>(byte_of(raw.at[i / 4], i % 4));
      return static_cast<float>(code) * scale;
    };
    return {{pack_pair<T>(at(0), at(1)), pack_pair<T>(at(2), at(3)), pack_pair<T>(at(4), at(5)),
             pack_pair<T>(at(6), at(7))}};
  }
};
// W by rows n, or by columns k.
template <class T>
struct WeightRows : WeightElements<T> {
  using WeightElements<T>::WeightElements;
  using typename WeightElements<T>::Raw;
  static constexpr bool kAlongInner = true;
  __device__ float operator()(std::int64_t n, std::int64_t k) const { return this->value(n * this->w.K + k); }
  __device__ Raw fetch(std::int64_t n, std::int64_t k, int count) const {
    return this->fetch_eight(n * this->w.K + k, count);
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const { return this->finish_eight(raw); }
};
template <class T>
struct WeightColumns : WeightElements<T> {
  using WeightElements<T>::WeightElements;
  using typename WeightElements<T>::Raw;
  static constexpr bool kAlongInner = false;
  __device__ float operator()(std::int64_t k, std::int64_t n) const { return this->value(n * this->w.K + k); }
  __device__ Raw fetch(std::int64_t k, std::int64_t n, int count) const {
    return this->fetch_eight(n * this->w.K + k, count);
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const { return this->finish_eight(raw); }
};

// `factor` times A or B, rounded to T.
template <class T>
struct LoraElements {
  using Element = T;
  const void* data;
  DType dtype;
  std::int64_t stride;
  float factor;

  __device__ float value(std::int64_t e) const { return rounded<T>(factor * load_as_f32(data, dtype, e)); }
  // Eight floats, or in half as many words eight of 16 bits.
  struct Raw {
    std::uint32_t at[kEight];
  };
  __device__ Raw fetch_eight(std::int64_t e, int count) const {
    Raw raw{};
    if (dtype == DType::f32) {
      float values[kEight];
      load_eight(static_cast<const float*>(data) + e, count, 0.0f, values);
#pragma unroll
      for (int i = 0; i < kEight; ++i) raw.at[i] = std::bit_cast<std::uint32_t>(values[i]);
    } else {
      const Eight values = load_eight_16bit(static_cast<const Bf16*>(data) + e, count);  // or F16: it is their bits
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.at[i] = values.at[i];
    }
    return raw;
  }
  __device__ Eight finish_eight(const Raw& raw) const {
    const auto at = [&](int i) {
      if (dtype == DType::f32) return factor * std::bit_cast<float>(raw.at[i]);
      const auto bits = static_cast<std::uint16_t>(raw.at[i / 2] >> (i % 2 * 16));
      return factor * (dtype == DType::bf16 ? to_f32(Bf16{bits}) : to_f32(F16{bits}));
    };
    return {{pack_pair<T>(at(0), at(1)), pack_pair<T>(at(2), at(3)), pack_pair<T>(at(4), at(5)),
             pack_pair<T>(at(6), at(7))}};
  }
};
// By rows, or by columns.
template <class T>
struct LoraRows : LoraElements<T> {
  using typename LoraElements<T>::Raw;
  static constexpr bool kAlongInner = true;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return this->value(i * this->stride + k); }
  __device__ Raw fetch(std::int64_t i, std::int64_t k, int count) const {
    return this->fetch_eight(i * this->stride + k, count);
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const { return this->finish_eight(raw); }
};
template <class T>
struct LoraColumns : LoraElements<T> {
  using typename LoraElements<T>::Raw;
  static constexpr bool kAlongInner = false;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return this->value(k * this->stride + i); }
  __device__ Raw fetch(std::int64_t i, std::int64_t k, int count) const {
    return this->fetch_eight(k * this->stride + i, count);
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const { return this->finish_eight(raw); }
};

}  // namespace qlora_native::QLN_CUDA
