// The sums of a tile, in registers, through its life: products are added to them, other blocks' sums, at last the bias.
#pragma once

#include "device/elements.cuh"
#include "device/gemm_left.cuh"
#include "device/sources.cuh"

namespace qlora_native::QLN_CUDA {

template <class T, class Tile>
class GemmSums {
  static constexpr int kFragments = Tile::kFragments, kRowFragments = Tile::kRowFragments;
  static constexpr int kLaneCols = Tile::kLaneCols;
  static constexpr unsigned kLeftFragmentBytes = LeftStage<T, Tile::kRows>::kFragmentBytes;

 public:
  // What mma takes of the weight's side: of each fragment of columns.
  using Operand = std::uint32_t[kFragments][4];

  __device__ __forceinline__ void clear() {
    each([](float& sum) { sum = 0.0f; });
  }

  // Adds the products of half a step: two operands of mma, with the left operand's vectors. `left`: the lane's in the
  // first fragment of rows.
  __device__ __forceinline__ void multiply(const Operand (&a)[2], const SharedPlace& left) {
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      const auto x = load_shared<Vector<std::uint32_t, 4>>(left.at(i * kLeftFragmentBytes));
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const std::uint32_t b[2] = {x.at[2 * s], x.at[2 * s + 1]};
#pragma unroll
        for (int f = 0; f < kFragments; ++f) mma_16x8x16<T>(sum_[f][i], a[s][f], b);
      }
    }
  }
  // Of one operand, with half a vector.
  __device__ __forceinline__ void multiply(const Operand& a, const SharedPlace& left) {
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      const auto x = load_shared<Vector<std::uint32_t, 2>>(left.at(i * kLeftFragmentBytes));
#pragma unroll
      for (int f = 0; f < kFragments; ++f) mma_16x8x16<T>(sum_[f][i], a[f], x.at);
    }
  }

  // Sets to zero what dropout drops. `row`, `col`: the lane's first of the result. In two loops: the random bits are
  // much code, the sums are registers and must be named.
  __device__ void drop(const Dropout& dropout, std::int64_t row, std::int64_t col) {
    static_assert(8 % kLaneCols == 0 && 2 * kRowFragments <= 32);  // a row's columns share their bits
    std::uint32_t kept[kLaneCols] = {};
#pragma unroll 1
    for (int i = 2 * kRowFragments - 1; i >= 0; --i) {
      const PhiloxBlock random = dropout_random(dropout.seed, row + i / 2 * kMmaCols + i % 2, col);
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        kept[j] = kept[j] << 1 | (dropout_keeps(random, col + j, dropout.threshold) ? 1u : 0u);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        float& sum = at(i / 2, i % 2, j);
        sum = (kept[j] >> i & 1) != 0 ? sum : 0.0f;
      }
    }
  }

  // Where several blocks share a tile's steps: to memory of the block that had to leave it, in the order in which
  // threads hold them, and from there to the one that goes on.
  __device__ void leave(float* of_block) const {
    float* to = of_block + thread_index() * 4;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const float (&s)[4] = sum_[f][i];
        store_vector<float, 4>(to + (i * kFragments + f) * kGemmThreads * 4, {{s[0], s[1], s[2], s[3]}});
      }
    }
  }
  __device__ void add(const float* of_block) {
    const float* from = of_block + thread_index() * 4;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const auto s = load_vector<float, 4>(from + (i * kFragments + f) * kGemmThreads * 4);
#pragma unroll
        for (int part = 0; part < 4; ++part) sum_[f][i][part] += s.at[part];
      }
    }
  }

  // Sum plus bias, rounded once, of `rows` rows and `cols` columns that are there, counted from the lane's first. `out`
  // and `bias`: of that; a bias of null is none.
  __device__ void store(T* out, std::int64_t stride, const T* bias_of, int rows, int cols) const {
    if (cols <= 0) return;
    const int count = cols < kLaneCols ? cols : kLaneCols;
    float bias[kLaneCols] = {};
    if (bias_of != nullptr) {
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        if (j < count) bias[j] = to_f32(bias_of[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        T values[kLaneCols];
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) values[j] = from_f32<T>(at(i, e, j) + bias[j]);
        if (i * kMmaCols + e < rows) store_elements(out + e * stride, count, values);
      }
      out += kMmaCols * stride;
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (auto& fragments : sum_) {
#pragma unroll
      for (auto& sums : fragments) {
#pragma unroll
        for (float& sum : sums) f(sum);
      }
    }
  }
  // Of the fragment of rows i, the lane's row 2t + e and the j-th of its columns.
  __device__ __forceinline__ float& at(int i, int e, int j) { return sum_[j / 2][i][j % 2 * 2 + e]; }
  __device__ __forceinline__ const float& at(int i, int e, int j) const { return sum_[j / 2][i][j % 2 * 2 + e]; }

  float sum_[kFragments][kRowFragments][4];
};

}  // namespace qlora_native::QLN_CUDA
