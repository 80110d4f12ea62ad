// linear_backward_input and lora_gradients, all of them through ProductNn.
#pragma once

#include "cpu/generic/lora-inl.h"
#include "cpu/generic/product_nn-inl.h"

namespace qlora_native {
namespace {

template <class Dot>
struct Backward {
  using Product = ProductNn<Dot>;
  using Groups = typename Product::Groups;
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));
  static constexpr int kVectors = Dot::kColumnVectors;

  template <class Rows>
  static void input(const Rows& w, const LinearBackwardInputArgs& args) {
    const LoraView& lora = args.lora;
    const std::int64_t N = args.weight.N, K = args.weight.K;
    const std::int64_t stride = Product::packed_stride(Product::units_of(N)), v_units = Product::units_of(lora.rank);
    const std::int64_t v_stride = lora.rank > 0 ? Product::packed_stride(v_units) : 0;
    const std::int64_t block = rows_per_block(args.dy.rows, (stride + 2 * v_stride) * 4, Product::kGroup);
    for (std::int64_t m = 0; m < args.dy.rows; m += block) {
      const Groups groups(smaller(block, args.dy.rows - m));
      float* dy = packed_rows(groups.packed_rows() * (stride + 2 * v_stride));
      float* v = dy + groups.packed_rows() * stride;
      const typename Product::LowRank low_rank{v, v_units, DenseRows<Dot, false>(lora_a(lora, K)), dropout_of(lora), m};
      const DenseRows<Dot, true> b(lora_b(lora, N));
      Matrix v_out = rows_of(args.v, m, groups.rows);
      if (v_out.data == nullptr)
        v_out = {v + groups.packed_rows() * v_stride, Dot::kActivation, groups.rows, lora.rank, lora.rank};
      const float scale = lora.scaling * dropout_scale(lora);
      const auto write_v = [=](std::int64_t row, std::int64_t col, F32(&sums)[kVectors]) {
        write_row<Dot::kActivation>(v_out, row, col, sums, scale);
      };
      const auto write_dx = [&args, m](std::int64_t row, std::int64_t col, F32(&sums)[kVectors]) {
        write_row<Dot::kActivation>(args.dx, m + row, col, sums, 1.0f);
      };
      auto low_rank_product = Product::product(dy, groups, b, nullptr, write_v);
      auto pack_v = Product::pack(readable(v_out), groups, v);
      auto product = Product::product(dy, groups, w, lora.rank > 0 ? &low_rank : nullptr, write_dx);
      if (args.dx.data == nullptr) product.tasks = 0;
      if (lora.rank == 0) low_rank_product.tasks = 0;
      if (lora.rank == 0 || args.dx.data == nullptr) pack_v.tasks = 0;
      parallel_stages(Product::pack(rows_of(args.dy, m, groups.rows), groups, dy), low_rank_product, pack_v, product);
    }
  }

  // dA = V^T . drop(X), dB^T = s * U^T . dY: the inner dimension is M.
  static void gradients(const LoraGradientsArgs& args) {
    const LoraView& lora = args.lora;
    if (args.x.rows == 0) {  // sums of nothing
      const std::size_t size = size_of(lora.dtype) * static_cast<std::size_t>(lora.rank);
      if (args.da != nullptr) __builtin_memset(args.da, 0, size * static_cast<std::size_t>(args.x.cols));
      if (args.db != nullptr) __builtin_memset(args.db, 0, size * static_cast<std::size_t>(args.dy.cols));
      return;
    }
    if (args.da != nullptr) {
      const DenseRows<Dot, false> x(args.x, 1.0f, dropout_of(lora));
      const Matrix da{args.da, lora.dtype, lora.rank, args.x.cols, args.x.cols};
      transposed_times(args.v, x, [&](std::int64_t row, std::int64_t col, F32(&sums)[kVectors]) {
        with_dtype(lora.dtype, [&](auto dtype) { write_row<dtype()>(da, row, col, sums, 1.0f); });
      });
    }
    if (args.db != nullptr) {
      const DenseRows<Dot, false> dy(args.dy);
      const Matrix db{args.db, lora.dtype, args.dy.cols, lora.rank, lora.rank};
      transposed_times(args.u, dy, [&](std::int64_t row, std::int64_t col, F32(&sums)[kVectors]) {
        with_dtype(lora.dtype, [&](auto dtype) { write_column<dtype()>(db, row, col, sums, lora.scaling); });
      });
    }
  }

 private:
  static float* packed_rows(std::int64_t floats) {
    return reinterpret_cast<float*>(scratch(Slot::call, static_cast<std::size_t>(floats) * sizeof(float)));
  }

  // left[M, rank]^T . right[M, cols], over blocks of ranks.
  template <class Rows, class Write>
  static void transposed_times(ConstMatrix left, const Rows& right, Write write) {
    const std::int64_t M = left.rows, stride = Product::packed_stride(Product::units_of(M));
    const std::int64_t block = rows_per_block(left.cols, stride * 4 + M * kSize, Product::kGroup);
    for (std::int64_t first = 0; first < left.cols; first += block) {
      const Groups groups(smaller(block, left.cols - first));
      const std::int64_t packed_floats = groups.packed_rows() * stride;
      const std::int64_t copy_floats = ceil_div(groups.rows * M * kSize, 4);
      float* packed = packed_rows(packed_floats + copy_floats);
      char* copy = reinterpret_cast<char*>(packed + packed_floats);
      const char* from = static_cast<const char*>(left.data) + first * kSize;
      constexpr std::int64_t kTurned = 64;  // rows of left that a task turns
      const auto turn = [=](std::int64_t task) {
        const std::int64_t end = smaller((task + 1) * kTurned, M);
        for (std::int64_t m = task * kTurned; m < end; ++m)
          for (std::int64_t r = 0; r < groups.rows; ++r)
            __builtin_memcpy(copy + (r * M + m) * kSize, from + (m * left.stride + r) * kSize, kSize);
      };
      const auto write_from_first = [=](std::int64_t row, std::int64_t col, F32(&sums)[kVectors]) {
        write(first + row, col, sums);
      };
      parallel_stages(Stage{ceil_div(M, kTurned), turn},
                      Product::pack({copy, Dot::kActivation, groups.rows, M, M}, groups, packed),
                      Product::product(packed, groups, right, nullptr, write_from_first));
    }
  }

  template <DType kTo>
  static void write_row(Matrix out, std::int64_t row, std::int64_t col, const F32 (&sums)[kVectors], float scale) {
    constexpr auto kTarget = static_cast<std::int64_t>(size_of(kTo));
    char* p = static_cast<char*>(out.data) + (row * out.stride + col) * kTarget;
    for (int i = 0; i < Dot::kColumnVectors && col + i * kLanes < out.cols; ++i)
      store_from_f32<kTo>(p + i * kLanes * kTarget, mul(sums[i], set1(scale)),
                          static_cast<int>(smaller<std::int64_t>(kLanes, out.cols - col - i * kLanes)));
  }
  // Row `col` ... of out, element `row` of each.
  template <DType kTo>
  static void write_column(Matrix out, std::int64_t row, std::int64_t col, const F32 (&sums)[kVectors], float scale) {
    constexpr auto kTarget = static_cast<std::int64_t>(size_of(kTo));
    char values[kChunk * kTarget];
    for (int i = 0; i < Dot::kColumnVectors; ++i)
      store_from_f32<kTo>(values + i * kLanes * kTarget, mul(sums[i], set1(scale)));
    const std::int64_t count = smaller<std::int64_t>(kChunk, out.rows - col);
    for (std::int64_t i = 0; i < count; ++i)
      __builtin_memcpy(static_cast<char*>(out.data) + ((col + i) * out.stride + row) * kTarget, values + i * kTarget,
                       kTarget);
  }
};

}  // namespace
}  // namespace qlora_native
