// The low-rank halves of an adapter: U = drop(X) . A^T / (1-p) and V = s/(1-p) * dY . B, each [M, rank].
#pragma once

#include "device/product.cuh"
#include "device/sources.cuh"

namespace qlora_native::QLN_CUDA {

// out(i, j) = scale * sum over k of left(i, k) * right(j, k), rounded to T.
template <class T, class Left, class Right>
__global__ void __launch_bounds__(kProductThreads)
    product_kernel(const Left left, const Right right, std::int64_t rows, std::int64_t cols, std::int64_t inner,
                   float scale, T* out, std::int64_t stride) {
  const ProductPlace place(rows, cols);
  float sum[kProductOwn][kProductOwn] = {};
  accumulate(sum, place, left, right, inner);
  place.each(sum, [&](std::int64_t i, std::int64_t j, float s) { out[i * stride + j] = from_f32<T>(s * scale); });
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
