// A thread of an elementwise kernel takes eight contiguous elements at a time. These functions load and store them as
// vectors where they are aligned, and one by one elsewhere, or at the end of an array.
#pragma once

#include <bit>
#include <type_traits>
#include <utility>

#include "common/host_device.h"
#include "device/simt.cuh"
#include "qlora_native/types.h"

namespace qlora_native::QLN_CUDA {

constexpr int kVecSize = 8;
constexpr int kVectorBytes = 16;  // of the widest load or store

// Calls f.template operator()<T>() with the element type of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<Bf16>();
    case DType::f16:
      return f.template operator()<F16>();
  }
}

QLN_HOST_DEVICE inline bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % static_cast<unsigned>(bytes) == 0;
}

// How many of kElements elements of type T one load takes.
template <class T, int kElements>
constexpr int kVectorElements = sizeof(T) * kElements < kVectorBytes ? kElements : kVectorBytes / sizeof(T);

// Loads eight elements from an aligned address.
template <class T>
__device__ __forceinline__ void load_vec8_aligned(const T* from, T (&to)[kVecSize]) {
  constexpr int kCount = kVectorElements<T, kVecSize>;
#pragma unroll
  for (int i = 0; i < kVecSize; i += kCount) {
    const Vector<T, kCount> vector = load_vector<T, kCount>(from + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[i + j] = vector.at[j];
  }
}
template <int kElements, class T>
__device__ __forceinline__ void store_aligned(T* to, const T (&from)[kElements]) {
  constexpr int kCount = kVectorElements<T, kElements>;
#pragma unroll
  for (int i = 0; i < kElements; i += kCount) {
    Vector<T, kCount> vector;
#pragma unroll
    for (int j = 0; j < kCount; ++j) vector.at[j] = from[i + j];
    store_vector<T, kCount>(to + i, vector);
  }
}

// to[i] = from[i] for i < count <= 8; the other elements become `padding`.
template <class T>
__device__ __forceinline__ void load_vec8(const T* from, int count, T padding, T (&to)[kVecSize]) {
  if (count == kVecSize && is_aligned(from, kVectorElements<T, kVecSize> * sizeof(T))) {
    load_vec8_aligned(from, to);
  } else {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) to[i] = i < count ? from[i] : padding;
  }
}

// Eight elements as words, the first in the lowest bits: four words of 16-bit elements, eight of fp32.
template <class T>
using Vec8Of = Vector<std::uint32_t, kVecSize * sizeof(T) / 4>;
using Vec8 = Vec8Of<Bf16>;  // also the words of eight F16

template <class T>
__device__ __forceinline__ Vec8Of<T> load_words_aligned(const T* from) {
  Vec8Of<T> result;
#pragma unroll
  for (unsigned i = 0; i < sizeof(result) / sizeof(Vec8); ++i) {
    const Vec8 vector = load_vector<std::uint32_t, 4>(reinterpret_cast<const std::uint32_t*>(from) + 4 * i);
#pragma unroll
    for (int j = 0; j < 4; ++j) result.at[4 * i + j] = vector.at[j];
  }
  return result;
}
// Loads `count` elements, one by one; the others are 0.
template <class T>
__device__ __forceinline__ Vec8Of<T> gather_words(const T* from, int count) {
  Vec8Of<T> result;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t first = 2 * i < count ? from[2 * i].bits : 0;
      const std::uint32_t second = 2 * i + 1 < count ? from[2 * i + 1].bits : 0;
      result.at[i] = first | second << 16;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) result.at[i] = i < count ? std::bit_cast<std::uint32_t>(from[i]) : 0;
  }
  return result;
}
// Word i of eight elements. value(j) gives element j in fp32, before it is rounded.
template <class T, class F>
__device__ __forceinline__ std::uint32_t word_of(int i, const F& value) {
  if constexpr (sizeof(T) == 2) {
    return pack_pair<T>(value(2 * i), value(2 * i + 1));
  } else {
    return std::bit_cast<std::uint32_t>(value(i));
  }
}
template <class T, class F>
__device__ __forceinline__ Vec8Of<T> words_of(const F& value) {
  Vec8Of<T> result;
#pragma unroll
  for (unsigned i = 0; i < sizeof(result) / 4; ++i) result.at[i] = word_of<T>(i, value);
  return result;
}

template <int kElements, class T>
__device__ __forceinline__ void store_elements(T* to, int count, const T (&from)[kElements]) {
  if (count == kElements && is_aligned(to, kVectorElements<T, kElements> * sizeof(T))) {
    store_aligned(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i < count) to[i] = from[i];
    }
  }
}

// These load eight elements as fp32; elements from `count` on are 0.
template <class T>
__device__ __forceinline__ void load_vec8_as_f32(const T* from, int count, float (&to)[kVecSize]) {
  T raw[kVecSize];
  load_vec8(from, count, from_f32<T>(0.0f), raw);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) to[i] = to_f32(raw[i]);
}
template <class T>
__device__ __forceinline__ void load_vec8_aligned_as_f32(const T* from, float (&to)[kVecSize]) {
  if constexpr (sizeof(T) == 4) {
    load_vec8_aligned(from, to);
  } else {
    const Vec8 raw = load_words_aligned(from);  // words, whose upper half is a Bf16's fp32 value already
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) to[i] = to_f32(T{static_cast<std::uint16_t>(raw.at[i / 2] >> (i % 2 * 16))});
  }
}

template <class T>
__device__ __forceinline__ void store_vec8_from_f32(T* to, int count, const float (&from)[kVecSize]) {
  T rounded[kVecSize];
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) rounded[i] = from_f32<T>(from[i]);
  store_elements(to, count, rounded);
}
template <class T>
__device__ __forceinline__ void store_vec8_aligned_from_f32(T* to, const float (&from)[kVecSize]) {
  T rounded[kVecSize];
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) rounded[i] = from_f32<T>(from[i]);
  store_aligned(to, rounded);
}

// One element whose type is known at run time.
__device__ __forceinline__ float load_as_f32(const void* from, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[i];
  if (dtype == DType::bf16) return to_f32(static_cast<const Bf16*>(from)[i]);
  return to_f32(static_cast<const F16*>(from)[i]);
}
__device__ __forceinline__ void store_from_f32(void* to, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[i] = value;
  } else if (dtype == DType::bf16) {
    static_cast<Bf16*>(to)[i] = from_f32<Bf16>(value);
  } else {
    static_cast<F16*>(to)[i] = from_f32<F16>(value);
  }
}

template <class T>
__device__ __forceinline__ float rounded(float value) {
  return to_f32(from_f32<T>(value));
}

// Returns to each lane the largest value among `lanes` adjacent lanes; `lanes` is a power of two.
template <class T>
__device__ __forceinline__ T max_of_lanes(T value, int lanes) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shfl_xor(value, mask & (lanes - 1));  // beyond `lanes` the mask is 0: a lane's own value
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace qlora_native::QLN_CUDA
