// The shape of a block's work in the tensor-core product (gemm.cuh): what part of the tile a lane has, and how a step
// of the left operand lies in shared memory.
#pragma once

#include "gemm_config.h"
#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kGemmWarps = 8;
constexpr int kGemmThreads = kGemmWarps * kWarp;

// kRows x kCols of the result; a warp has all the rows of its share of the columns, so that every weight is decoded by
// one warp, once. kCopies: of the table of codes (PairTable).
template <int kRows_, int kCols_, int kCopies_, bool kAligned_>
struct GemmTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kCopies = kCopies_;
  static constexpr bool kAligned = kAligned_;
  static constexpr bool kWide = kCols == kGemmWideCols;
  static_assert(kWide || kCols == kGemmCols);
  // Blocks that a multiprocessor holds, and stages of each: the sums of the wide tile take half of all its registers.
  static constexpr int kBlocks = kWide ? kGemmWideBlocks : kGemmBlocks;
  static constexpr int kStages = kWide ? 3 : 4;

  // mma multiplies 16 columns of the result by 8 of its rows.
  static constexpr int kWarpCols = kCols / kGemmWarps;
  static constexpr int kFragments = kWarpCols / kMmaRows, kRowFragments = kRows / kMmaCols;
  static constexpr int kLaneCols = 2 * kFragments;

  // Of a step's weights a thread brings pieces of 32 codes, 16 bytes, and one scale, which is that of so many codes.
  static constexpr int kScaled = kCols * kGemmStep / kGemmThreads;
  static constexpr int kPieces = kScaled / kGemmChunk;
  static_assert(kScaled == (kWide ? kGemmStep : kGemmChunk));
};

// What is lane (g, t)'s, with g = lane / 4 and t = lane % 4. mma gives it columns g and g + 8 of each fragment, and
// rows 2t and 2t + 1. Which columns of the tile those are is free, and so is what of a step's inner dimension mma takes
// for its own; they are dealt out so that a lane has neighbours:
//
//   columns g, g + 8 of fragment f   columns kLaneCols * g + {2f, 2f + 1} of the warp's
//   the inner dimension              16t ... 16t + 15 of the step: two 16-byte vectors of a row of the left operand, of
//                                    which the q-th mma takes 16t + 4q + {0, 1} for its 2t, 2t + 1 and {2, 3} for + 8
struct Lane {
  unsigned thread, warp, g, t;
  // Made anew for each part of a tile: what is computed from it must not fill registers in the others.
  __device__ __forceinline__ Lane()
      : thread(kept(static_cast<std::uint32_t>(thread_index()))),
        warp(thread / kWarp),
        g(thread % kWarp / 4),
        t(thread % 4) {}
  // The first of its columns; the first of its rows in the fragment of rows `i`.
  template <class Tile>
  __device__ __forceinline__ unsigned col() const {
    return warp * Tile::kWarpCols + Tile::kLaneCols * g;
  }
  __device__ __forceinline__ unsigned row(unsigned i = 0) const { return i * kMmaCols + 2 * t; }
};
constexpr unsigned kLaneInner = 16;

// Parts of a stage begin at multiples of this, so that a place within one is turned to another by flipping bits.
constexpr int kStageAlignment = 128;

}  // namespace qlora_native::QLN_CUDA
