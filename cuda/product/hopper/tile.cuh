// The shape of a block's work in the product by wgmma (gemm.cuh), its shared memory, and the sums of a tile.
#pragma once

#include "device/elements.cuh"
#include "device/weight_chunk.cuh"
#include "product/config.h"
#include "product/dropout.cuh"
#include "product/gemm/tile.cuh"
#include "simt/hopper.cuh"

namespace qlora_native::QLN_CUDA {

// A tile has kRows rows of the result, which are rows of X and wgmma's columns, by kCols columns, which are rows of W
// and wgmma's rows. Each of two warpgroups has 64 of the columns, and each of its warps 16.
template <int kRows_>
struct HopperTile {
  static constexpr int kRows = kRows_, kCols = kGemmCols, kStep = kGemmStep;
  static constexpr int kStages = hopper_stages(kRows);
  // Consumers are the block's first threads. They are as many as a block of gemm/ has, so that its runs and lanes serve
  // here too.
  static constexpr int kConsumers = kCols / kWgmmaRows * kWarpgroup, kThreads = kConsumers + kWarpgroup;
  static_assert(kConsumers == kGemmThreads);
  // Of the producers, one warp asks for tiles, some bring scales, and one is idle: registers are for four warps.
  static constexpr int kConsumerWarps = kConsumers / kWarp, kScaleWarps = 2;
  // How many products of 16 of the inner dimension a step has.
  static constexpr int kProducts = kStep / kWgmmaInner;
  static_assert(kStep * 2 == kSwizzledRowBytes);
};

// wgmma gives lane (g, t) of a consumer rows g and g + 8 of the warp's 16. They are columns 2g and 2g + 1 of the
// result, so that a lane has neighbours of the result.
struct HopperLane : Lane {
  using Lane::Lane;
  // The lane's first column, and its first row.
  __device__ __forceinline__ unsigned col() const { return warp * kMmaRows + 2 * g; }
  __device__ __forceinline__ unsigned row() const { return 2 * t; }
};

template <class T, class Tile>
struct HopperShared {
  using Table = PairTable<16, kRowBytes / sizeof(Vector<float, 2>)>;
  static constexpr int kScratchWords = 32;
  struct Row {
    typename Table::Pair pairs[16];
    std::uint32_t scratch[kScratchWords];  // of one consumer
  };
  static_assert(sizeof(Row) == kRowBytes && Tile::kConsumers == 256);
  // A step has this many codes and scales in both layouts of the weight (weights.cuh).
  struct alignas(kSwizzledAlignment) Stage {
    T left[Tile::kRows * Tile::kStep];  // rows of X, or of U, as wgmma takes them
    std::uint8_t codes[Tile::kCols * Tile::kStep / 2];
    float scales[Tile::kCols];
  };
  Row rows[256];
  Stage stages[Tile::kStages];
  typename ScaleReader<true>::Levels levels;
  std::uint64_t full[Tile::kStages], empty[Tile::kStages];
  std::uint64_t sums;  // the barrier at which the sums of a cluster's blocks arrive
  int run;             // the block's

  static constexpr std::uint32_t kLeftBytes = sizeof(Stage::left), kCodeBytes = sizeof(Stage::codes);
  // As in GemmShared: the table must begin at kRowsBegin.
  static __device__ HopperShared& in_dynamic_smem() { return *dynamic_smem_for_rows<HopperShared, true>(); }
  static constexpr std::size_t bytes() {
    static_assert(kRowsBegin % kSwizzledAlignment == 0 && sizeof(rows) % kSwizzledAlignment == 0);
    constexpr std::size_t kBytes = kGemmMostReservedSmem + sizeof(HopperShared);
    static_assert(kBytes == hopper_smem_bytes(Tile::kRows));
    return kBytes;
  }
};

// How far a lane's i-th row is from its first.
constexpr int hopper_row(int i) { return i / 2 * 8 + i % 2; }

// A consumer's sums, in registers: eight of wgmma's columns after another, and of these eight the lane's sums {row 2g,
// row 2g + 1} x {column 2t, column 2t + 1}.
template <class Tile>
class HopperSums {
  static constexpr int kSums = Tile::kRows / 2;

 public:
  static constexpr int kVectors = kSums / 4;
  float sum[kSums];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& each : sum) each = 0.0f;
  }
  // Sets the sums to zero that dropout drops. `row`, `col`: the lane's first of the result. Four lanes have the same
  // rows, and each of them has two of eight columns whose random bits are one block. So each lane makes the block of
  // every fourth row, and the four exchange its words.
  __device__ void drop(const Dropout& dropout, std::int64_t row, std::int64_t col) {
    constexpr int kLaneRows = 2 * kVectors, kLanes = 4;
    static_assert(kLaneRows <= 64);
    const unsigned own_word = HopperLane().g % kLanes;  // the word that this lane needs
    std::uint64_t kept[2] = {};                         // by column; a bit for each row
#pragma unroll 1
    for (int first = kLaneRows - kLanes; first >= 0; first -= kLanes) {
      const int i = first + static_cast<int>(own_word);
      const PhiloxBlock random = dropout_random(dropout.seed, row + hopper_row(i), col);
      kept[0] <<= kLanes;
      kept[1] <<= kLanes;
#pragma unroll
      for (unsigned distance = 0; distance < kLanes; ++distance) {
        const unsigned other = own_word ^ distance;
        const std::uint32_t even = other & 2 ? random.word[2] : random.word[0];
        const std::uint32_t odd = other & 2 ? random.word[3] : random.word[1];
        const std::uint32_t word = shfl_xor(other & 1 ? odd : even, static_cast<int>(distance * 4));
        kept[0] |= std::uint64_t{(word & 0xFFFF) >= dropout.threshold} << other;
        kept[1] |= std::uint64_t{word >> 16 >= dropout.threshold} << other;
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& each = sum[i / 2 * 4 + i % 2 + 2 * j];
        each = (kept[j] >> i & 1) != 0 ? each : 0.0f;
      }
    }
  }
  // The sums as vectors of four, which blocks exchange: vector i has rows 2i and 2i + 1 of both columns.
  __device__ __forceinline__ float* vector(int i) { return sum + 4 * i; }
};

// Stores a lane's sums: each plus bias, rounded once, in the rows and columns that are there.
template <class T>
class HopperResult {
 public:
  // `out` and `biases` point to the lane's first; without a bias `biases` is null. `rows` and `cols` are counted from
  // there.
  __device__ __forceinline__ HopperResult(T* out, std::int64_t stride, const T* biases, std::int64_t rows,
                                          std::int64_t cols)
      : out_(out), stride_(stride), rows_(cols <= 0 ? 0 : rows), count_(cols < 2 ? 1 : 2) {
    if (biases == nullptr || cols <= 0) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j < count_) bias_[j] = to_f32(biases[j]);
    }
  }
  // Stores the i-th of HopperSums' vectors.
  __device__ __forceinline__ void store(int i, const float* sums) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const T values[2] = {from_f32<T>(sums[j] + bias_[0]), from_f32<T>(sums[2 + j] + bias_[1])};
      const int row = hopper_row(2 * i + j);
      if (row < rows_) store_elements(out_ + row * stride_, count_, values);
    }
  }

 private:
  T* out_;
  std::int64_t stride_, rows_;
  int count_;
  float bias_[2] = {};
};

}  // namespace qlora_native::QLN_CUDA
