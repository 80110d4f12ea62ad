// The shape of a block's work in the product by wgmma (gemm.cuh), a lane's part of it, and its shared memory.
#pragma once

#include "device/elements.cuh"
#include "device/hopper.cuh"
#include "device/weight_chunk.cuh"
#include "product/config.h"
#include "product/tile.cuh"

namespace qlora_native::QLN_CUDA {

// A tile has kRows rows of the result, which are rows of X and wgmma's columns, by kCols columns, which are wgmma's
// rows. Two warpgroups compute it:
//
//   forward             64 columns each, and each of their warps 16
//   dX, kSharesSteps    the same columns, 32 a warp, and each half of every step of the inner dimension
//   dX, kSharesCols     two of four neighbouring columns each, because a lane has not registers enough for the sums of
//                       four columns by kGemmTallRows rows
template <int kRows_, bool kForward_>
struct HopperTile {
  static constexpr bool kForward = kForward_;
  static constexpr bool kSharesSteps = !kForward && hopper_shares_steps(kRows_),
                        kSharesCols = !kForward && !kSharesSteps;
  static constexpr int kRows = kRows_, kCols = kGemmCols, kStep = kGemmStep;
  static constexpr int kStages = hopper_stages(kRows);
  // Consumers are the block's first threads. They are as many as a block of gemm/ has, so that its runs and lanes serve
  // here too.
  static constexpr int kConsumers = kCols / kWgmmaRows * kWarpgroup, kThreads = kConsumers + kWarpgroup;
  static_assert(kConsumers == kGemmThreads);
  // Of the producers, one warp asks for tiles, some bring scales, and one is idle: registers are for four warps.
  static constexpr int kConsumerWarps = kConsumers / kWarp, kScaleWarps = 2;
  // The products of 16 of the inner dimension that a warpgroup has in a step: of 64 columns after the other.
  static constexpr int kColTiles = kSharesSteps ? 2 : 1, kInner = kStep / kColTiles;
  static constexpr int kInnerProducts = kInner / kWgmmaInner, kProducts = kColTiles * kInnerProducts;
  static_assert(kStep * 2 == kSwizzledRowBytes);
};

// All lanes of a warp have the same value. By this the compiler learns it, and computes what follows once for the warp.
template <class T>
__device__ __forceinline__ T warp_uniform(T value) {
  return shfl(value, 0);
}

// The part of a tile that a consumer has. wgmma gives lane (g, t) rows g and g + 8 of the warp's 16 of its operand a,
// and columns 2t and 2t + 1 of eight. Which columns of the result wgmma's rows are is free, so a lane has neighbours.
template <class Tile>
struct HopperLane : Lane {
  using Lane::Lane;
  static constexpr unsigned kCols = Tile::kForward ? 2 : 4;
  __device__ __forceinline__ unsigned warpgroup() const { return warp_uniform(warp / (kWarpgroup / kWarp)); }
  // Its first column, and its first row.
  __device__ __forceinline__ unsigned col() const {
    return (Tile::kForward ? warp : warp % (kWarpgroup / kWarp)) * 8 * kCols + kCols * g;
  }
  __device__ __forceinline__ unsigned row() const { return 2 * t; }
  // Its first row of the result that it stores.
  __device__ __forceinline__ unsigned row_of_result() const { return row() + (Tile::kForward ? 0 : 8 * warpgroup()); }
  // Its warpgroup's part of a step begins here.
  __device__ __forceinline__ unsigned first_inner() const {
    return Tile::kSharesSteps ? warpgroup() * Tile::kInner : 0;
  }
  // Register i of the operand a of a step's p-th product has two elements of the inner dimension, from this one of the
  // step on, for this of the lane's columns.
  __device__ __forceinline__ unsigned inner(unsigned p, unsigned i) const {
    return first_inner() + p % Tile::kInnerProducts * kWgmmaInner + i / 2 * 8 + 2 * t;
  }
  __device__ __forceinline__ unsigned col_of(unsigned p, unsigned i) const {
    if constexpr (Tile::kForward) return i % 2;
    return 2 * (Tile::kSharesSteps ? p / Tile::kInnerProducts : warpgroup()) + i % 2;
  }
};

template <class T, class Tile>
struct HopperShared {
  using Table = PairTable<16, kRowBytes / sizeof(Vector<float, 2>)>;
  static constexpr int kScratchWords = 32, kScratchVectors = kScratchWords / 4;
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
  std::uint64_t sums[kHopperMostTurns];  // the barriers at which the sums of a cluster's blocks arrive
  int run;                               // the block's

  // A word, or a vector of four, of a consumer's scratch memory is here. Those of neighbouring lanes lie in different
  // banks.
  __device__ __forceinline__ SharedAddress scratch(unsigned thread, unsigned word) {
    return SharedAddress(&rows[thread].scratch[(word + thread) % kScratchWords]);
  }
  __device__ __forceinline__ SharedAddress scratch_vector(unsigned thread, unsigned i) {
    return SharedAddress(&rows[thread].scratch[(i + thread) % kScratchVectors * 4]);
  }

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

}  // namespace qlora_native::QLN_CUDA
