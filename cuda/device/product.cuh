// A product on CUDA cores, for every dtype and shape: sum over k of left(i, k) * right(j, k), from two sources
// (sources.cuh). A block of 256 threads computes 64x64 sums, a thread 4x4 of them; both operands pass through shared
// memory in steps of 16 along k.
#pragma once

#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kProductThreads = 256;
constexpr int kProductTile = 64;  // rows and columns of a block
constexpr int kProductStep = 16;  // along k
constexpr int kProductOwn = 4;    // rows and columns of a thread
// Steps whose sum is taken for itself before it joins the total: the error of a long sum grows with the root of this
// and of how many there are, not of all of K.
constexpr int kProductStepsOfSum = 8;

// A step of an operand, k first: [k][i]. Four more columns keep neighbouring k out of one bank.
struct ProductOperand {
  float at[kProductStep][kProductTile + 4];
};
struct ProductShared {
  ProductOperand left, right;
};

// The tile of out[rows, cols] that is this block's, and the part of it that is this thread's.
struct ProductPlace {
  std::int64_t rows, cols;  // of the whole result
  std::int64_t i0, j0;      // where the block's tile begins
  int row, col;             // where the thread's part of it begins
  __device__ ProductPlace(std::int64_t rows, std::int64_t cols) : ProductPlace(rows, cols, block_index()) {}
  __device__ ProductPlace(std::int64_t rows, std::int64_t cols, std::int64_t tile) : rows(rows), cols(cols) {
    const std::int64_t across = (cols + kProductTile - 1) / kProductTile;
    i0 = tile / across * kProductTile;
    j0 = tile % across * kProductTile;
    constexpr int kAcross = kProductTile / kProductOwn;
    row = thread_index() / kAcross * kProductOwn;
    col = thread_index() % kAcross * kProductOwn;
  }
  // f(i, j, sum) for each of the thread's that the result has.
  template <class F>
  __device__ void each(float (&sum)[kProductOwn][kProductOwn], const F& f) const {
#pragma unroll
    for (int i = 0; i < kProductOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kProductOwn; ++j) {
        if (i0 + row + i < rows && j0 + col + j < cols) f(i0 + row + i, j0 + col + j, sum[i][j]);
      }
    }
  }
};
inline LaunchShape product_grid(std::int64_t rows, std::int64_t cols) {
  const auto tiles = [](std::int64_t n) { return (n + kProductTile - 1) / kProductTile; };
  return {tiles(rows) * tiles(cols), kProductThreads, sizeof(ProductShared)};
}

template <class Source>
__device__ void load_operand(ProductOperand& to, const Source& source, std::int64_t i0, std::int64_t rows,
                             std::int64_t k0, std::int64_t inner) {
#pragma unroll
  for (int n = 0; n < kProductTile * kProductStep / kProductThreads; ++n) {
    const int item = thread_index() + n * kProductThreads;
    const int i = Source::kAlongInner ? item / kProductStep : item % kProductTile;
    const int k = Source::kAlongInner ? item % kProductStep : item / kProductTile;
    to.at[k][i] = i0 + i < rows && k0 + k < inner ? source(i0 + i, k0 + k) : 0.0f;
  }
}

// total += sum over begin <= k < inner of left(i, k) * right(j, k).
template <class Left, class Right>
__device__ void accumulate(float (&total)[kProductOwn][kProductOwn], const ProductPlace& place, const Left& left,
                           const Right& right, std::int64_t inner, std::int64_t begin = 0) {
  ProductShared& shared = *dynamic_smem<ProductShared>();
  for (std::int64_t first = begin; first < inner; first += kProductStepsOfSum * kProductStep) {
    float sum[kProductOwn][kProductOwn] = {};
    const std::int64_t end =
        first + kProductStepsOfSum * kProductStep < inner ? first + kProductStepsOfSum * kProductStep : inner;
    for (std::int64_t k0 = first; k0 < end; k0 += kProductStep) {
      sync_threads();  // the step before has been read
      load_operand(shared.left, left, place.i0, place.rows, k0, inner);
      load_operand(shared.right, right, place.j0, place.cols, k0, inner);
      sync_threads();
#pragma unroll
      for (int k = 0; k < kProductStep; ++k) {
        const auto l = load_vector<float, kProductOwn>(&shared.left.at[k][place.row]);
        const auto r = load_vector<float, kProductOwn>(&shared.right.at[k][place.col]);
#pragma unroll
        for (int i = 0; i < kProductOwn; ++i) {
#pragma unroll
          for (int j = 0; j < kProductOwn; ++j) sum[i][j] = fma(l.at[i], r.at[j], sum[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kProductOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kProductOwn; ++j) total[i][j] += sum[i][j];
    }
  }
}

}  // namespace qlora_native::QLN_CUDA
