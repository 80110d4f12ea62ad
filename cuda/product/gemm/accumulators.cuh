// The accumulators of a tile stay in registers: products are added, then other blocks' partial sums, and at last the
// bias.
#pragma once

#include "device/elements.cuh"
#include "product/dropout.cuh"
#include "product/gemm/operands.cuh"

namespace qlora_native::QLN_CUDA {

template <class T, class Weights, class Tile>
class GemmAccumulators {
  static constexpr int kRowFragments = Tile::kRowFragments, kColFragments = Tile::kColFragments;
  static constexpr int kLaneCols = Tile::kLaneCols, kFragmentGroups = Tile::kFragmentGroups;
  static constexpr int kLaneRows = 2 * kRowFragments;

 public:
  __device__ __forceinline__ void clear() {
    each([](float& sum) { sum = 0.0f; });
  }

  // Adds the products of the k-th 16 of a step. `x` and `weights` are where the lane points ldmatrix at first.
  __device__ __forceinline__ void multiply(const SharedAddress& x, const SharedAddress& weights, unsigned k) {
    std::uint32_t a[kRowFragments][4], b[kColFragments / 2][4];
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) ldmatrix_x4(a[i], XStage<T, Tile>::operand(x, k, i));
#pragma unroll
    for (int p = 0; p < kColFragments / 2; ++p) Weights::load(b[p], Weights::operands(weights, k, p));
#pragma unroll
    for (int p = 0; p < kColFragments / 2; ++p) {
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        mma_16x8x16<T>(accumulator_[i][2 * p], a[i], {b[p][0], b[p][1]});
        mma_16x8x16<T>(accumulator_[i][2 * p + 1], a[i], {b[p][2], b[p][3]});
      }
    }
  }

  // Sets the accumulators to zero that dropout drops. `row`, `col`: the lane's first of the result. There are two
  // loops: one that is not unrolled for the random bits, which are much code, and one that is, because accumulators are
  // registers and each must be named.
  __device__ void drop(const Dropout& dropout, std::int64_t row, std::int64_t col) {
    static_assert(8 % kLaneCols == 0 && kFragmentGroups * kLaneRows <= 32);  // a lane's columns share their random bits
    std::uint32_t mask[kLaneCols] = {};
#pragma unroll 1
    for (int i = kFragmentGroups * kLaneRows - 1; i >= 0; --i) {
      const std::int64_t first = col + i / kLaneRows * Tile::kGroupCols;
      const PhiloxBlock random = dropout_random(dropout.seed, row + i % kLaneRows * 8, first);
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        mask[j] = mask[j] << 1 | (dropout_keeps(random, first + j, dropout.threshold) ? 1u : 0u);
      }
    }
#pragma unroll
    for (int i = 0; i < kFragmentGroups * kLaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        float& sum = at(i % kLaneRows, i / kLaneRows, j);
        sum = (mask[j] >> i & 1) != 0 ? sum : 0.0f;
      }
    }
  }

  // Vectors of four, which stream_k.cuh stores in memory and adds from there.
  static constexpr int kVectors = kRowFragments * kColFragments;
  __device__ __forceinline__ float* vector(int i) { return accumulator_[i / kColFragments][i % kColFragments]; }

  // Stores each accumulator plus bias, rounded once, in the `rows` rows and `cols` columns that exist, counted from the
  // lane's first. `out` and `biases` point to the lane's first; without a bias `biases` is null.
  __device__ void store(T* out, std::int64_t stride, const T* biases, int rows, int cols) const {
#pragma unroll
    for (int group = 0; group < kFragmentGroups; ++group) {
      const int first = group * Tile::kGroupCols, rest = cols - first;
      if (rest <= 0) return;
      const int count = rest < kLaneCols ? rest : kLaneCols;
      float bias[kLaneCols] = {};
      if (biases != nullptr) {
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) {
          if (j < count) bias[j] = to_f32(biases[first + j]);
        }
      }
      T* to = out + first;
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        T values[kLaneCols];
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) values[j] = from_f32<T>(at(i, group, j) + bias[j]);
        if (i * 8 < rows) store_elements(to, count, values);
        to += 8 * stride;
      }
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (auto& fragments : accumulator_) {
#pragma unroll
      for (auto& sums : fragments) {
#pragma unroll
        for (float& sum : sums) f(sum);
      }
    }
  }
  // The element in the lane's i-th row (its rows are 8 apart) and in the j-th of its adjacent columns of a group.
  __device__ __forceinline__ float& at(int i, int group, int j) {
    return accumulator_[i / 2][group * Tile::kGroupFragments + j / 2][i % 2 * 2 + j % 2];
  }
  __device__ __forceinline__ const float& at(int i, int group, int j) const {
    return accumulator_[i / 2][group * Tile::kGroupFragments + j / 2][i % 2 * 2 + j % 2];
  }

  float accumulator_[kRowFragments][kColFragments][4];
};

}  // namespace qlora_native::QLN_CUDA
