// The shape of a block's work in the tensor-core product of up to 64 rows (small_m.cuh), and the accumulators of a
// tile.
#pragma once

#include "device/elements.cuh"
#include "product/gemm/operands.cuh"
#include "product/tile.cuh"

namespace qlora_native::QLN_CUDA {

template <int kRows_>
struct SmallMTile {
  static constexpr int kRows = kRows_, kCols = kTileCols, kStep = kSmallMStep, kStages = small_m_stages(kRows);
  static constexpr int kHalves = 2, kHalf = kStep / kHalves;  // of a step
  static constexpr int kWarpCols = kCols / (kGemmWarps / kHalves);
  // A fragment is mma's 16 by 8: 16 columns of the result and 8 of its rows, because the result is transposed.
  static constexpr int kColFragments = kWarpCols / kMmaRows, kRowFragments = kRows / kMmaCols;
  static_assert(kColFragments == kHalves && kRowFragments % 2 == 0 && kHalf == 2 * kChunk);
};

// mma gives lane (g, t) two of a fragment's 16 rows of W. These are adjacent, and so are the columns of the result.
// The lane loads one of the fragment's eight rows of X, and has two of these rows in the result. Rows that are loaded
// at once lie in different banks.
template <class Tile>
struct SmallMLane : Lane {
  using Lane::Lane;
  __device__ __forceinline__ unsigned half() const { return warp % Tile::kHalves; }
  // The first column of the result in its i-th fragment.
  __device__ __forceinline__ unsigned col(unsigned i) const {
    return warp / Tile::kHalves * Tile::kWarpCols + i * kMmaRows + 2 * g;
  }
  __device__ __forceinline__ unsigned loaded_row() const { return g / 2 + g % 2 * 4; }
  __device__ __forceinline__ unsigned row(unsigned j) const { return t + j * 4; }
};

// The codes of a step: four chunks of each row of W, as they are in memory. A warp reads the same chunk of every second
// row of a fragment at once. These rows are put beside each other, and their chunks change places, so that all lie in
// different banks. Places are counted in chunks from the first.
template <class Tile>
struct SmallMCodes {
  static constexpr unsigned kChunks = Tile::kStep / kChunk;  // of a row
  static constexpr unsigned kThreadChunks = Tile::kCols * kChunks / kGemmThreads;

  static constexpr unsigned place(unsigned col, unsigned chunk) {
    const unsigned line = col / kMmaRows * kMmaRows + col % 2 * (kMmaRows / 2) + col % kMmaRows / 2;
    return line * kChunks + (chunk ^ line / 2 % kChunks);
  }
  // Which column, and which of its chunks, stands at a place.
  static constexpr unsigned col_at(unsigned place) {
    const unsigned line = place / kChunks;
    return line / kMmaRows * kMmaRows + line % (kMmaRows / 2) * 2 + line / (kMmaRows / 2) % 2;
  }
  static constexpr unsigned chunk_at(unsigned place) { return place % kChunks ^ place / kChunks / 2 % kChunks; }

  std::uint8_t at[Tile::kCols * Tile::kStep / 2];
};

// The accumulators of a tile: first of the warp's half of each step, and then of both halves.
template <class T, class Tile>
class SmallMAccumulators {
  static constexpr int kColFragments = Tile::kColFragments, kRowFragments = Tile::kRowFragments;

 public:
  // Operands of two mma for each fragment of the weight: eight adjacent elements of the inner dimension.
  using Weights = std::uint32_t[kColFragments][2][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kColFragments; ++i) {
#pragma unroll
      for (int f = 0; f < kRowFragments; ++f) {
#pragma unroll
        for (int part = 0; part < 4; ++part) accumulator_[i][f][part] = 0.0f;
      }
    }
  }
  // `x`: where the lane's eight elements stand in the first rows of X.
  __device__ __forceinline__ void multiply(const Weights& weights, const SharedAddress& x) {
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) {
      const auto x8 = load_shared<Vec8>(x.at(f * kMmaCols * XStage<T, Tile>::kRowBytes));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int i = 0; i < kColFragments; ++i) {
          mma_16x8x16<T>(accumulator_[i][f], weights[i][k], {x8.at[2 * k], x8.at[2 * k + 1]});
        }
      }
    }
  }
  // Multiplies four adjacent elements of the inner dimension. load_x(row) gives the four of X in the row that is `row`
  // rows behind the lane's first.
  template <class LoadX>
  __device__ __forceinline__ void multiply_vec4(const std::uint32_t (&weights)[kColFragments][4], const LoadX& load_x) {
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) {
      const Vector<std::uint32_t, 2> x = load_x(f * kMmaCols);
#pragma unroll
      for (int i = 0; i < kColFragments; ++i) mma_16x8x16<T>(accumulator_[i][f], weights[i], {x.at[0], x.at[1]});
    }
  }
  // Adds up the accumulators of the two warps that have the same columns and different halves of the steps: one warp
  // gets those of the first fragment, the other those of the second. `exchange` is shared memory that no thread reads
  // or writes meanwhile.
  __device__ __forceinline__ void combine_halves(const SharedAddress& exchange, unsigned half) {
    const unsigned thread = thread_index();
    const SharedAddress to = exchange.at(thread * kVectorBytes), other = exchange.at((thread ^ kWarp) * kVectorBytes);
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) {
      Vector<float, 4> sent;
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        sent.at[part] = half == 0 ? accumulator_[1][f][part] : accumulator_[0][f][part];
        accumulator_[0][f][part] = half == 0 ? accumulator_[0][f][part] : accumulator_[1][f][part];
      }
      store_shared(to.at(f * kGemmThreads * kVectorBytes), sent);
    }
    sync_threads();
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) {
      const auto received = load_shared<Vector<float, 4>>(other.at(f * kGemmThreads * kVectorBytes));
#pragma unroll
      for (int part = 0; part < 4; ++part) accumulator_[0][f][part] += received.at[part];
    }
    sync_threads();
  }

  // The combined accumulators as vectors of four, which stream_k.cuh stores in memory and adds from there.
  static constexpr int kVectors = kRowFragments;
  __device__ __forceinline__ float* vector(int i) { return accumulator_[0][i]; }
  // Stores each accumulator plus bias, rounded once, in the `rows` rows and in the lane's `cols` columns that exist.
  // `out` and `biases` point to the lane's first column; without a bias `biases` is null.
  __device__ void store(const SmallMLane<Tile>& lane, T* out, std::int64_t stride, const T* biases, int rows,
                        int cols) const {
    if (cols <= 0) return;
    const int count = cols < 2 ? cols : 2;
    float bias[2] = {};
    if (biases != nullptr) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j < count) bias[j] = to_f32(biases[j]);
      }
    }
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) {
#pragma unroll
      for (unsigned j = 0; j < 2; ++j) {
        const int row = f * kMmaCols + static_cast<int>(lane.row(j));
        const T values[2] = {from_f32<T>(accumulator_[0][f][j] + bias[0]),
                             from_f32<T>(accumulator_[0][f][2 + j] + bias[1])};
        if (row < rows) store_elements(out + row * stride, count, values);
      }
    }
  }

 private:
  // Part p of a fragment: the lane's row p % 2 of X with its row p / 2 of W.
  float accumulator_[kColFragments][kRowFragments][4];
};

}  // namespace qlora_native::QLN_CUDA
