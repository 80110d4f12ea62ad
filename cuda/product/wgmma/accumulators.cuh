// A consumer's sums of a tile in the product by wgmma (gemm.cuh), and how they are stored.
#pragma once

#include "product/dropout.cuh"
#include "product/wgmma/tile.cuh"

namespace qlora_native::QLN_CUDA {

// A lane's sums are in registers as wgmma leaves them. wgmma's columns are rows of the result, and of each eight the
// lane has four sums: {its first, second column} x {row 2t, row 2t + 1}. Blocks exchange and store them as vectors of
// four. For dX, join() makes the vectors.
template <class Tile>
class HopperSums {
  static constexpr int kSums = Tile::kRows / 2;  // of two columns
  using Four = Vector<float, 4>;

 public:
  static constexpr int kVectors = kSums / 4;
  float sum[Tile::kColTiles][kSums];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& of_columns : sum) {
#pragma unroll
      for (float& each : of_columns) each = 0.0f;
    }
  }
  __device__ __forceinline__ void wait_for_products() {
#pragma unroll
    for (auto& of_columns : sum) wgmma_wait_for(of_columns);  // only the first has to wait
  }
  __device__ __forceinline__ float* vector(int i) { return sum[0] + 4 * i; }

  // Sets the sums of dX to zero that dropout drops. `row`, `col`: the lane's first of the result. The random bits of
  // eight columns are one block, and four lanes have a row of them: two neighbours in each warpgroup. Each makes the
  // blocks of every fourth row, and stores a byte for each in its scratch memory, with a bit for each column that is
  // kept. All consumers come here.
  template <class Shared, class Sync>
  __device__ void drop(const Dropout& dropout, std::int64_t row, std::int64_t col, Shared& shared, const Sync& sync) {
    constexpr int kLanes = 4, kRowsOfLane = 2 * kVectors / kLanes;  // of which it makes the bytes
    constexpr int kWords = kRowsOfLane < 4 ? 1 : kRowsOfLane / 4;
    const HopperLane<Tile> lane;
    const unsigned own = lane.g % 2 + 2 * lane.warpgroup();
#pragma unroll 1
    for (int word = 0; word < kWords; ++word) {
      std::uint32_t bytes = 0;
#pragma unroll 1
      for (int i = 0; i < (kRowsOfLane < 4 ? kRowsOfLane : 4); ++i) {
        const int own_row = (4 * word + i) * kLanes + static_cast<int>(own);
        const PhiloxBlock random = dropout_random(dropout.seed, row + row_of(own_row), col);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          bytes |= std::uint32_t{dropout_keeps(random, k, dropout.threshold)} << (8 * i + k);
        }
      }
      store_shared(shared.scratch(lane.thread, word), bytes);
    }
    sync();
    std::uint32_t kept[kLanes][kWords];
#pragma unroll
    for (unsigned other = 0; other < kLanes; ++other) {
      const unsigned thread = (lane.thread & ~(4u | kWarpgroup)) | other % 2 * 4 | other / 2 * kWarpgroup;
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        kept[other][word] = load_shared<std::uint32_t>(shared.scratch(thread, word)) >> (lane.g % 2 * 4);
      }
    }
    sync();
#pragma unroll
    for (int p = 0; p < Tile::kColTiles; ++p) {
#pragma unroll
      for (int i = 0; i < 2 * kVectors; ++i) {
        const std::uint32_t of_row = kept[i % kLanes][i / kLanes / 4] >> (i / kLanes % 4 * 8);
#pragma unroll
        for (unsigned j = 0; j < 2; ++j) {
          float& each = sum[p][i / 2 * 4 + i % 2 + 2 * j];
          each = (of_row >> lane.col_of(p * Tile::kInnerProducts, j) & 1) != 0 ? each : 0.0f;
        }
      }
    }
  }

  // Makes the vectors of dX: of four neighbouring columns each. A warpgroup has half of each sum, or two of the four
  // columns. It gives the other one what it has of every second eight rows, and adds, or puts beside its own, what it
  // is given of the rest. Afterwards vector(i) has the lane's columns of the i-th of those rows that its warpgroup
  // stores. All consumers come here; what they give passes through their scratch memory.
  template <class Shared, class Sync>
  __device__ __forceinline__ void join(Shared& shared, const Sync& sync) {
    const HopperLane<Tile> lane;
    if (lane.warpgroup() == 0) return join<0>(lane.thread, shared, sync);
    join<1>(lane.thread, shared, sync);
  }

 private:
  // How far a lane's i-th row is from its first.
  __device__ __forceinline__ static int row_of(int i) { return i / 2 * 8 + i % 2; }

  template <int kOwn, class Shared, class Sync>
  __device__ __forceinline__ void join(unsigned thread, Shared& shared, const Sync& sync) {
    constexpr int kGiven = Tile::kSharesSteps ? kVectors : kVectors / 2;  // vectors
    constexpr int kAtOnce = kGiven < Shared::kScratchVectors ? kGiven : Shared::kScratchVectors;
    float joined[kVectors][4];
#pragma unroll
    for (int first = 0; first < kGiven; first += kAtOnce) {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        store_shared(shared.scratch_vector(thread, i - first), given<kOwn>(i));
      }
      sync();
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        const auto other = load_shared<Four>(shared.scratch_vector(thread ^ kWarpgroup, i - first));
        take<kOwn>(i, other, joined);
      }
      sync();
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) vector(i)[j] = joined[i][j];
    }
  }
  // The sum of the lane's column `col`, of two, or of four with kSharesSteps, and of the i-th row of every second
  // eight.
  template <int kWhich>
  __device__ __forceinline__ float& at(int i, int col) {
    return sum[col / 2][(i / 2 * 2 + kWhich) * 4 + i % 2 + col % 2 * 2];
  }
  template <int kOwn>
  __device__ __forceinline__ Four given(int i) {
    constexpr int kOther = 1 - kOwn;
    if constexpr (Tile::kSharesSteps) {
      return {{at<kOther>(i, 0), at<kOther>(i, 1), at<kOther>(i, 2), at<kOther>(i, 3)}};
    } else {
      return {{at<kOther>(2 * i, 0), at<kOther>(2 * i, 1), at<kOther>(2 * i + 1, 0), at<kOther>(2 * i + 1, 1)}};
    }
  }
  template <int kOwn>
  __device__ __forceinline__ void take(int i, const Four& other, float (&joined)[kVectors][4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (Tile::kSharesSteps) {
        joined[i][j] = at<kOwn>(i, j) + other.at[j];
      } else {
        const int row = 2 * i + j / 2, col = j % 2;
        joined[row][2 * kOwn + col] = at<kOwn>(row, col);
        joined[row][2 * (1 - kOwn) + col] = other.at[j];
      }
    }
  }
};

// Stores a lane's sums: each plus bias, rounded once, in the rows and columns that are there.
template <class T, class Tile>
class HopperResult {
  static constexpr int kCols = HopperLane<Tile>::kCols, kRowsOfVector = 4 / kCols;

 public:
  // `out` and `biases` point to the lane's first; without a bias `biases` is null. `rows` and `cols` are counted from
  // there.
  __device__ __forceinline__ HopperResult(T* out, std::int64_t stride, const T* biases, std::int64_t rows,
                                          std::int64_t cols)
      : out_(out), stride_(stride), rows_(cols <= 0 ? 0 : rows), count_(cols < kCols ? static_cast<int>(cols) : kCols) {
    if (biases == nullptr || cols <= 0) return;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      if (j < count_) bias_[j] = to_f32(biases[j]);
    }
  }
  // Stores the i-th of HopperSums' vectors. Forward it is of two columns and two rows, and of dX it is of a row.
  __device__ __forceinline__ void store(int i, const float* sums) const {
#pragma unroll
    for (int j = 0; j < kRowsOfVector; ++j) {
      T values[kCols];
#pragma unroll
      for (int col = 0; col < kCols; ++col) values[col] = from_f32<T>(sums[col * kRowsOfVector + j] + bias_[col]);
      const int row = Tile::kForward ? i * 8 + j : i / 2 * 16 + i % 2;
      if (row < rows_) store_elements(out_ + row * stride_, count_, values);
    }
  }

 private:
  T* out_;
  std::int64_t stride_, rows_;
  int count_;
  float bias_[kCols] = {};
};

}  // namespace qlora_native::QLN_CUDA
