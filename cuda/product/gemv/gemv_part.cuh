// Which part of the product of up to eight rows (gemv.cu) a block computes.
#pragma once

#include "product/product.cuh"

namespace qlora_native::QLN_CUDA {

struct GemvArgs : Product {
  WeightScales scales;
  std::uint32_t last_chunk;  // of an aligned weight
};

// The part that a block computes at a time: some columns of the result, in up to kGemvRows rows.
template <class T, bool kGrouped>
class GemvPart {
 public:
  __device__ explicit GemvPart(const GemvArgs& args)
      : args_(args), stride_(grid_blocks() * kGemvCols), rows_(static_cast<int>(args.x.rows)) {}
  __device__ bool next() { return false; }  // the block has no other part

  __device__ std::int64_t begin() const { return block_index() * kGemvCols; }
  __device__ std::int64_t end() const { return args_.weight.N; }
  __device__ std::int64_t stride() const { return stride_; }
  __device__ int rows() const { return rows_; }
  __device__ const T* x() const { return static_cast<const T*>(args_.x.data); }
  __device__ const T* u() const { return static_cast<const T*>(args_.u.data); }
  __device__ T* out() const { return static_cast<T*>(args_.out.data); }
  __device__ std::int64_t weight_offset() const { return 0; }  // elements of the weights of groups before
  __device__ std::int64_t bias_offset() const { return 0; }

 private:
  const GemvArgs& args_;
  const std::int64_t stride_;
  const int rows_;
};

// With groups, a block has a slice of the columns of all tiles of rows, tile after tile.
template <class T>
class GemvPart<T, true> {
 public:
  __device__ explicit GemvPart(const GemvArgs& args) : args_(args), tile_parts_(ceil_div(args.cols, kGemvCols)) {
    const std::int64_t tiles = args.group_weights ? find_row_tile<kGemvRows>(args.groups, args.rows, kNoTile).count : 1;
    const std::int64_t all = tiles * tile_parts_, parts_per_block = all / grid_blocks(), rest = all % grid_blocks();
    const std::int64_t i = block_index();
    next_ = i * parts_per_block + (i < rest ? i : rest);
    end_of_slice_ = next_ + parts_per_block + (i < rest ? 1 : 0);
  }
  // Goes on to the next tile that the block has columns of, and to the first one at the beginning; false where there is
  // none.
  __device__ bool next() {
    if (next_ == end_of_slice_) return false;
    tile_ = {{0, args_.rows}, 0};
    if (args_.group_weights) {
      tile_ = find_row_tile<kGemvRows>(args_.groups, args_.rows, static_cast<std::uint32_t>(next_ / tile_parts_)).tile;
    }
    begin_ = next_ % tile_parts_ * kGemvCols;
    const std::int64_t last = begin_ + (end_of_slice_ - next_) * kGemvCols;
    end_ = last < args_.cols ? last : args_.cols;
    next_ += ceil_div(end_ - begin_, kGemvCols);
    rows_ = tile_.end - tile_.begin < kGemvRows ? static_cast<int>(tile_.end - tile_.begin) : kGemvRows;
    x_ = row0_of(args_.x);
    weight_offset_ = args_.weight_index(tile_.group) * args_.weight_elements();
    return true;
  }

  __device__ const RowTile& tile() const { return tile_; }
  __device__ std::int64_t begin() const { return begin_; }
  __device__ std::int64_t end() const { return end_; }
  __device__ std::int64_t stride() const { return kGemvCols; }
  __device__ int rows() const { return rows_; }
  __device__ const T* x() const { return x_; }
  __device__ const T* u() const { return row0_of(args_.u); }
  __device__ T* out() const { return static_cast<T*>(args_.out.data) + tile_.begin * args_.out.stride; }
  __device__ std::int64_t weight_offset() const { return weight_offset_; }
  __device__ std::int64_t bias_offset() const { return args_.weight_index(tile_.group) * args_.cols; }

 private:
  __device__ const T* row0_of(const ConstMatrix& matrix) const {
    return static_cast<const T*>(matrix.data) + tile_.begin * matrix.stride;
  }

  const GemvArgs& args_;
  const std::int64_t tile_parts_;
  std::int64_t next_, end_of_slice_;  // counted over all tiles
  std::int64_t begin_ = 0, end_ = 0;
  RowTile tile_{};
  int rows_ = 0;
  const T* x_ = nullptr;
  std::int64_t weight_offset_ = 0;
};

}  // namespace qlora_native::QLN_CUDA
