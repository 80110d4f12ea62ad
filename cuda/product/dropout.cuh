// Dropout on the adapter's input, as kernels apply it: the mask is computed again from seed and position (philox.h).
#pragma once

#include "common/philox.h"
#include "device/elements.cuh"
#include "qlora_native/linear.h"

namespace qlora_native::QLN_CUDA {

struct Dropout {
  std::uint64_t seed;
  const std::uint64_t* device_seed;  // null, or where with_seed() finds what it adds to the seed
  std::uint32_t threshold;           // 0: nothing is dropped
  float scale;                       // 1 / (1 - p)
  explicit Dropout(const LoraView& lora)
      : seed(lora.seed),
        device_seed(lora.device_seed),
        threshold(dropout_threshold(lora.dropout)),
        scale(1.0f / (1.0f - lora.dropout)) {}
  // Dropout as a kernel uses it, with a seed that has been read once.
  __device__ Dropout with_seed() const {
    Dropout dropout = *this;
    dropout.seed = dropout_seed(seed, device_seed);
    return dropout;
  }
  __device__ bool keeps(std::int64_t m, std::int64_t k) const {
    return threshold == 0 || dropout_keeps(seed, m, k, threshold);
  }
  // Elements (m, k) ... (m, k+7), with zeros for those that are dropped. k is a multiple of 8, so that they share their
  // random bits.
  template <class Words>
  __device__ __forceinline__ Words keep(Words values, std::int64_t m, std::int64_t k) const {
    if (threshold == 0) return values;
    const PhiloxBlock random = dropout_random(seed, m, k);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      if (dropout_keeps(random, i, threshold)) continue;
      if constexpr (std::is_same_v<Words, Vec8>) {
        values.at[i / 2] &= i % 2 == 0 ? 0xFFFF0000u : 0x0000FFFFu;
      } else {
        values.at[i] = 0;
      }
    }
    return values;
  }
};

}  // namespace qlora_native::QLN_CUDA
