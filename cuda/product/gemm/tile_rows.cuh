// Which rows of the result a tile of a tensor-core product has. Where each group of rows has its own weight, the number
// of tiles is not known until a block has read the offsets. The block then divides all steps anew, as every other block
// does.
#pragma once

#include "product/product.cuh"
#include "product/stream_k.cuh"

namespace qlora_native::QLN_CUDA {

// Without groups all of this is known beforehand. With groups a block keeps in memory what it has found.
template <bool kGrouped, int kRows>
class TileRows {
 public:
  __device__ explicit TileRows(const GemmArgs& args) : args_(args) {}

  __device__ const GemmConfig& config() const {
    if constexpr (kGrouped) return found().config;
    return args_.config;
  }
  // All threads call this, and meet after it, before any of them calls config().
  __device__ void prepare() const {
    if constexpr (kGrouped) {
      if (thread_index() >= kWarp) return;
      std::int64_t row_tiles = args_.config.row_tiles;
      if (args_.group_weights) row_tiles = find_row_tile<kRows>(args_.groups, args_.rows, kNoTile).count;
      if (thread_index() == 0) found().config = args_.config.with_row_tiles(row_tiles);
    }
  }
  // All threads call this when they go on to another tile.
  __device__ void go_to(std::int64_t tile) const {
    if constexpr (kGrouped) {
      sync_threads();  // no thread needs the tile before any more
      if (thread_index() < kWarp) {
        const std::int64_t i = tile % config().row_tiles;
        const RowTile rows = args_.group_weights
                                 ? find_row_tile<kRows>(args_.groups, args_.rows, static_cast<std::uint32_t>(i)).tile
                                 : RowTile{{i * kRows, args_.rows}, 0};
        if (thread_index() == 0) found().tile = rows;
      }
      sync_threads();
    }
  }
  // The tile that go_to() has found.
  __device__ const RowTile& tile() const { return found().tile; }
  __device__ int rows() const {
    const std::int64_t rest = tile().end - tile().begin;
    return rest < kRows ? static_cast<int>(rest) : kRows;
  }
  // A row's number in the tile, limited to 0 ... the number of rows that the tile has.
  __device__ int in_tile(std::int64_t row) const {
    const std::int64_t i = row - tile().begin;
    return i < 0 ? 0 : i < rows() ? static_cast<int>(i) : rows();
  }
  // How many elements of weights, or of biases, lie before those of the tile's group.
  __device__ std::int64_t weight_offset() const {
    if constexpr (kGrouped) return args_.weight_index(tile().group) * args_.weight_elements();
    return 0;
  }
  __device__ std::int64_t bias_offset() const {
    if constexpr (kGrouped) return args_.weight_index(tile().group) * args_.cols;
    return 0;
  }

 private:
  __device__ GroupedBlock& found() const { return args_.stream_k.blocks[block_index()]; }
  const GemmArgs& args_;
};

}  // namespace qlora_native::QLN_CUDA
