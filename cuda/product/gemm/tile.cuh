// The shape of a block's work in the tensor-core product (gemm.cuh): what part of the tile a warp has, and a lane.
#pragma once

#include "device/weight_chunk.cuh"
#include "product/config.h"
#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kGemmWarps = 8;
constexpr int kGemmThreads = kGemmWarps * kWarp;

// kRows x kCols of the result.
template <int kRows_, int kCols_, bool kAligned_>
struct GemmTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kStep = kGemmStep;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kBlocks = gemm_blocks(kRows), kStages = gemm_stages(kRows);

  // Warps share the tile's rows and its columns: what one has is as near to a square as it can be, so that the
  // operands of many products are loaded once.
  static constexpr int kRowWarps = kRows == kGemmTallRows ? 4 : kRows == kGemmFewRows ? 1 : 2;
  static constexpr int kColWarps = kGemmWarps / kRowWarps;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpCols = kCols / kColWarps;
  // mma multiplies 16 rows of the result by 8 of its columns.
  static constexpr int kRowFragments = kWarpRows / kMmaRows, kColFragments = kWarpCols / kMmaCols;
  // A lane has two columns of each fragment. Those of four fragments, or of both where there are two, are neighbours.
  static constexpr int kGroup = kColFragments < 4 ? kColFragments : 4;
  static constexpr int kGroups = kColFragments / kGroup;
  static constexpr int kLaneCols = 2 * kGroup;
  static constexpr int kGroupCols = kMmaCols * kGroup;

  // Of a step's weights a thread brings, and decodes, so many neighbours with one scale: pieces of 32, each 16 bytes of
  // codes.
  static constexpr int kThreadWeights = kCols * kGemmStep / kGemmThreads, kPieces = kThreadWeights / kChunk;
  static_assert(kPieces == 1 || (kPieces == 2 && kAligned));
};

// What is lane (g, t)'s, with g = lane / 4 and t = lane % 4. Of the result mma gives it rows g and g + 8 of each
// fragment, and columns 2t and 2t + 1. Which columns of the tile those are is free; they are dealt out so that a lane
// has neighbours: of the f-th fragment of a group, kLaneCols * t + {2f, 2f + 1} of the group's.
struct Lane {
  unsigned thread, warp, lane, g, t;
  // Made anew for each part of a tile: what is computed from it must not fill registers in the others.
  __device__ __forceinline__ Lane() : Lane(kept(static_cast<std::uint32_t>(thread_index()))) {}
  __device__ __forceinline__ explicit Lane(unsigned thread)
      : thread(thread), warp(thread / kWarp), lane(thread % kWarp), g(lane / 4), t(thread % 4) {}
  // Where the warp's part of the tile begins.
  template <class Tile>
  __device__ __forceinline__ unsigned warp_row() const {
    return warp / Tile::kColWarps * Tile::kWarpRows;
  }
  template <class Tile>
  __device__ __forceinline__ unsigned warp_col() const {
    return warp % Tile::kColWarps * Tile::kWarpCols;
  }
  // The first of its rows and columns.
  template <class Tile>
  __device__ __forceinline__ unsigned row() const {
    return warp_row<Tile>() + g;
  }
  template <class Tile>
  __device__ __forceinline__ unsigned col() const {
    return warp_col<Tile>() + Tile::kLaneCols * t;
  }
};

// Rows of what ldmatrix reads are cut into vectors of 16 bytes, and lie in lines of at least 128, which begin at
// multiples of 128: vectors change places by flipping bits of an address.
constexpr int kStageAlignment = 128;

}  // namespace qlora_native::QLN_CUDA
