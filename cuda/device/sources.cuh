// The operands of a product on CUDA cores, element by element: each is a small function object that gives element (i,
// k) in fp32, already rounded to the dtype in which the product takes it. kAlongInner says along which index its memory
// runs.
#pragma once

#include "common/layout.h"
#include "common/philox.h"
#include "device/elements.cuh"
#include "qlora_native/linear.h"

namespace qlora_native::QLN_CUDA {

template <class T>
__device__ __forceinline__ float rounded(float value) {
  return to_f32(from_f32<T>(value));
}

// (i, k) of a matrix with rows i.
template <class T>
struct Rows {
  static constexpr bool kAlongInner = true;
  const T* data;
  std::int64_t stride;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return to_f32(data[i * stride + k]); }
};
// (i, k) of a matrix with columns i.
template <class T>
struct Columns {
  static constexpr bool kAlongInner = false;
  const T* data;
  std::int64_t stride;
  __device__ float operator()(std::int64_t i, std::int64_t k) const { return to_f32(data[k * stride + i]); }
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
};

// X after dropout, not yet scaled: by rows m, or by columns k.
template <class T>
struct KeptRows {
  static constexpr bool kAlongInner = true;
  Rows<T> x;
  Dropout dropout;
  __device__ float operator()(std::int64_t m, std::int64_t k) const { return dropout.keeps(m, k) ? x(m, k) : 0.0f; }
};
template <class T>
struct KeptColumns {
  static constexpr bool kAlongInner = false;
  Columns<T> x;
  Dropout dropout;
  __device__ float operator()(std::int64_t k, std::int64_t m) const { return dropout.keeps(m, k) ? x(k, m) : 0.0f; }
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

// W by rows n, or by columns k.
template <class T>
__device__ __forceinline__ float weight_at(const QuantizedWeightView& w, std::int64_t n, std::int64_t k) {
  const std::int64_t e = n * w.K + k;
  return rounded<T>(value_of_element(w, e, scale_of_block(w, e / w.blocksize)));
}
template <class T>
struct WeightRows {
  static constexpr bool kAlongInner = true;
  QuantizedWeightView w;
  __device__ float operator()(std::int64_t n, std::int64_t k) const { return weight_at<T>(w, n, k); }
};
template <class T>
struct WeightColumns {
  static constexpr bool kAlongInner = false;
  QuantizedWeightView w;
  __device__ float operator()(std::int64_t k, std::int64_t n) const { return weight_at<T>(w, n, k); }
};

// `factor` times A or B, rounded to T: by rows, or by columns.
template <class T>
struct LoraRows {
  static constexpr bool kAlongInner = true;
  const void* data;
  DType dtype;
  std::int64_t stride;
  float factor;
  __device__ float operator()(std::int64_t i, std::int64_t k) const {
    return rounded<T>(factor * load_as_f32(data, dtype, i * stride + k));
  }
};
template <class T>
struct LoraColumns {
  static constexpr bool kAlongInner = false;
  const void* data;
  DType dtype;
  std::int64_t stride;
  float factor;
  __device__ float operator()(std::int64_t i, std::int64_t k) const {
    return rounded<T>(factor * load_as_f32(data, dtype, k * stride + i));
  }
};

}  // namespace qlora_native::QLN_CUDA
