// A consumer's accumulators of a tile in the product by wgmma (gemm.cuh), and how they are stored.
#pragma once

#include "product/dropout.cuh"
#include "product/wgmma/tile.cuh"

namespace qlora_native::QLN_CUDA {

// wgmma's operand d, whose columns are rows of the result. A lane has four elements of each eight rows: {its first,
// second column} x {row 2t, row 2t + 1}. Blocks exchange and store them as vectors of four, which combine_warpgroups()
// makes for dX.
template <class Tile>
class WgmmaAccumulators {
  static constexpr int kCount = Tile::kRows / 2;  // of two columns
  using Vec4 = Vector<float, 4>;

 public:
  static constexpr int kVectors = kCount / 4;
  float d[Tile::kColTiles][kCount];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& column : d) {
#pragma unroll
      for (float& value : column) value = 0.0f;
    }
  }
  __device__ __forceinline__ void wait_for_products() {
#pragma unroll
    for (auto& column : d) wgmma_wait_for(column);  // only the first has to wait
  }
  __device__ __forceinline__ float* vector(int i) { return d[0] + 4 * i; }

  // Sets the elements of dX to zero that dropout drops. `row`, `col`: the lane's first of the result. The random bits
  // of eight columns are one block, and four lanes have a row of them: two adjacent ones in each warpgroup. Each
  // computes the blocks of every fourth row, and stores a byte for each in its scratch memory, with a bit for each
  // column that is not dropped. All consumers call this.
  template <class Shared, class Sync>
  __device__ void drop(const Dropout& dropout, std::int64_t row, std::int64_t col, Shared& shared, const Sync& sync) {
    constexpr int kLanes = 4, kLaneRows = 2 * kVectors / kLanes;  // of which it makes the bytes
    constexpr int kWords = kLaneRows < 4 ? 1 : kLaneRows / 4;
    const WgmmaLane<Tile> lane;
    const unsigned first_row = lane.g % 2 + 2 * lane.warpgroup();
#pragma unroll 1
    for (int word = 0; word < kWords; ++word) {
      std::uint32_t bytes = 0;
#pragma unroll 1
      for (int i = 0; i < (kLaneRows < 4 ? kLaneRows : 4); ++i) {
        const int i_row = (4 * word + i) * kLanes + static_cast<int>(first_row);
        const PhiloxBlock random = dropout_random(dropout.seed, row + row_of(i_row), col);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          bytes |= std::uint32_t{dropout_keeps(random, k, dropout.threshold)} << (8 * i + k);
        }
      }
      store_shared(shared.scratch(lane.thread, word), bytes);
    }
    sync();
    std::uint32_t mask[kLanes][kWords];
#pragma unroll
    for (unsigned other = 0; other < kLanes; ++other) {
      const unsigned thread = (lane.thread & ~(4u | kWarpgroup)) | other % 2 * 4 | other / 2 * kWarpgroup;
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        mask[other][word] = load_shared<std::uint32_t>(shared.scratch(thread, word)) >> (lane.g % 2 * 4);
      }
    }
    sync();
#pragma unroll
    for (int p = 0; p < Tile::kColTiles; ++p) {
#pragma unroll
      for (int i = 0; i < 2 * kVectors; ++i) {
        const std::uint32_t row_mask = mask[i % kLanes][i / kLanes / 4] >> (i / kLanes % 4 * 8);
#pragma unroll
        for (unsigned j = 0; j < 2; ++j) {
          float& value = d[p][i / 2 * 4 + i % 2 + 2 * j];
          value = (row_mask >> lane.col_of(p * Tile::kInnerProducts, j) & 1) != 0 ? value : 0.0f;
        }
      }
    }
  }

  // Makes the vectors of dX: of four adjacent columns each. A warpgroup has half of each sum, or two of the four
  // columns. It sends the other one what it has of every second eight rows, and adds, or puts beside its own, what it
  // receives of the rest. Afterwards vector(i) has the lane's columns of the i-th of those rows that its warpgroup
  // stores. All consumers call this; what they send passes through their scratch memory.
  template <class Shared, class Sync>
  __device__ __forceinline__ void combine_warpgroups(Shared& shared, const Sync& sync) {
    const WgmmaLane<Tile> lane;
    if (lane.warpgroup() == 0) return combine_warpgroups<0>(lane.thread, shared, sync);
    combine_warpgroups<1>(lane.thread, shared, sync);
  }

 private:
  // How far a lane's i-th row is from its first.
  __device__ __forceinline__ static int row_of(int i) { return i / 2 * 8 + i % 2; }

  // kGroup: the number of the warpgroup.
  template <int kGroup, class Shared, class Sync>
  __device__ __forceinline__ void combine_warpgroups(unsigned thread, Shared& shared, const Sync& sync) {
    constexpr int kSent = Tile::kSplitsSteps ? kVectors : kVectors / 2;  // vectors
    constexpr int kAtOnce = kSent < Shared::kScratchVectors ? kSent : Shared::kScratchVectors;
    float combined[kVectors][4];
#pragma unroll
    for (int first = 0; first < kSent; first += kAtOnce) {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        store_shared(shared.scratch_vector(thread, i - first), sent<kGroup>(i));
      }
      sync();
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        const auto other = load_shared<Vec4>(shared.scratch_vector(thread ^ kWarpgroup, i - first));
        receive<kGroup>(i, other, combined);
      }
      sync();
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) vector(i)[j] = combined[i][j];
    }
  }
  // The lane's element in column `col`, of two, or of four with kSplitsSteps, and in the i-th row of every second
  // eight.
  template <int kEight>
  __device__ __forceinline__ float& at(int i, int col) {
    return d[col / 2][(i / 2 * 2 + kEight) * 4 + i % 2 + col % 2 * 2];
  }
  template <int kGroup>
  __device__ __forceinline__ Vec4 sent(int i) {
    constexpr int kOther = 1 - kGroup;
    if constexpr (Tile::kSplitsSteps) {
      return {{at<kOther>(i, 0), at<kOther>(i, 1), at<kOther>(i, 2), at<kOther>(i, 3)}};
    } else {
      return {{at<kOther>(2 * i, 0), at<kOther>(2 * i, 1), at<kOther>(2 * i + 1, 0), at<kOther>(2 * i + 1, 1)}};
    }
  }
  template <int kGroup>
  __device__ __forceinline__ void receive(int i, const Vec4& other, float (&combined)[kVectors][4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (Tile::kSplitsSteps) {
        combined[i][j] = at<kGroup>(i, j) + other.at[j];
      } else {
        const int row = 2 * i + j / 2, col = j % 2;
        combined[row][2 * kGroup + col] = at<kGroup>(row, col);
        combined[row][2 * (1 - kGroup) + col] = other.at[j];
      }
    }
  }
};

// Stores a lane's accumulators: each plus bias, rounded once, in the rows and columns that exist.
template <class T, class Tile>
class WgmmaEpilogue {
  static constexpr int kCols = WgmmaLane<Tile>::kCols, kRowsOfVector = 4 / kCols;

 public:
  // `out` and `biases` point to the lane's first; without a bias `biases` is null. `rows` and `cols` are counted from
  // there.
  __device__ __forceinline__ WgmmaEpilogue(T* out, std::int64_t stride, const T* biases, std::int64_t rows,
                                           std::int64_t cols)
      : out_(out), stride_(stride), rows_(cols <= 0 ? 0 : rows), count_(cols < kCols ? static_cast<int>(cols) : kCols) {
    if (biases == nullptr || cols <= 0) return;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      if (j < count_) bias_[j] = to_f32(biases[j]);
    }
  }
  // Stores the i-th vector of the accumulators. Forward it is of two columns and two rows, and of dX it is of a row.
  __device__ __forceinline__ void store(int i, const float* values_f32) const {
#pragma unroll
    for (int j = 0; j < kRowsOfVector; ++j) {
      T values[kCols];
#pragma unroll
      for (int col = 0; col < kCols; ++col) values[col] = from_f32<T>(values_f32[col * kRowsOfVector + j] + bias_[col]);
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
