// The low-rank halves of an adapter: U = drop(X) . A^T / (1-p) and V = s/(1-p) * dY . B, each [M, rank].
#pragma once

#include "device/product.cuh"
#include "device/sources.cuh"
#include "gemm_config.h"

namespace qlora_native::QLN_CUDA {

// out(i, j) = scale * sum over k of left(i, k) * right(j, k), rounded to T; or, where several blocks share a tile's k,
// the sum over each block's part of them, one [rows, cols] after the other.
template <class T, class Left, class Right>
__global__ void __launch_bounds__(kProductThreads)
    low_rank_kernel(const Left left, const Right right, std::int64_t rows, std::int64_t cols, std::int64_t inner,
                    float scale, T* out, std::int64_t stride, const LowRankSplit split, float* parts) {
  const ProductPlace place(rows, cols, block_index() / split.parts);
  const std::int64_t part = block_index() % split.parts, begin = part * split.length;
  float sum[kProductOwn][kProductOwn] = {};
  accumulate(sum, place, prepared(left), prepared(right), inner - begin < split.length ? inner : begin + split.length,
             begin);
  place.each(sum, [&](std::int64_t i, std::int64_t j, float s) {
    if (split.parts == 1) {
      out[i * stride + j] = from_f32<T>(s * scale);
    } else {
      parts[(part * rows + i) * cols + j] = s;
    }
  });
}

// The parts' sum, in their order.
template <class T>
__global__ void __launch_bounds__(kProductThreads)
    low_rank_sum_kernel(const float* parts, int count, std::int64_t rows, std::int64_t cols, float scale, T* out,
                        std::int64_t stride) {
  const std::int64_t step = grid_blocks() * kProductThreads;
  for (std::int64_t e = block_index() * kProductThreads + thread_index(); e < rows * cols; e += step) {
    float sum = 0.0f;
    for (int part = 0; part < count; ++part) sum += parts[part * rows * cols + e];
    out[e / cols * stride + e % cols] = from_f32<T>(sum * scale);
  }
}

template <class T, class Left, class Right>
void low_rank_product(const Left& left, const Right& right, std::int64_t rows, std::int64_t cols, std::int64_t inner,
                      float scale, const Matrix& out, const Stream& stream) {
  LaunchShape shape = product_grid(rows, cols);
  const LowRankSplit split = low_rank_split(shape.blocks, inner, multiprocessors(stream));
  shape.blocks *= split.parts;
  const std::int64_t sums = split.parts == 1 ? 0 : split.parts * rows * cols;
  const Workspace workspace(static_cast<std::size_t>(sums) * sizeof(float), stream);
  float* const parts = reinterpret_cast<float*>(workspace.data());
  T* const to = static_cast<T*>(out.data);
  launch<low_rank_kernel<T, Left, Right>>(shape, stream, left, right, rows, cols, inner, scale, to, out.stride, split,
                                          parts);
  if (split.parts == 1) return;
  launch<low_rank_sum_kernel<T>>(looping_grid(rows * cols, kProductThreads, stream), stream, parts, split.parts, rows,
                                 cols, scale, to, out.stride);
}

// `given` where the caller wants to have it, or a matrix in `own`, which is large enough.
inline Matrix low_rank_matrix(const Matrix& given, DType dtype, std::int64_t rows, std::int64_t rank, std::byte* own) {
  if (given.data != nullptr) return given;
  return {.data = own, .dtype = dtype, .rows = rows, .cols = rank, .stride = rank};
}
inline ConstMatrix read_only(const Matrix& m) { return {m.data, m.dtype, m.rows, m.cols, m.stride}; }
inline std::size_t low_rank_bytes(const Matrix& given, DType dtype, std::int64_t rows, std::int64_t rank) {
  return given.data != nullptr ? 0 : static_cast<std::size_t>(rows * rank) * size_of(dtype);
}

}  // namespace qlora_native::QLN_CUDA
