// The operands of a product (product.cuh): each is a small object that gives element (i, k), already rounded to the
// dtype in which the product takes it. kAlongInner says along which index its memory runs.
//
// On CUDA cores a product asks for one element, in fp32. On tensor cores it asks for eight that are neighbours in
// memory, of which the first is element e = i * stride + k, or k * stride + i, and that index along which memory runs a
// multiple of 8. load() or, where eight are no vector, gather() starts their loads; finish() makes 16-bit elements of
// what has come, after the multiply of the step before.
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

template <class T>
struct MatrixElements {
  using Element = T;
  using Raw = Eight;
  const T* data;
  std::int64_t stride;
  // Whether eights are vectors.
  __device__ bool has_vectors() const { return is_aligned(data, kVectorBytes) && stride % kEight == 0; }
  __device__ Raw load(std::int64_t e) const { return load_eight_16bit_aligned(data + e); }
  __device__ Raw gather(std::int64_t e, int count) const { return gather_eight_16bit(data + e, count); }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const { return raw; }
};
// (i, k) of a matrix with rows i.
template <class T>
struct Rows : MatrixElements<T> {
  static constexpr bool kAlongInner = true;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return to_f32(this->data[i * this->stride + k]); }
};
// (i, k) of a matrix with columns i.
template <class T>
struct Columns : MatrixElements<T> {
  static constexpr bool kAlongInner = false;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return to_f32(this->data[k * this->stride + i]); }
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
struct KeptRows : Rows<T> {
  Dropout dropout;
  __device__ float operator()(std::int64_t m, std::int64_t k) const {
    return dropout.keeps(m, k) ? Rows<T>::operator()(m, k) : 0.0f;
  }
  __device__ Eight finish(const Eight& raw, std::int64_t m, std::int64_t k) const { return dropout.kept_of(raw, m, k); }
};
template <class T>
struct KeptColumns : Columns<T> {
  Dropout dropout;
  __device__ float operator()(std::int64_t k, std::int64_t m) const {
    return dropout.keeps(m, k) ? Columns<T>::operator()(k, m) : 0.0f;
  }
  __device__ Eight finish(const Eight& raw, std::int64_t k, std::int64_t m) const { return dropout.kept_of(raw, m, k); }
};

// A source as a kernel uses it.
template <class Source>
__device__ Source prepared(const Source& source) {
  return source;
}
template <class T>
__device__ KeptRows<T> prepared(const KeptRows<T>& source) {
  return {Rows<T>(source), source.dropout.prepared()};
}
template <class T>
__device__ KeptColumns<T> prepared(const KeptColumns<T>& source) {
  return {Columns<T>(source), source.dropout.prepared()};
}

// Elements of a quantized weight. Four bits in a 16-bit dtype are multiplied elsewhere (gemm.cuh), so vectors are of 8.
template <class T>
struct WeightElements {
  using Element = T;
  // Of a vector: codes, their scale or what multiplies its level, the level. Else the elements themselves.
  using Raw = Eight;
  QuantizedWeightView w;
  WeightScales scales;
  std::int64_t stride;
  bool vectors;  // 8 bits, and eight neighbours are 8 aligned bytes with one scale

  explicit WeightElements(const QuantizedWeightView& w)
      : w(w), scales(scales_of(w)), stride(w.K), vectors(w.bits == 8 && is_aligned(w)) {}

  __device__ __forceinline__ float value(std::int64_t e) const {
    return rounded<T>(value_of_element(w, e, scale_of_block(w, e >> scales.block)));
  }
  __device__ bool has_vectors() const { return vectors; }
  __device__ Raw load(std::int64_t e) const {
    const auto codes = load_vector<std::uint32_t, 2>(reinterpret_cast<const std::uint32_t*>(w.codes + e));
    const std::int64_t block = e >> scales.block;
    const std::uint32_t level = scales.nested ? static_cast<const std::uint8_t*>(w.absmax)[block] : 0;
    return {{codes.at[0], codes.at[1], std::bit_cast<std::uint32_t>(scales.of_blocks[block >> scales.sharing]), level}};
  }
  __device__ Raw gather(std::int64_t e, int count) const {
    Raw raw{};
#pragma unroll 1
    for (int i = 0; i < kEight; i += 2) {
      const float first = i < count ? value(e + i) : 0.0f, second = i + 1 < count ? value(e + i + 1) : 0.0f;
      raw = {{raw.at[1], raw.at[2], raw.at[3], pack_pair<T>(first, second)}};
    }
    return raw;
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const {
    if (!vectors) return raw;
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
  static constexpr bool kAlongInner = true;
  __device__ float operator()(std::int64_t n, std::int64_t k) const { return this->value(n * this->w.K + k); }
};
template <class T>
struct WeightColumns : WeightElements<T> {
  using WeightElements<T>::WeightElements;
  static constexpr bool kAlongInner = false;
  __device__ float operator()(std::int64_t k, std::int64_t n) const { return this->value(n * this->w.K + k); }
};

// `factor` times A or B, rounded to T.
template <class T>
struct LoraElements {
  using Element = T;
  // Eight floats, or in half as many words eight of 16 bits.
  struct Raw {
    std::uint32_t at[kEight];
  };
  const void* data;
  DType dtype;
  std::int64_t stride;
  float factor;

  __device__ float value(std::int64_t e) const { return rounded<T>(factor * load_as_f32(data, dtype, e)); }
  __device__ bool has_vectors() const { return is_aligned(data, kVectorBytes) && stride % kEight == 0; }
  __device__ Raw load(std::int64_t e) const {
    if (dtype != DType::f32) return raw_of(load_eight_16bit_aligned(static_cast<const Bf16*>(data) + e));  // or F16
    float values[kEight];
    load_eight_aligned(static_cast<const float*>(data) + e, values);
    return raw_of(values);
  }
  __device__ Raw gather(std::int64_t e, int count) const {
    if (dtype != DType::f32) return raw_of(gather_eight_16bit(static_cast<const Bf16*>(data) + e, count));
    float values[kEight];
#pragma unroll
    for (int i = 0; i < kEight; ++i) values[i] = i < count ? static_cast<const float*>(data)[e + i] : 0.0f;
    return raw_of(values);
  }
  __device__ Eight finish(const Raw& raw, std::int64_t, std::int64_t) const {
    const auto at = [&](int i) {
      if (dtype == DType::f32) return factor * std::bit_cast<float>(raw.at[i]);
      const auto bits = static_cast<std::uint16_t>(raw.at[i / 2] >> (i % 2 * 16));
      return factor * (dtype == DType::bf16 ? to_f32(Bf16{bits}) : to_f32(F16{bits}));
    };
    return {{pack_pair<T>(at(0), at(1)), pack_pair<T>(at(2), at(3)), pack_pair<T>(at(4), at(5)),
             pack_pair<T>(at(6), at(7))}};
  }

 private:
  __device__ static Raw raw_of(const Eight& eight) {
    return {{eight.at[0], eight.at[1], eight.at[2], eight.at[3], 0, 0, 0, 0}};
  }
  __device__ static Raw raw_of(const float (&values)[kEight]) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kEight; ++i) raw.at[i] = std::bit_cast<std::uint32_t>(values[i]);
    return raw;
  }
};
// By rows, or by columns.
template <class T>
struct LoraRows : LoraElements<T> {
  static constexpr bool kAlongInner = true;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return this->value(i * this->stride + k); }
};
template <class T>
struct LoraColumns : LoraElements<T> {
  static constexpr bool kAlongInner = false;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return this->value(k * this->stride + i); }
};

}  // namespace qlora_native::QLN_CUDA
