// The shape of a block's work in the tensor-core product (gemm.cuh): how it goes through the weight, which part of a
// tile a warp has, and which a lane has.
#pragma once

#include "device/simt.cuh"
#include "device/weight_chunk.cuh"
#include "product/config.h"

namespace qlora_native::QLN_CUDA {

// How a product goes through the weight: a column of the result is one of its rows (forward) or one of its columns
// (backward). element() is the number of the weight's element that stands at a place of W' (product.cuh),
// and that of the next step's element is larger by step().
struct ByRows {
  static constexpr bool kForward = true;
  static QLN_HOST_DEVICE std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return col * w.K + inner;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView&) { return kGemmStep; }
};
struct ByColumns {
  static constexpr bool kForward = false;
  static QLN_HOST_DEVICE std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return inner * w.K + col;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView& w) { return kGemmStep * w.K; }
};

constexpr int kGemmWarps = 8;
constexpr int kGemmThreads = kGemmWarps * kWarp;

// A tile is kRows x kCols of the result.
template <int kRows_, int kCols_, bool kAligned_>
struct GemmTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kStep = kGemmStep;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kBlocks = gemm_blocks_per_sm(kRows), kStages = gemm_stages(kRows);

  // Warps share the tile's rows and columns. A warp's part is as near to a square as it can be, so that each operand
  // that it loads is used in many products.
  static constexpr int kRowWarps = kRows == 256 ? 4 : kRows == 16 ? 1 : 2;
  static constexpr int kColWarps = kGemmWarps / kRowWarps;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpCols = kCols / kColWarps;
  // mma multiplies 16 rows of the result by 8 of its columns.
  static constexpr int kRowFragments = kWarpRows / kMmaRows, kColFragments = kWarpCols / kMmaCols;
  // A lane has two columns of each fragment. Its columns of a group of four fragments, or of both where there are two,
  // are adjacent.
  static constexpr int kGroupFragments = kColFragments < 4 ? kColFragments : 4;
  static constexpr int kFragmentGroups = kColFragments / kGroupFragments;
  static constexpr int kLaneCols = 2 * kGroupFragments;
  static constexpr int kGroupCols = kMmaCols * kGroupFragments;

  // How many of a step's weights a thread copies and decodes. They are adjacent and share a scale, in chunks of 32,
  // each of which has 16 bytes of codes.
  static constexpr int kThreadWeights = kCols * kGemmStep / kGemmThreads, kThreadChunks = kThreadWeights / kChunk;
  static_assert(kThreadChunks == 1 || (kThreadChunks == 2 && kAligned));
};

// The part of a tile that lane (g, t) has, with g = lane / 4 and t = lane % 4. mma gives the lane rows g and g + 8, and
// columns 2t and 2t + 1, of each fragment of the result. Which columns of the tile these are is free, so they are
// distributed so that a lane's are adjacent: in the f-th fragment of a group, columns kLaneCols * t + {2f, 2f + 1} of
// the group.
struct Lane {
  unsigned thread, warp, lane, g, t;
  // A Lane is computed anew for each part of a tile, so that what follows from it fills no registers in the other
  // parts.
  __device__ __forceinline__ Lane() : Lane(in_register(static_cast<std::uint32_t>(thread_index()))) {}
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
  // The lane's first row, and its first column.
  template <class Tile>
  __device__ __forceinline__ unsigned row() const {
    return warp_row<Tile>() + g;
  }
  template <class Tile>
  __device__ __forceinline__ unsigned col() const {
    return warp_col<Tile>() + Tile::kLaneCols * t;
  }
};

// Rows that ldmatrix reads are cut into vectors of 16 bytes. They lie in lines of 128 bytes or more, which begin at
// multiples of 128, so that vectors are swizzled by xor of an address.
constexpr int kStageAlignment = 128;

}  // namespace qlora_native::QLN_CUDA
