// NearestCodes finds the nearest of the 16 values of any codebook.
#pragma once

#include <bit>

#include "common/codebook.h"
#include "device/elements.cuh"
#include "device/simt.cuh"

namespace qlora_native::QLN_CUDA {

// Finds a code by counting the midpoints below an element. The count begins at the element's bucket (CodebookBuckets)
// and goes on by binary search: one step if no two midpoints share a bucket, two for fp4, which has three in the bucket
// around 0, and four if all midpoints share one. Each of the arrays has at most 32 words, so that lookups are free of
// bank conflicts: two lanes that use the same bank read the same word.
class NearestCodes {
 public:
  struct alignas(CodebookBuckets::kCount) Table {
    std::uint8_t start[CodebookBuckets::kCount];  // bytes of the midpoints in lower buckets
    float midpoint[32];                           // infinite from 15 on
    std::uint32_t order[16];                      // as in SortedCodebook
    float value[16];                              // as in SortedCodebook
    int step;  // the first step of the search; with the smaller ones it covers all midpoints of a bucket

    // To be called by all threads of a block. The values of `code` are in any order.
    __device__ void fill(const float* code) {
      const int i = thread_index();
      if (i < kWarp) {
        if (i < 16) {
          const int place = place_of_code(code, i);
          value[place] = code[i];
          order[place] = static_cast<std::uint32_t>(i);
        }
        sync_warp();
        midpoint[i] = i < 15 ? midpoint_of(value[i], value[i + 1]) : std::numeric_limits<float>::infinity();
        sync_warp();
        static_assert(CodebookBuckets::kCount == kWarp);  // a lane for each bucket
        const std::int32_t bucket = std::bit_cast<std::int32_t>(CodebookBuckets::kInteger) + i;
        int before = 0, here = 0;
        for (int m = 0; m < 15; ++m) {
          before += bucket_bits(midpoint[m]) < bucket;
          here += bucket_bits(midpoint[m]) == bucket;
        }
        start[i] = static_cast<std::uint8_t>(before * kBytes);
        const auto max = static_cast<int>(max_of_warp(static_cast<std::uint32_t>(here)));
        if (i == 0) step = max > 7 ? 8 : max > 3 ? 4 : max > 1 ? 2 : 1;
      }
      sync_threads();
    }
  };

  __device__ explicit NearestCodes(const Table& table) : table_(&table), step_(table.step) {}

  // The codes of eight elements in [-1, 1], up to a rounding error. They are in the order in which they are stored: two
  // in a byte, the first in its high half.
  __device__ __forceinline__ std::uint32_t codes_of_vec8(const float (&t)[kVecSize]) const {
    SharedAddress at[kVecSize] = {start_of(t[0]), start_of(t[1]), start_of(t[2]), start_of(t[3]),
                                  start_of(t[4]), start_of(t[5]), start_of(t[6]), start_of(t[7])};
    const auto search = [&](std::uint32_t step) {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) {
        const auto midpoint = load_shared<float>(at[i].at(offsetof(Table, midpoint) + (step - 1) * kBytes));
        advance_if_less(at[i], step * kBytes, midpoint, t[i]);
      }
    };
    if (step_ > 1) {
      if (step_ > 2) {
        if (step_ > 4) search(8);
        search(4);
      }
      search(2);
    }
    search(1);
    std::uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i)
      codes = codes * 16 + load_shared<std::uint32_t>(at[i].at(offsetof(Table, order)));
    return pick_bytes(codes, 0, 0x0123);
  }

 private:
  // The bits, compared as integers, have the order of the buckets.
  __device__ __forceinline__ static std::int32_t bucket_bits(float t) {
    return std::bit_cast<std::int32_t>(fma(t, CodebookBuckets::kPerUnit, CodebookBuckets::kOrigin));
  }
  __device__ __forceinline__ SharedAddress start_of(float t) const {
    const std::uint32_t bucket = static_cast<std::uint32_t>(bucket_bits(t)) % CodebookBuckets::kCount;
    // The table begins at a multiple of kCount, so XOR adds.
    return table_.at(load_shared<std::uint8_t>(table_.xor_swizzled(bucket)));
  }

  static constexpr std::uint32_t kBytes = 4;  // the size of a midpoint, and of an entry of `order`
  const SharedAddress table_;
  const int step_;
};

}  // namespace qlora_native::QLN_CUDA
