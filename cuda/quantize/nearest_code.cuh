// A codebook's quantizer, for any 16 values: NearestCodes.
#pragma once

#include <bit>

#include "common/codebook.h"
#include "device/elements.cuh"
#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

// Counts the midpoints below an element, from its bucket on (CodebookBuckets): in one step where no two midpoints share
// a bucket, in two for fp4, which has three around 0, in four where all do. Whatever a warp looks up at once is 32
// words or fewer, so lanes that meet in a bank ask for the same one.
class NearestCodes {
 public:
  struct alignas(CodebookBuckets::kCount) Table {
    std::uint8_t start[CodebookBuckets::kCount];  // bytes before the first midpoint that is not of a lower bucket
    float midpoint[32];                           // infinite from 15 on
    std::uint32_t order[16];                      // as in SortedCodebook
    float value[16];                              // likewise
    int step;  // of the search, the first: it and the smaller ones are enough for all midpoints of a bucket

    // Called by all threads of a block. `code`: in any order.
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
        const auto most = static_cast<int>(max_of_warp(static_cast<std::uint32_t>(here)));
        if (i == 0) step = most > 7 ? 8 : most > 3 ? 4 : most > 1 ? 2 : 1;
      }
      sync_threads();
    }
  };

  __device__ explicit NearestCodes(const Table& table) : table_(&table), step_(table.step) {}

  // Of eight elements in [-1, 1], up to a rounding error: as their bytes are stored, two a byte, the first in its high
  // half.
  __device__ __forceinline__ std::uint32_t of_eight(const float (&t)[kEight]) const {
    SharedPlace at[kEight] = {start_of(t[0]), start_of(t[1]), start_of(t[2]), start_of(t[3]),
                              start_of(t[4]), start_of(t[5]), start_of(t[6]), start_of(t[7])};
    const auto search = [&](std::uint32_t step) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        const auto midpoint = load_shared<float>(at[i].at(offsetof(Table, midpoint) + (step - 1) * kBytes));
        advance_where_below(at[i], step * kBytes, midpoint, t[i]);
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
    for (int i = 0; i < kEight; ++i) codes = codes * 16 + load_shared<std::uint32_t>(at[i].at(offsetof(Table, order)));
    return pick_bytes(codes, 0, 0x0123);
  }

 private:
  // As integers they compare as the buckets do.
  __device__ __forceinline__ static std::int32_t bucket_bits(float t) {
    return std::bit_cast<std::int32_t>(fma(t, CodebookBuckets::kPerUnit, CodebookBuckets::kOrigin));
  }
  __device__ __forceinline__ SharedPlace start_of(float t) const {
    const std::uint32_t bucket = static_cast<std::uint32_t>(bucket_bits(t)) % CodebookBuckets::kCount;
    return table_.at(load_shared<std::uint8_t>(table_.flipped(bucket)));  // it begins at a multiple of kCount
  }

  static constexpr std::uint32_t kBytes = 4;  // of a midpoint, and of an entry of `order`
  const SharedPlace table_;
  const int step_;
};

}  // namespace qlora_native::QLN_CUDA
