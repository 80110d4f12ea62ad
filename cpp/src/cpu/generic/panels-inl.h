// Products of many rows by the host program's dense product (set_dense_gemm), which multiplies with panels of W,
// decoded one after the other:
//
//   Y[M, n ... ]  = [ X | U ] . [ W | s*B ]^T     a panel is rows n ... of W, and of s*B beside them
//   dX[M, k ... ] = [ dY | V ] . [ W ; A ]        a panel is columns k ... of W, and of A below them
//
// The sums have the adapter's part too: rows of the left operand are copied so that their U or V lies beside them.
#pragma once

#include "cpu/generic/lora-inl.h"
#include "cpu/job.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/way.h"
#include "hooks.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
struct Panels {
  static constexpr DType kType = Dot::kActivation;
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  using Element = DotF32<kType>;

  template <class Rows>
  static void forward(const Rows& w, const LinearForwardArgs& args) {
    const LoraView& lora = args.lora;
    const std::int64_t N = args.weight.N, K = args.weight.K, inner = K + lora.rank;
    const Buffers buffers(N, inner, args.x.rows, lora.rank);
    for (std::int64_t m = 0; m < args.x.rows; m += buffers.rows) {
      const std::int64_t rows = smaller(buffers.rows, args.x.rows - m);
      ConstMatrix left = rows_of(args.x, m, rows);
      if (lora.rank > 0) {
        const Matrix joined = buffers.copy_of(left, inner);
        const DenseRows<Element, false> a(lora_a(lora, K));
        for (std::int64_t r = 0; r < lora.rank; r += buffers.cols) {  // U = X . A^T
          const std::int64_t count = smaller(buffers.cols, lora.rank - r);
          const Matrix panel{buffers.panel, kType, count, K, K};
          decode_rows(a, r, 0, panel);
          multiply(left, panel, true, nullptr, columns_of(joined, K + r, count));
        }
        if (args.u.data != nullptr) copy_rows(columns_of(joined, K, lora.rank), rows_of(args.u, m, rows));
        left = readable(joined);
      }
      const DenseRows<Element, false> b(lora_b(lora, N), lora.scaling);
      for (std::int64_t n = 0; n < N; n += buffers.cols) {
        const std::int64_t count = smaller(buffers.cols, N - n);
        const Matrix panel{buffers.panel, kType, count, inner, inner};
        decode_rows(w, n, 0, columns_of(panel, 0, K));
        decode_rows(b, n, 0, columns_of(panel, K, lora.rank));
        const char* bias = args.bias == nullptr ? nullptr : static_cast<const char*>(args.bias) + n * kSize;
        multiply(left, panel, true, bias, columns_of(rows_of(args.y, m, rows), n, count));
      }
    }
  }

  template <class Rows>
  static void backward_input(const Rows& w, const LinearBackwardInputArgs& args) {
    const LoraView& lora = args.lora;
    const std::int64_t N = args.weight.N, K = args.weight.K, inner = N + lora.rank;
    const Buffers buffers(K, inner, args.dy.rows, lora.rank);
    for (std::int64_t m = 0; m < args.dy.rows; m += buffers.rows) {
      const std::int64_t rows = smaller(buffers.rows, args.dy.rows - m);
      ConstMatrix left = rows_of(args.dy, m, rows);
      if (lora.rank > 0) {
        const Matrix joined = buffers.copy_of(left, inner);
        const DenseRows<Element, false> b(lora_b(lora, N), lora.scaling);
        for (std::int64_t r = 0; r < lora.rank; r += buffers.cols) {  // V = dY . s*B
          const std::int64_t count = smaller(buffers.cols, lora.rank - r);
          const Matrix panel{buffers.panel, kType, N, count, count};
          decode_rows(b, 0, r, panel);
          multiply(left, panel, false, nullptr, columns_of(joined, N + r, count));
        }
        if (args.v.data != nullptr) copy_rows(columns_of(joined, N, lora.rank), rows_of(args.v, m, rows));
        left = readable(joined);
      }
      if (args.dx.data == nullptr) continue;
      const DenseRows<Element, false> a(lora_a(lora, K));
      for (std::int64_t k = 0; k < K; k += buffers.cols) {
        const std::int64_t count = smaller(buffers.cols, K - k);
        const Matrix panel{buffers.panel, kType, inner, count, count};
        decode_rows(w, 0, k, rows_of(panel, 0, N));
        decode_rows(a, 0, k, rows_of(panel, N, lora.rank));
        multiply(left, panel, false, nullptr, columns_of(rows_of(args.dx, m, rows), k, count));
      }
    }
  }

 private:
  // Memory of a panel, and with an adapter of a copy of as many rows of the left operand as kCopiedBytes hold.
  struct Buffers {
    Buffers(std::int64_t all_cols, std::int64_t inner, std::int64_t all_rows, std::int64_t rank)
        : cols(smaller(panel_columns(inner, kType), ceil_div(all_cols, kChunk) * kChunk)), rows(all_rows) {
      const std::int64_t row_bytes = inner * kSize;
      if (rank > 0) rows = smaller(all_rows, larger<std::int64_t>(kCopiedBytes / row_bytes, 1));
      const std::int64_t panel_bytes = ceil_div(cols * row_bytes, 64) * 64;
      panel = reinterpret_cast<char*>(
          scratch(Slot::call, static_cast<std::size_t>(panel_bytes + (rank > 0 ? rows * row_bytes : 0))));
      copy = panel + panel_bytes;
    }
    // `left`, in rows of `inner` elements.
    Matrix copy_of(ConstMatrix left, std::int64_t inner) const {
      const Matrix joined{copy, kType, left.rows, inner, inner};
      copy_rows(columns_of(left, 0, left.cols), columns_of(joined, 0, left.cols));
      return joined;
    }
    std::int64_t cols, rows;
    char *panel, *copy;
  };

  template <class Pointer>
  static BasicMatrix<Pointer> columns_of(BasicMatrix<Pointer> m, std::int64_t first, std::int64_t count) {
    using Byte = std::conditional_t<std::is_same_v<Pointer, const void*>, const char*, char*>;
    m.data = static_cast<Byte>(m.data) + first * kSize;
    m.cols = count;
    return m;
  }

  // Decodes to.rows x to.cols elements, from row n and column k of `from` on; k is a multiple of kChunk.
  template <class Rows>
  static void decode_rows(const Rows& from, std::int64_t n, std::int64_t k, Matrix to) {
    if (to.cols == 0) return;
    constexpr std::int64_t kRows = 16;  // that a task decodes
    const std::int64_t first = k / kChunk;
    const Range chunks{first, first + ceil_div(to.cols, kChunk)};
    parallel_for(ceil_div(to.rows, kRows), [&](std::int64_t task) {
      const std::int64_t end = smaller((task + 1) * kRows, to.rows);
      for (std::int64_t row = task * kRows; row < end; ++row) {
        char* out = static_cast<char*>(to.data) + row * to.stride * kSize;
        from.template chunks<1>(n + row, 1, chunks, [&](std::int64_t c, const typename Element::Chunk(&chunk)[1]) {
          const std::int64_t at = (c - first) * kChunk;
          store_chunk<kType>(chunk[0], out + at * kSize, smaller<std::int64_t>(kChunk, to.cols - at));
        });
      }
    });
  }
  template <class From>
  static void copy_rows(From from, Matrix to) {
    parallel_for(from.rows, [&](std::int64_t row) {
      __builtin_memcpy(static_cast<char*>(to.data) + row * to.stride * kSize,
                       static_cast<const char*>(from.data) + row * from.stride * kSize,
                       static_cast<std::size_t>(from.cols * kSize));
    });
  }

  static void multiply(ConstMatrix left, Matrix panel, bool transposed, const void* bias, Matrix out) {
    hooks().dense_gemm(
        {.left = left, .right = readable(panel), .transpose_right = transposed, .bias = bias, .out = out}, {});
  }
};

// A product by panels, of rows that have one adapter or none.
template <class Dot, class Rows, class Args>
class PanelsJob final : public Job {
 public:
  PanelsJob(const Rows& w, const Args& args, const WeightRows& part) : w_(w) {
    rows_ = part.end - part.begin;
    args_ = args_of(args, part, rows_);
    const std::vector<Adapted> adapted = adapted_rows(args.lora, part, rows_, args.weight);
    if (adapted.empty())
      args_.lora.rank = 0;
    else
      args_.lora = adapted.front().lora;
  }
  void cut(std::int64_t) override {}
  void prepare(std::byte*) override {}
  void run(int, std::int64_t) override {
    if constexpr (std::is_same_v<Args, LinearForwardArgs>)
      Panels<Dot>::forward(w_, args_);
    else
      Panels<Dot>::backward_input(w_, args_);
  }
  bool runs_alone() const override { return true; }

 private:
  Rows w_;
  Args args_;  // of this job's rows
};
template <class Dot, class Rows>
using ForwardPanels = PanelsJob<Dot, Rows, LinearForwardArgs>;
template <class Dot, class Rows>
using BackwardInputPanels = PanelsJob<Dot, Rows, LinearBackwardInputArgs>;

}  // namespace
}  // namespace qlora_native::QLN_ISA
