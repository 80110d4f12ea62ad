// Which rows of the result a tile of a tensor-core product has. Where each group of rows has a weight of its own, how
// many tiles there are is known when a block has read the offsets: then it shares out all steps anew, as every other
// block does.
#pragma once

#include "product/gemm/runs.cuh"
#include "product/product.cuh"

namespace qlora_native::QLN_CUDA {

// Of a product without groups all is known beforehand. A block of one with groups keeps in memory what it found.
template <bool kGroups, int kRows>
class TileRows {
 public:
  __device__ explicit TileRows(const GemmArgs& args) : args_(args) {}

  __device__ const GemmConfig& config() const {
    if constexpr (kGroups) return found().config;
    return args_.config;
  }
  // Called by all threads, before anyone asks for the config. They meet after it.
  __device__ void prepare() const {
    if constexpr (kGroups) {
      if (thread_index() >= kWarp) return;
      std::int64_t row_tiles = args_.config.row_tiles;
      if (args_.own_weights) row_tiles = find_row_tile<kRows>(args_.groups, args_.rows, kNoTile).before;
      if (thread_index() == 0) found().config = args_.config.with_row_tiles(row_tiles);
    }
  }
  // Called by all threads when they go on to another tile.
  __device__ void go_to(std::int64_t tile) const {
    if constexpr (kGroups) {
      sync_threads();  // the one before is not needed any more
      if (thread_index() < kWarp) {
        const std::int64_t i = tile % config().row_tiles;
        const RowTile rows = args_.own_weights
                                 ? find_row_tile<kRows>(args_.groups, args_.rows, static_cast<std::uint32_t>(i)).tile
                                 : RowTile{{i * kRows, args_.rows}, 0};
        if (thread_index() == 0) found().tile = rows;
      }
      sync_threads();
    }
  }
  // Where they find it afterwards.
  __device__ const RowTile& tile() const { return found().tile; }
  __device__ int rows() const {
    const std::int64_t there = tile().end - tile().begin;
    return there < kRows ? static_cast<int>(there) : kRows;
  }
  // A row's number in the tile, from 0 to how many it has.
  __device__ int in_tile(std::int64_t row) const {
    const std::int64_t i = row - tile().begin;
    return i < 0 ? 0 : i < rows() ? static_cast<int>(i) : rows();
  }
  // How many elements, or elements of the bias, lie before the tile's weight, or bias.
  __device__ std::int64_t weights_before() const {
    if constexpr (kGroups) return args_.weight_of(tile().group) * args_.elements_of_weight();
    return 0;
  }
  __device__ std::int64_t biases_before() const {
    if constexpr (kGroups) return args_.weight_of(tile().group) * args_.cols;
    return 0;
  }

 private:
  __device__ GroupedBlock& found() const { return args_.shared_sums.of_blocks[block_index()]; }
  const GemmArgs& args_;
};

}  // namespace qlora_native::QLN_CUDA
