// A warp updates a block of 256 elements: `update_8bit`, or `update_32bit` if the moments are fp32.
#pragma once

#include "common/optimizer.h"
#include "optimizer/code_table.cuh"
#include "optimizer/plan.cuh"

namespace qlora_native::QLN_CUDA {

// The tables that decode and encode moments by one dynamic map. They are in shared memory, because lanes look up
// different entries, and constant memory would serve these one after the other.
template <bool kSigned>
struct alignas(kVectorBytes) MapTables {
  std::array<float, 256> levels = kSigned ? kDynamicMap : kUnsignedDynamicMap;
  CodeTable<kSigned> codes;
};
struct MomentTables {
  MapTables<true> signed_map;
  MapTables<false> unsigned_map;

  template <int kMoment>
  __device__ __forceinline__ const MapTables<is_signed(kMoment)>& for_moment() const {
    if constexpr (is_signed(kMoment))
      return signed_map;
    else
      return unsigned_map;
  }
};
__device__ const MomentTables kTables{};
// The bytes of the tables that a rule uses: a rule with one moment uses the signed map alone.
template <class Rule>
constexpr std::size_t kTableBytes = Rule::kMoments == 1 ? sizeof(MapTables<true>) : sizeof(MomentTables);

// Calls f(k) for each moment of a rule; k is a compile-time constant.
template <class Rule, class F>
__device__ __forceinline__ void each_moment(const F& f) {
  f(std::integral_constant<int, 0>());
  if constexpr (Rule::kMoments > 1) f(std::integral_constant<int, 1>());
  if constexpr (Rule::kMoments > 2) f(std::integral_constant<int, 2>());
}

// A lane's eight elements of a whole block: they are contiguous, and vectors load and store them.
template <class T, class Rule>
struct Contiguous {
  const UpdateItem<Rule>& item;
  std::int64_t first;

  __device__ __forceinline__ Contiguous(const UpdateItem<Rule>& item, std::uint32_t block, bool)
      : item(item), first(std::int64_t{block} * kBlock + lane_index() * kVecSize) {}
  __device__ __forceinline__ void load_param(float (&to)[kVecSize]) const {
    load_vec8_aligned_as_f32(static_cast<const T*>(item.param) + first, to);
  }
  __device__ __forceinline__ void load_grad(float (&to)[kVecSize]) const {
    load_vec8_aligned_as_f32(static_cast<const T*>(item.grad) + first, to);
  }
  __device__ __forceinline__ void store_param(const float (&from)[kVecSize]) const {
    store_vec8_aligned_from_f32(static_cast<T*>(item.param) + first, from);
  }
  // The eight codes are the bytes of two words.
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

// A lane's elements of any block: every 32nd, loaded one by one. Elements beyond the end of the block are read as 0.
template <class Rule>
struct Strided {
  const UpdateItem<Rule>& item;
  std::int64_t first;
  int count;

  __device__ __forceinline__ Strided(const UpdateItem<Rule>& item, std::uint32_t block, bool is_last)
      : item(item),
        first(std::int64_t{block} * kBlock + lane_index()),
        count((is_last ? item.last : kBlock) - lane_index()) {}
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) f(i, first + i * kWarp, i * kWarp < count);
  }
  __device__ __forceinline__ void load(const void* from, DType dtype, float (&to)[kVecSize]) const {
    each([&](int i, std::int64_t at, bool is_there) { to[i] = is_there ? load_as_f32(from, dtype, at) : 0.0f; });
  }
  __device__ __forceinline__ void store(void* to, DType dtype, const float (&from)[kVecSize]) const {
    each([&](int i, std::int64_t at, bool is_there) {
      if (is_there) store_from_f32(to, dtype, at, from[i]);
    });
  }
  __device__ __forceinline__ void load_param(float (&to)[kVecSize]) const {
    load(item.param, static_cast<DType>(item.param_dtype), to);
  }
  __device__ __forceinline__ void load_grad(float (&to)[kVecSize]) const {
    load(item.grad, static_cast<DType>(item.grad_dtype), to);
  }
  __device__ __forceinline__ void store_param(const float (&from)[kVecSize]) const {
    store(item.param, static_cast<DType>(item.param_dtype), from);
  }
  __device__ __forceinline__ Vector<std::uint32_t, 2> load_codes(const void* codes, std::uint8_t padding) const {
    Vector<std::uint32_t, 2> words{};
    each([&](int i, std::int64_t at, bool is_there) {
      const std::uint32_t code = is_there ? static_cast<const std::uint8_t*>(codes)[at] : padding;
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
__device__ __forceinline__ Vector<std::uint32_t, 2> encode(const CodeTable<kSigned>& table,
                                                           const float (&values)[kVecSize], float inverse) {
  Vector<std::uint32_t, 2> words;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) code[j] = code_in_byte_2(table, values[4 * i + j] * inverse);
    words.at[i] = pick_bytes(pick_bytes(code[0], code[1], 0x62), pick_bytes(code[2], code[3], 0x62), 0x5410);
  }
  return words;
}

static_assert(kDynamicMap[zero_code(0)] == 0.0f && kUnsignedDynamicMap[zero_code(1)] == 0.0f);

template <class Rule, class Elements>
__device__ __forceinline__ void update_8bit(const Elements& elements, const StepCoefficients& c,
                                            const MomentTables& tables, std::uint32_t block) {
  constexpr int kMoments = Rule::kMoments;
  const UpdateItem<Rule>& item = elements.item;
  // A lane loads and computes the scale of one moment only. Shuffles give it those of the others.
  const int lane_moment = kMoments == 3 ? std::min(lane_index() % 4, 2) : lane_index() % kMoments;
  float* const absmax = item.absmax[lane_moment] + block;
  const float scale = *absmax * Rule::decode_factor(c, lane_moment);
  float scales[kMoments], param[kVecSize], grad[kVecSize], m[kMoments][kVecSize], max[kMoments] = {};
#pragma unroll
  for (int k = 0; k < kMoments; ++k) scales[k] = shfl(scale, k);
  elements.load_param(param);
  elements.load_grad(grad);
  Vector<std::uint32_t, 2> codes[kMoments];
#pragma unroll
  for (int k = 0; k < kMoments; ++k) codes[k] = elements.load_codes(item.state[k], zero_code(k));
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    float moments[kMoments];
    each_moment<Rule>([&](auto k) {
      moments[k()] = tables.for_moment<k()>().levels[byte_of(codes[k()].at[i / 4], i % 4)] * scales[k()];
    });
    param[i] = Rule::template update<FloatMath>(c, param[i], grad[i], moments);
#pragma unroll
    for (int k = 0; k < kMoments; ++k) {
      m[k][i] = moments[k];
      max[k] = fmaxf(max[k], is_signed(k) ? fabsf(moments[k]) : moments[k]);
    }
  }
  elements.store_param(param);
  std::uint32_t bits[kMoments];
#pragma unroll
  for (int k = 0; k < kMoments; ++k) bits[k] = max_of_warp(std::bit_cast<std::uint32_t>(max[k]));
  std::uint32_t lane_bits = bits[0];
#pragma unroll
  for (int k = 1; k < kMoments; ++k) lane_bits = lane_moment == k ? bits[k] : lane_bits;
  const auto largest = std::bit_cast<float>(lane_bits);
  if (lane_index() < kMoments) *absmax = largest;  // max_of_warp() has waited until all lanes had read the old one
  const float inverse = inverse_absmax(largest);
  each_moment<Rule>([&](auto k) {
    elements.store_codes(item.state[k()], encode(tables.for_moment<k()>().codes, m[k()], shfl(inverse, k())));
  });
}

template <class Rule>
__device__ __forceinline__ void update_32bit(const Strided<Rule>& elements, const StepCoefficients& c) {
  constexpr int kMoments = Rule::kMoments;
  const UpdateItem<Rule>& item = elements.item;
  float param[kVecSize], grad[kVecSize], m[kMoments][kVecSize];
  elements.load_param(param);
  elements.load_grad(grad);
#pragma unroll
  for (int k = 0; k < kMoments; ++k) elements.load(item.state[k], DType::f32, m[k]);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    float moments[kMoments];
#pragma unroll
    for (int k = 0; k < kMoments; ++k) moments[k] = m[k][i] * Rule::decode_factor(c, k);
    param[i] = Rule::template update<FloatMath>(c, param[i], grad[i], moments);
#pragma unroll
    for (int k = 0; k < kMoments; ++k) m[k][i] = moments[k];
  }
#pragma unroll
  for (int k = 0; k < kMoments; ++k) elements.store(item.state[k], DType::f32, m[k]);
  elements.store_param(param);
}

}  // namespace qlora_native::QLN_CUDA
