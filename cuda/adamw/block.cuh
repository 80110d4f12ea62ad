// AdamW's update of a block of 256 elements by a warp: `update_8bit` and, for moments in fp32, `update_32bit`.
#pragma once

#include "adamw/code_sums.cuh"
#include "adamw/plan.cuh"
#include "common/adamw.h"

namespace qlora_native::QLN_CUDA {

// In shared memory: lanes look up different entries, which constant memory would serve one after the other.
struct alignas(kVectorBytes) MomentTables {
  std::array<float, 256> levels1 = kDynamicMap, levels2 = kUnsignedDynamicMap;
  CodeSums<true> sums1;
  CodeSums<false> sums2;
};
__device__ const MomentTables kTables{};

// What a lane has of a block of 256, and where: eight neighbours, in vectors.
template <class T>
struct Neighbours {
  const UpdateItem& item;
  std::int64_t first;

  __device__ __forceinline__ Neighbours(const UpdateItem& item, std::uint32_t block, bool)
      : item(item), first(std::int64_t{block} * kBlock + lane_index() * kEight) {}
  __device__ __forceinline__ void load_param(float (&to)[kEight]) const {
    load_eight_aligned_as_f32(static_cast<const T*>(item.param) + first, to);
  }
  __device__ __forceinline__ void load_grad(float (&to)[kEight]) const {
    load_eight_aligned_as_f32(static_cast<const T*>(item.grad) + first, to);
  }
  __device__ __forceinline__ void store_param(const float (&from)[kEight]) const {
    store_eight_aligned_from_f32(static_cast<T*>(item.param) + first, from);
  }
  // Codes are bytes of two words.
  __device__ __forceinline__ Vector<std::uint32_t, 2> load_codes(const void* codes, std::uint8_t) const {
    return load_vector<std::uint32_t, 2>(reinterpret_cast<const std::uint32_t*>(at(codes)));
  }
  __device__ __forceinline__ void store_codes(void* codes, const Vector<std::uint32_t, 2>& words) const {
    store_vector<std::uint32_t, 2>(reinterpret_cast<std::uint32_t*>(const_cast<std::uint8_t*>(at(codes))), words);
  }

 private:
  __device__ __forceinline__ const std::uint8_t* at(const void* codes) const {
    return static_cast<const std::uint8_t*>(codes) + first;
  }
};

// The same of any block: every 32nd element, as far as there are any; the others are 0.
struct Apart {
  const UpdateItem& item;
  std::int64_t first;
  int count;

  __device__ __forceinline__ Apart(const UpdateItem& item, std::uint32_t block, bool is_last)
      : item(item),
        first(std::int64_t{block} * kBlock + lane_index()),
        count((is_last ? item.last : kBlock) - lane_index()) {}
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kEight; ++i) f(i, first + i * kWarp, i * kWarp < count);
  }
  __device__ __forceinline__ void load(const void* from, DType dtype, float (&to)[kEight]) const {
    each([&](int i, std::int64_t at, bool is_there) { to[i] = is_there ? load_as_f32(from, dtype, at) : 0.0f; });
  }
  __device__ __forceinline__ void store(void* to, DType dtype, const float (&from)[kEight]) const {
    each([&](int i, std::int64_t at, bool is_there) {
      if (is_there) store_from_f32(to, dtype, at, from[i]);
    });
  }
  __device__ __forceinline__ void load_param(float (&to)[kEight]) const {
    load(item.param, static_cast<DType>(item.param_dtype), to);
  }
  __device__ __forceinline__ void load_grad(float (&to)[kEight]) const {
    load(item.grad, static_cast<DType>(item.grad_dtype), to);
  }
  __device__ __forceinline__ void store_param(const float (&from)[kEight]) const {
    store(item.param, static_cast<DType>(item.param_dtype), from);
  }
  __device__ __forceinline__ Vector<std::uint32_t, 2> load_codes(const void* codes, std::uint8_t rest) const {
    Vector<std::uint32_t, 2> words{};
    each([&](int i, std::int64_t at, bool is_there) {
      const std::uint32_t code = is_there ? static_cast<const std::uint8_t*>(codes)[at] : rest;
      words.at[i / 4] |= code << (8 * (i % 4));
    });
    return words;
  }
  __device__ __forceinline__ void store_codes(void* codes, const Vector<std::uint32_t, 2>& words) const {
    each([&](int i, std::int64_t at, bool is_there) {
      if (is_there) static_cast<std::uint8_t*>(codes)[at] = static_cast<std::uint8_t>(byte_of(words.at[i / 4], i % 4));
    });
  }
};

template <bool kSigned>
__device__ __forceinline__ Vector<std::uint32_t, 2> encode(const CodeSums<kSigned>& sums, const float (&values)[kEight],
                                                           float inverse) {
  Vector<std::uint32_t, 2> words;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) code[j] = code_in_byte_2(sums, values[4 * i + j] * inverse);
    words.at[i] = pick_bytes(pick_bytes(code[0], code[1], 0x62), pick_bytes(code[2], code[3], 0x62), 0x5410);
  }
  return words;
}

// The codes whose level is 0.
constexpr std::uint8_t kZeroCode1 = 127, kZeroCode2 = 0;
static_assert(kDynamicMap[kZeroCode1] == 0.0f && kUnsignedDynamicMap[kZeroCode2] == 0.0f);

template <class Place>
__device__ __forceinline__ void update_8bit(const Place& place, const AdamWCoefficients& c, const MomentTables& tables,
                                            std::uint32_t block) {
  const UpdateItem& item = place.item;
  const bool is_odd = lane_index() % 2 != 0;  // odd lanes do for the second moment what even ones do for the first
  float* const absmax = (is_odd ? item.absmax2 : item.absmax1) + block;
  const float decayed = *absmax * (is_odd ? c.beta2 : c.beta1);
  const float decayed1 = shfl(decayed, 0), decayed2 = shfl(decayed, 1);
  float param[kEight], grad[kEight], m[kEight], v[kEight];
  place.load_param(param);
  place.load_grad(grad);
  const Vector<std::uint32_t, 2> codes1 = place.load_codes(item.state1, kZeroCode1);
  const Vector<std::uint32_t, 2> codes2 = place.load_codes(item.state2, kZeroCode2);
  float most1 = 0.0f, most2 = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    m[i] = tables.levels1[byte_of(codes1.at[i / 4], i % 4)] * decayed1;
    v[i] = tables.levels2[byte_of(codes2.at[i / 4], i % 4)] * decayed2;
    param[i] = adamw_update(c, param[i], grad[i], m[i], v[i]);
    most1 = fmaxf(most1, fabsf(m[i]));
    most2 = fmaxf(most2, v[i]);
  }
  place.store_param(param);
  const auto bits1 = max_of_warp(std::bit_cast<std::uint32_t>(most1));
  const auto bits2 = max_of_warp(std::bit_cast<std::uint32_t>(most2));
  const auto most = std::bit_cast<float>(is_odd ? bits2 : bits1);
  if (lane_index() < 2) *absmax = most;  // which all lanes have read before they met
  const float inverse = inverse_absmax(most);
  place.store_codes(item.state1, encode(tables.sums1, m, shfl(inverse, 0)));
  place.store_codes(item.state2, encode(tables.sums2, v, shfl(inverse, 1)));
}

__device__ __forceinline__ void update_32bit(const Apart& place, const AdamWCoefficients& c) {
  const UpdateItem& item = place.item;
  float param[kEight], grad[kEight], m[kEight], v[kEight];
  place.load_param(param);
  place.load_grad(grad);
  place.load(item.state1, DType::f32, m);
  place.load(item.state2, DType::f32, v);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    m[i] *= c.beta1;
    v[i] *= c.beta2;
    param[i] = adamw_update(c, param[i], grad[i], m[i], v[i]);
  }
  place.store(item.state1, DType::f32, m);
  place.store(item.state2, DType::f32, v);
  place.store_param(param);
}

}  // namespace qlora_native::QLN_CUDA
