// The adapter's own products: U = drop(X) . A^T / (1-p) and V = s/(1-p) * dY . B, each [M, rank], and the gradients
// dA = V^T . drop(X) and dB = s * dY^T . U, sums over M. All are long sums for few results, so several blocks share the
// sum of a tile, and another kernel adds their parts in one order.
#pragma once

#include "product/config.h"
#include "product/general.cuh"
#include "product/sources.cuh"

namespace qlora_native::QLN_CUDA {

// out(i, j) = scale * sum over k of left(i, k) * right(j, k), rounded; or, where several blocks share a tile's k, the
// sum over each block's part of them, one [rows, cols] after the other.
template <class Left, class Right>
__global__ void __launch_bounds__(kProductThreads, 2)
    low_rank_kernel(const Left left, const Right right, std::int64_t inner, float scale, const Matrix out,
                    const LowRankSplit split, float* parts) {
  const ProductPlace<typename Left::Element> place(out.rows, out.cols, block_index() / split.parts);
  const std::int64_t part = block_index() % split.parts, begin = part * split.length;
  ProductSums sum = {};
  accumulate(sum, place, prepared(left), prepared(right), inner - begin < split.length ? inner : begin + split.length,
             begin);
  place.each(sum, [&](std::int64_t i, std::int64_t j, float s) {
    if (split.parts == 1) {
      store_from_f32(out.data, out.dtype, i * out.stride + j, s * scale);
    } else {
      parts[(part * out.rows + i) * out.cols + j] = s;
    }
  });
}

// The parts' sum, in their order.
template <class T>
__global__ void __launch_bounds__(kProductThreads)
    low_rank_sum_kernel(const float* parts, int count, float scale, const Matrix out) {
  const std::int64_t step = grid_blocks() * kProductThreads, all = out.rows * out.cols;
  for (std::int64_t e = block_index() * kProductThreads + thread_index(); e < all; e += step) {
    float sum = 0.0f;
    for (int part = 0; part < count; ++part) sum += parts[part * all + e];
    static_cast<T*>(out.data)[e / out.cols * out.stride + e % out.cols] = from_f32<T>(sum * scale);
  }
}

template <class Left, class Right>
void low_rank_product(const Left& left, const Right& right, std::int64_t inner, float scale, const Matrix& out,
                      const Stream& stream) {
  LaunchShape shape = product_grid<typename Left::Element>(out.rows, out.cols);
  const LowRankSplit split = low_rank_split(shape.blocks, inner, multiprocessors(stream));
  shape.blocks *= split.parts;
  const std::int64_t sums = split.parts == 1 ? 0 : split.parts * out.rows * out.cols;
  const Workspace workspace(static_cast<std::size_t>(sums) * sizeof(float), stream);
  float* const parts = reinterpret_cast<float*>(workspace.data());
  launch<low_rank_kernel<Left, Right>>(shape, stream, left, right, inner, scale, out, split, parts);
  if (split.parts == 1) return;
  with_type(out.dtype, [&]<class T>() {
    launch<low_rank_sum_kernel<T>>(looping_grid(out.rows * out.cols, kProductThreads, stream), stream, parts,
                                   split.parts, scale, out);
  });
}

// U or V of a call: the caller's, where it wants to have it, or one in a workspace.
class LowRank {
 public:
  LowRank(const Matrix& wanted, DType dtype, std::int64_t rows, std::int64_t rank, const Stream& stream)
      : workspace_(wanted.data != nullptr ? 0 : static_cast<std::size_t>(rows * rank) * size_of(dtype), stream),
        matrix_(wanted.data != nullptr ? wanted : Matrix{workspace_.data(), dtype, rows, rank, rank}) {}
  const Matrix& matrix() const { return matrix_; }
  ConstMatrix read_only() const { return {matrix_.data, matrix_.dtype, matrix_.rows, matrix_.cols, matrix_.stride}; }

 private:
  const Workspace workspace_;
  const Matrix matrix_;
};

}  // namespace qlora_native::QLN_CUDA
