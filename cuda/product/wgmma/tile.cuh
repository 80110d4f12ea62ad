// The shape of a block's work in the product by wgmma (gemm.cuh), and a lane's part of it.
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
//   dX, kSplitsSteps    the same columns, 32 a warp, and each half of every step of the inner dimension
//   dX, kSplitsCols     two of four adjacent columns each, because a lane has not registers enough for the accumulators
//                       of four columns by 256 rows
template <int kRows_, bool kForward_>
struct WgmmaTile {
  static constexpr bool kForward = kForward_;
  static constexpr bool kSplitsSteps = !kForward && wgmma_splits_steps(kRows_),
                        kSplitsCols = !kForward && !kSplitsSteps;
  static constexpr int kRows = kRows_, kCols = kTileCols, kStep = kGemmStep;
  static constexpr int kStages = wgmma_stages(kRows);
  // Consumers are the block's first threads. They are as many as a block of gemm/ has, so that stream_k.cuh and Lane
  // serve here too.
  static constexpr int kConsumers = kCols / kWgmmaRows * kWarpgroup, kThreads = kConsumers + kWarpgroup;
  static_assert(kConsumers == kGemmThreads);
  // One warp of producers issues TMA's loads, some load scales, and one is idle: registers are for four warps.
  static constexpr int kConsumerWarps = kConsumers / kWarp, kScaleWarps = 2;
  // The products of 16 of the inner dimension that a warpgroup has in a step: of 64 columns after the other.
  static constexpr int kColTiles = kSplitsSteps ? 2 : 1, kInner = kStep / kColTiles;
  static constexpr int kInnerProducts = kInner / kWgmmaInner, kProducts = kColTiles * kInnerProducts;
  static_assert(kStep * 2 == kSwizzledRowBytes);
};

// A value that all lanes of a warp share. By this the compiler learns it, and computes what follows once for the warp.
template <class T>
__device__ __forceinline__ T warp_uniform(T value) {
  return shfl(value, 0);
}

// The part of a tile that a consumer has. wgmma gives lane (g, t) rows g and g + 8 of the warp's 16 of its operand a,
// and columns 2t and 2t + 1 of eight. Which columns of the result wgmma's rows are is free, so a lane has adjacent
// ones.
template <class Tile>
struct WgmmaLane : Lane {
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
    return Tile::kSplitsSteps ? warpgroup() * Tile::kInner : 0;
  }
  // Register i of the operand a of a step's p-th product has two elements of the inner dimension, from this one of the
  // step on, for this of the lane's columns.
  __device__ __forceinline__ unsigned inner(unsigned p, unsigned i) const {
    return first_inner() + p % Tile::kInnerProducts * kWgmmaInner + i / 2 * 8 + 2 * t;
  }
  __device__ __forceinline__ unsigned col_of(unsigned p, unsigned i) const {
    if constexpr (Tile::kForward) return i % 2;
    return 2 * (Tile::kSplitsSteps ? p / Tile::kInnerProducts : warpgroup()) + i % 2;
  }
};

// Goes through the stages in order. `parity` is the last bit of how often it has passed all of them.
template <class Tile>
struct StageRing {
  std::uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    const bool wraps = stage == Tile::kStages - 1;
    stage = wraps ? 0 : stage + 1;
    if (wraps) parity ^= 1;
  }
};

}  // namespace qlora_native::QLN_CUDA
