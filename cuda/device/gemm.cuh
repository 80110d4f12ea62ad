// The product with a quantized weight on tensor cores, forward and backward: README.md follows a tile through it.
//
//   out[rows, cols] = low_rank[rows, rank] . R[rank, cols]  +  left[rows, inner] . W'[inner, cols]  + bias
//
//             left    low_rank   W'     R              the columns of out are
//   forward   X       U          W^T    (s*B)^T        rows of W     (WeightRowsOfTile)
//   backward  dY      V          W      A              columns of W  (WeightColumnsOfTile)
#pragma once

#include "device/gemm_block.cuh"
#include "device/problem.cuh"

namespace qlora_native::QLN_CUDA {

template <class T, class Weights, class Tile>
using GemmSharedOf = GemmShared<T, typename Weights::template Of<Tile>, Tile>;

template <class T, class Weights, class Tile>
__global__ void __launch_bounds__(kGemmThreads, Tile::kBlocks) gemm_kernel(const __grid_constant__ GemmArgs args) {
  Gemm<T, typename Weights::template Of<Tile>, Tile> gemm(args, GemmSharedOf<T, Weights, Tile>::of_block());
  gemm.prepare();
  gemm.run();
}

// ---- on the host ----

// `args`: without what is filled in here.
template <class Weights>
void gemm(GemmArgs args, const Stream& stream) {
  args.scales = scales_of(args.weight);
  args.last_chunk = last_chunk_of(args.weight);
  args.low_rank_vectors = rows_are_vectors(args.low_rank, args.low_rank.cols);
  const GemmConfig& config = args.config;
  const int blocks = config.blocks;
  if (blocks == 0) return;

  // The flags come last, behind sums that are a whole number of vectors.
  const auto sums = static_cast<std::size_t>(blocks) * config.tile_rows * config.tile_cols * sizeof(float);
  const std::size_t flags = static_cast<std::size_t>(blocks) * sizeof(std::uint32_t);
  const Workspace workspace(config.splits_a_tile() ? sums + flags : 0, stream);
  if (config.splits_a_tile()) {
    args.sums = reinterpret_cast<float*>(workspace.data());
    args.ready = reinterpret_cast<std::uint32_t*>(workspace.data() + sums);
    fill_bytes(args.ready, 0, flags, stream);
  }
  const auto start = [&]<class T, int kRows, int kCols, bool kAligned>() {
    using Tile = GemmTile<kRows, kCols, kAligned>;
    launch<gemm_kernel<T, Weights, Tile>>({blocks, kGemmThreads, GemmSharedOf<T, Weights, Tile>::bytes()}, stream,
                                          args);
  };
  // What gemm_config chooses among.
  const auto start_tile = [&]<class T>() {
    if (config.tile_cols == kGemmWideCols) return start.template operator()<T, kGemmManyRows, kGemmWideCols, true>();
    switch (config.tile_rows) {
      case kGemmTallRows:
        return start.template operator()<T, kGemmTallRows, kGemmCols, true>();
      case kGemmManyRows:
        return start.template operator()<T, kGemmManyRows, kGemmCols, true>();
      case kGemmMiddleRows:
        if (config.aligned) return start.template operator()<T, kGemmMiddleRows, kGemmCols, true>();
        return start.template operator()<T, kGemmMiddleRows, kGemmCols, false>();
      case kGemmFewRows:
        if (config.aligned) return start.template operator()<T, kGemmFewRows, kGemmCols, true>();
        return start.template operator()<T, kGemmFewRows, kGemmCols, false>();
    }
  };
  if (args.left.dtype == DType::bf16) {
    start_tile.template operator()<Bf16>();
  } else {
    start_tile.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
