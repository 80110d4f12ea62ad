// The shape of a block's work in the product by wgmma (gemm.cuh), what it has in shared memory, and the sums of a tile
// through its life.
#pragma once

#include "device/elements.cuh"
#include "device/weight_chunk.cuh"
#include "product/config.h"
#include "product/dropout.cuh"
#include "product/gemm/tile.cuh"
#include "simt/hopper.cuh"

namespace qlora_native::QLN_CUDA {

// kRows of the result, which are rows of X and wgmma's columns, by kCols, which are rows of W and wgmma's rows: 64 for
// each of two warpgroups, 16 for each of their warps.
template <int kRows_>
struct HopperTile {
  static constexpr int kRows = kRows_, kCols = kGemmCols, kStep = kGemmStep;
  static constexpr int kStages = hopper_stages(kRows);
  // Consumers are the block's first threads, as many as a block of gemm/ has: its runs, and lanes, are counted alike.
  static constexpr int kConsumers = kCols / kWgmmaRows * kWarpgroup, kThreads = kConsumers + kWarpgroup;
  static_assert(kConsumers == kGemmThreads && kCols == kWarpgroup);  // a producer brings a scale
  static constexpr int kConsumerWarps = kConsumers / kWarp, kProducerWarps = kWarpgroup / kWarp;
  // Products of 16 of the inner dimension in a step.
  static constexpr int kProducts = kStep / kWgmmaInner;
  static_assert(kStep * 2 == kSwizzledRowBytes);
};

// wgmma gives lane (g, t) of a consumer rows g and g + 8 of the warp's 16. They are columns 2g and 2g + 1 of the
// result, so that a lane has neighbours of it.
struct HopperLane : Lane {
  using Lane::Lane;
  // The first of its columns, and of its rows.
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
  // Of the weight both layouts (weights.cuh) have as many codes and scales.
  struct alignas(kSwizzledAlignment) Stage {
    T left[Tile::kRows * Tile::kStep];  // rows of X, or of U, as wgmma takes them
    std::uint8_t codes[Tile::kCols * Tile::kStep / 2];
    float scales[Tile::kCols];
  };
  Row rows[256];
  Stage stages[Tile::kStages];
  typename ScaleReader<true>::Levels levels;
  std::uint64_t full[Tile::kStages], empty[Tile::kStages];
  int run;  // the block's

  static constexpr std::uint32_t kLeftBytes = sizeof(Stage::left), kCodeBytes = sizeof(Stage::codes);
  // As in GemmShared: the table must begin at kRowsBegin.
  static __device__ HopperShared& of_block() {
    std::byte* const smem = dynamic_smem<std::byte>();
    const std::uint32_t before = SharedPlace(smem).to_rows();
    if (before > kGemmMostReservedSmem) trap();
    return *reinterpret_cast<HopperShared*>(smem + before);
  }
  static constexpr std::size_t bytes() {
    static_assert(kRowsBegin % kSwizzledAlignment == 0 && sizeof(rows) % kSwizzledAlignment == 0);
    constexpr std::size_t kBytes = kGemmMostReservedSmem + sizeof(HopperShared);
    static_assert(kBytes == hopper_smem_bytes(Tile::kRows));
    return kBytes;
  }
};

// A consumer's sums, in registers: of eight columns of wgmma's after the other {row 2g; row 2g + 1} x {2t, 2t + 1}.
template <class T, class Tile>
class HopperSums {
  static constexpr int kSums = Tile::kRows / 2, kVectors = kSums / 4;

 public:
  float sum[kSums];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& each : sum) each = 0.0f;
  }
  // Sets to zero what dropout drops. `row`, `col`: the lane's first of the result. Four lanes have the same rows, and
  // each two of eight columns whose random bits are one block: each lane makes the block of every fourth row, and they
  // exchange its words.
  __device__ void drop(const Dropout& dropout, std::int64_t row, std::int64_t col) {
    constexpr int kLaneRows = 2 * kVectors, kLanes = 4;
    static_assert(kLaneRows <= 64);
    const unsigned mine = HopperLane().g % kLanes;  // its word
    std::uint64_t kept[2] = {};                     // by row, of each column
#pragma unroll 1
    for (int first = kLaneRows - kLanes; first >= 0; first -= kLanes) {
      const int i = first + static_cast<int>(mine);
      const PhiloxBlock random = dropout_random(dropout.seed, row + row_of(i), col);
      kept[0] <<= kLanes;
      kept[1] <<= kLanes;
#pragma unroll
      for (unsigned apart = 0; apart < kLanes; ++apart) {
        const unsigned other = mine ^ apart;
        const std::uint32_t even = other & 2 ? random.word[2] : random.word[0];
        const std::uint32_t odd = other & 2 ? random.word[3] : random.word[1];
        const std::uint32_t word = shfl_xor(other & 1 ? odd : even, static_cast<int>(apart * 4));
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
  // To and from memory, as in GemmSums.
  __device__ void leave(float* of_run) const {
    float* const to = of_run + thread_index() * 4;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float* const s = sum + 4 * i;
      store_vector<float, 4>(to + i * Tile::kConsumers * 4, {{s[0], s[1], s[2], s[3]}});
    }
  }
  __device__ void add(const float* of_run) {
    const float* const from = of_run + thread_index() * 4;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto s = load_vector<float, 4>(from + i * Tile::kConsumers * 4);
#pragma unroll
      for (int part = 0; part < 4; ++part) sum[4 * i + part] += s.at[part];
    }
  }
  // Sum plus bias, rounded once, of the rows and columns that are there, counted from the lane's first. `out` and
  // `bias_of`: of that; a bias of null is none.
  __device__ void store(T* out, std::int64_t stride, const T* bias_of, std::int64_t rows, std::int64_t cols) const {
    if (cols <= 0) return;
    const int count = cols < 2 ? 1 : 2;
    float bias[2] = {};
    if (bias_of != nullptr) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j < count) bias[j] = to_f32(bias_of[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const T values[2] = {from_f32<T>(sum[4 * i + j] + bias[0]), from_f32<T>(sum[4 * i + 2 + j] + bias[1])};
        const int row = row_of(2 * i + j);
        if (row < rows) store_elements(out + row * stride, count, values);
      }
    }
  }

 private:
  // The lane's rows, from the first.
  static constexpr int row_of(int i) { return i / 2 * 8 + i % 2; }
};

}  // namespace qlora_native::QLN_CUDA
