// Which tiles, and which of their steps, a block of the product by wgmma (gemm.cuh) computes.
#pragma once

#include "product/stream_k.cuh"
#include "product/wgmma/tile.cuh"

namespace qlora_native::QLN_CUDA {

struct WgmmaArgs : GemmArgs {
  WgmmaArgs(const Product& product, const WgmmaConfig& config, const StreamKMemory& memory)
      : GemmArgs(product, config.gemm, memory), cluster(config.cluster), pairs(config.pairs ? 1 : 0) {}

  int cluster;  // as WgmmaConfig has it
  int pairs;    // 1 or 0: two tiles, or one, belong to a cluster of blocks
};

// Keeps a value in a register, so that it is not computed anew at each step, by divisions.
__device__ __forceinline__ int in_int_register(int value) {
  return static_cast<int>(in_register(static_cast<std::uint32_t>(value)));
}

// The blocks of a cluster follow each other in the grid: those of a tile, and then those of the pair's other tile.
// `block_rank` is the block's rank in its cluster.
template <class Tile>
class WgmmaSchedule {
 public:
  __device__ WgmmaSchedule(const WgmmaArgs& args)
      : args_(args), stream_k_(args.config, args.stream_k), block_rank_(in_int_register(rank_of_block(args))) {}

  __device__ int take_run() const { return stream_k_.take_run(); }
  // The part that follows the first `done` steps of the block, whose run of stream-K is `run`; it has no steps if
  // there is none.
  __device__ __forceinline__ TilePart part_after(const int& run, std::uint32_t done) const {
    const GemmConfig& config = args_.config;
    if (args_.cluster == 0) return stream_k_.part_after(run, done);
    // The blocks of a tile share its steps in the order of their ranks.
    const int rank = rank_in_tile();
    const int first = rank * config.steps / args_.cluster;
    const int count = (rank + 1) * config.steps / args_.cluster - first;
    const std::int64_t tile = (block_index() + done / count * config.blocks) / args_.cluster;
    return {0, tile, first, tile < config.tiles ? count : 0, false};
  }
  __device__ __forceinline__ int block_rank() const { return block_rank_; }
  __device__ __forceinline__ int tile_in_pair() const {
    return args_.pairs != 0 && block_rank_ >= args_.cluster ? 1 : 0;
  }
  __device__ __forceinline__ int rank_in_tile() const { return block_rank_ - tile_in_pair() * args_.cluster; }
  // The rank of the block that has the same steps of the pair's other tile.
  __device__ __forceinline__ int peer_rank() const { return block_rank_ ^ args_.cluster; }
  // The coordinates of TMA have 32 bits. Tiles are counted down the rows, and in pairs two by two.
  __device__ __forceinline__ int row0(const TilePart& part) const {
    return static_cast<int>((part.tile >> args_.pairs) % args_.config.row_tiles) * Tile::kRows;
  }
  __device__ __forceinline__ int col0(const TilePart& part) const {
    const auto cols = static_cast<int>((part.tile >> args_.pairs) / args_.config.row_tiles);
    return (cols << args_.pairs | (static_cast<int>(part.tile) & args_.pairs)) * Tile::kCols;
  }
  // The rank of the adapter that a part multiplies by: its steps are a tile's first.
  __device__ __forceinline__ int lora_rank(const TilePart& part) const {
    return part.first == 0 ? static_cast<int>(args_.u.cols) : 0;
  }
  // The block that has the tile's beginning completes it: whether this one does.
  template <class Accumulators, class Sync>
  __device__ __forceinline__ bool complete_tile(const TilePart& part, Accumulators& accumulators,
                                                const Sync& sync) const {
    return stream_k_.complete_tile<Tile::kRows * Tile::kCols>(part, accumulators, sync);
  }

 private:
  __device__ __forceinline__ static int rank_of_block(const WgmmaArgs& args) {
    return args.cluster == 0 ? 0 : static_cast<int>(block_index() % (args.cluster << args.pairs));
  }

  const WgmmaArgs& args_;
  const StreamK stream_k_;
  const int block_rank_;
};

}  // namespace qlora_native::QLN_CUDA
