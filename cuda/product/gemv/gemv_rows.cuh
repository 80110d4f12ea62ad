// The rows of X, and the accumulators over them, in the product of up to eight rows (gemv.cu).
#pragma once

#include "device/elements.cuh"
#include "device/simt.cuh"
#include "device/weight_chunk.cuh"
#include "product/config.h"

namespace qlora_native::QLN_CUDA {

constexpr int kGemvWarps = 8;
constexpr int kGemvThreads = kGemvWarps * kWarp;
constexpr int kQuad = 4;                        // lanes that share a row
constexpr int kGemvVecSize = 4;                 // elements of a row that are multiplied at once
constexpr int kWarpStep = kQuad * kChunk;       // elements of K that a warp takes at once
static_assert(kGemvCols == 2 * kWarp / kQuad);  // a lane has two rows of W

struct GemvLane {
  int warp, g, t;
  __device__ GemvLane() : warp(thread_index() / kWarp), g(thread_index() % kWarp / kQuad), t(thread_index() % kQuad) {}
};

// The elements of up to kRows rows of X that a lane needs in its warp's step, 32 along K. Vec4 of them are multiplied
// at once with the same four of two rows of W. Accumulators: those of a warp, of 16 rows of W with each row of X.
//
// In 16 bits a lane holds elements of row g alone. mma gives it the sums of W's rows g (c[0], c[1]) and g + 8 (c[2],
// c[3]) with X's rows 2t and 2t + 1.
template <class T, int kRows>
class GemvRows {
  static_assert(kRows == kMmaCols);

 public:
  struct Accumulators {
    float c[4] = {};
  };
  using Vec4 = Vector<std::uint32_t, 2>;

  // Loads the four elements at `from`, which points into row 0. Beyond `rows` rows and `count` elements along K they
  // are 0.
  __device__ static Vec4 load_vec4(const T* from, std::int64_t stride, int rows, int count, const GemvLane& lane) {
    from += lane.g * stride;
    std::uint32_t bits[kGemvVecSize] = {};
#pragma unroll
    for (int i = 0; i < kGemvVecSize; ++i) {
      if (lane.g < rows && i < count) bits[i] = from[i].bits;
    }
    return {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}};
  }
  // The same for rows first ... last-1; all other rows are 0.
  __device__ static Vec4 load_vec4(const T* from, std::int64_t stride, int first, int last, int count,
                                   const GemvLane& lane) {
    return load_vec4(from, stride, last, lane.g < first ? 0 : count, lane);
  }
  // Loads the whole chunk at `from`. With kVectors, `count` is 32 or more, or less than 1.
  template <bool kVectors>
  __device__ __forceinline__ void fetch(const T* from, std::int64_t stride, int rows, int count, const GemvLane& lane) {
    constexpr int kElements = kVectorBytes / sizeof(T);
    static_assert(kElements == 2 * kGemvVecSize);
#pragma unroll
    for (int i = 0; i < kChunk; i += kElements) {
      Vec4& first = vec4_[i / kGemvVecSize];
      Vec4& second = vec4_[i / kGemvVecSize + 1];
      if constexpr (kVectors) {
        Vector<std::uint32_t, 4> words{};
        if (lane.g < rows && count > 0) {
          words = load_vector<std::uint32_t, 4>(reinterpret_cast<const std::uint32_t*>(from + lane.g * stride + i));
        }
        first = {{words.at[0], words.at[1]}};
        second = {{words.at[2], words.at[3]}};
      } else {
        first = load_vec4(from + i, stride, rows, count - i, lane);
        second = load_vec4(from + i + kGemvVecSize, stride, rows, count - i - kGemvVecSize, lane);
      }
    }
  }
  __device__ __forceinline__ Vec4 vec4_at(int i) const { return vec4_[i / kGemvVecSize]; }

  __device__ __forceinline__ static void add(Accumulators& accumulators, const Vec4& x,
                                             const float (&w)[2][kGemvVecSize]) {
    const std::uint32_t a[4] = {pack_pair<T>(w[0][0], w[0][1]), pack_pair<T>(w[1][0], w[1][1]),
                                pack_pair<T>(w[0][2], w[0][3]), pack_pair<T>(w[1][2], w[1][3])};
    const std::uint32_t b[2] = {x.at[0], x.at[1]};
    mma_16x8x16<T>(accumulators.c, a, b);
  }
  __device__ __forceinline__ static void store(const Accumulators& accumulators, float (&to)[kGemvRows][kGemvCols],
                                               const GemvLane& lane) {
#pragma unroll
    for (int part = 0; part < 4; ++part) to[2 * lane.t + part % 2][lane.g + part / 2 * 8] = accumulators.c[part];
  }

 private:
  Vec4 vec4_[kChunk / kGemvVecSize];
};

// In fp32 a lane takes its part of K of all rows. This is too much to hold, so it is loaded from the first cache when
// it is multiplied.
template <int kRows>
class GemvRows<float, kRows> {
 public:
  struct Accumulators {
    float sum[2][kRows] = {};
  };
  struct Vec4 {
    Vector<float, kGemvVecSize> row[kRows];
  };

  __device__ __forceinline__ static Vec4 load_vec4(const float* from, std::int64_t stride, int rows, int count,
                                                   const GemvLane& lane) {
    return load_vec4(from, stride, 0, rows, count, lane);
  }
  __device__ __forceinline__ static Vec4 load_vec4(const float* from, std::int64_t stride, int first, int last,
                                                   int count, const GemvLane&) {
    Vec4 vec4{};
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int i = 0; i < kGemvVecSize; ++i) {
        if (m >= first && m < last && i < count) vec4.row[m].at[i] = from[m * stride + i];
      }
    }
    return vec4;
  }
  template <bool kVectors>
  __device__ __forceinline__ void fetch(const float* from, std::int64_t stride, int rows, int count, const GemvLane&) {
    from_ = from;
    stride_ = stride;
    rows_ = rows;
    count_ = count;
    vectors_ = kVectors;
  }
  __device__ __forceinline__ Vec4 vec4_at(int i) const {
    if (!vectors_) return load_vec4(from_ + i, stride_, rows_, count_ - i, GemvLane());
    Vec4 vec4{};
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m < rows_ && count_ > 0) vec4.row[m] = load_vector<float, kGemvVecSize>(from_ + m * stride_ + i);
    }
    return vec4;
  }

  __device__ __forceinline__ static void add(Accumulators& accumulators, const Vec4& x,
                                             const float (&w)[2][kGemvVecSize]) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int i = 0; i < kGemvVecSize; ++i)
          accumulators.sum[row][m] = fma(w[row][i], x.row[m].at[i], accumulators.sum[row][m]);
      }
    }
  }
  // The lanes of a row add up their parts in one order, and each of them gets the sum.
  __device__ __forceinline__ static void store(const Accumulators& accumulators, float (&to)[kGemvRows][kGemvCols],
                                               const GemvLane& lane) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        float sum = accumulators.sum[row][m];
#pragma unroll
        for (int mask = 1; mask < kQuad; mask *= 2) sum += shfl_xor(sum, mask);
        if (lane.t == m % kQuad) to[m][lane.g + row * 8] = sum;
      }
    }
  }

 private:
  const float* from_;
  std::int64_t stride_;
  int rows_, count_;
  bool vectors_;
};

}  // namespace qlora_native::QLN_CUDA
