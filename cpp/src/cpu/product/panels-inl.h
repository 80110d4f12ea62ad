// Products by the application's dense product (set_dense_gemm), which multiplies with panels of W,
// decoded one after the other:
//
//   Y[M, n ... ]  = X . W^T + U . (s*B)^T     a panel is rows n ... of W
//   dX[M, k ... ] = dY . W + V . A            a panel is columns k ... of W
//
// The adapter's part comes first, by panels of A and B, and is written to the result; the product with W is added to
// it. So the part is rounded once more than by the other kernels, and X or dY is not copied to lie beside U or
// V.
#pragma once

#include "cpu/product/config.h"
#include "cpu/product/job_operands-inl.h"
#include "cpu/quantize/decode_elements-inl.h"
#include "cpu/runtime/job.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "hooks.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
struct Panels {
  static constexpr DType kType = Dot::kActivation;
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));

  static void forward(ElementRows w, const LinearForwardArgs& args) {
    const LoraView& lora = args.lora;
    const std::int64_t N = args.weight.N, K = args.weight.K;
    const Memory memory({{K, N}, {K, lora.rank}, {lora.rank, N}}, args.u, args.x.rows, lora.rank);
    if (lora.rank > 0) {
      const AdapterRows a(lora_a(lora, K)), b(lora_b(lora, N), lora.scaling);
      memory.each_low_rank(args.u, args.x.rows, [&](std::int64_t m, Matrix u) {
        multiply<true>(rows_of(args.x, m, u.rows), elements_of<kType>(a), memory.panel, {.out = u});
        multiply<true>(readable(u), elements_of<kType>(b), memory.panel,
                       {.bias = args.bias, .out = rows_of(args.y, m, u.rows)});
      });
    }
    multiply<true>(args.x, w, memory.panel,
                   {.bias = lora.rank > 0 ? nullptr : args.bias, .accumulate = lora.rank > 0, .out = args.y});
  }

  static void backward_input(ElementRows w, const LinearBackwardInputArgs& args) {
    const LoraView& lora = args.lora;
    const std::int64_t N = args.weight.N, K = args.weight.K;
    const Memory memory({{N, K}, {N, lora.rank}, {lora.rank, K}}, args.v, args.dy.rows, lora.rank);
    const bool dx = args.dx.data != nullptr;
    if (lora.rank > 0) {
      const AdapterRows a(lora_a(lora, K)), b(lora_b(lora, N), lora.scaling);
      memory.each_low_rank(args.v, args.dy.rows, [&](std::int64_t m, Matrix v) {
        multiply<false>(rows_of(args.dy, m, v.rows), elements_of<kType>(b), memory.panel, {.out = v});
        if (dx) multiply<false>(readable(v), elements_of<kType>(a), memory.panel, {.out = rows_of(args.dx, m, v.rows)});
      });
    }
    if (dx) multiply<false>(args.dy, w, memory.panel, {.accumulate = lora.rank > 0, .out = args.dx});
  }

 private:
  using AdapterRows = DenseRows<DotF32<kType>, false>;

  // What X or a low-rank operand is multiplied by: its inner dimension, and the columns of the result.
  struct Operand {
    std::int64_t inner, cols;
  };
  static std::int64_t cols_at_once(Operand w) {
    return smaller(cpu::panel_columns(w.inner, kType), ceil_div(w.cols, kChunk) * kChunk);
  }

  // Memory of a panel, and of rows of U or V where the caller wants none.
  struct Memory {
    Memory(std::initializer_list<Operand> operands, Matrix wanted, std::int64_t all_rows, std::int64_t rank) {
      std::int64_t panel_bytes = 0, low_rank_bytes = 0;
      for (const Operand w : operands)
        if (w.inner > 0) panel_bytes = larger(panel_bytes, cols_at_once(w) * w.inner * kSize);
      if (rank > 0 && wanted.data == nullptr) {
        const std::int64_t rows = smaller(all_rows, larger<std::int64_t>(cpu::kLowRankBytes / (rank * kSize), 1));
        low_rank_bytes = rows * rank * kSize;
        low_rank = {nullptr, kType, rows, rank, rank};
      }
      panel_bytes = ceil_div(panel_bytes, 64) * 64;
      panel = reinterpret_cast<char*>(scratch(Slot::call, static_cast<std::size_t>(panel_bytes + low_rank_bytes)));
      if (low_rank.rows > 0) low_rank.data = panel + panel_bytes;
    }
    // Calls f(m, rows m ... of U or V) for all rows, as many at once as there is memory for.
    template <class F>
    void each_low_rank(Matrix wanted, std::int64_t all_rows, F&& f) const {
      if (wanted.data != nullptr) return f(0, wanted);
      for (std::int64_t m = 0; m < all_rows; m += low_rank.rows)
        f(m, rows_of(low_rank, 0, smaller(low_rank.rows, all_rows - m)));
    }
    char* panel;
    Matrix low_rank;
  };

  static Matrix columns_of(Matrix m, std::int64_t first, std::int64_t count) {
    m.data = static_cast<char*>(m.data) + first * kSize;
    m.cols = count;
    return m;
  }

  // Decodes to.rows x to.cols elements, from row n and column k of `from` on; k is a multiple of kChunk.
  static void decode_rows(ElementRows from, std::int64_t n, std::int64_t k, Matrix to) {
    constexpr std::int64_t kRows = 16;  // that a task decodes
    const Range chunks{k / kChunk, ceil_div(k + to.cols, kChunk)};
    parallel_for(ceil_div(to.rows, kRows), [&](std::int64_t task) {
      const std::int64_t end = smaller((task + 1) * kRows, to.rows);
      for (std::int64_t row = task * kRows; row < end; ++row)
        from.decode(n + row, chunks, static_cast<char*>(to.data) + row * to.stride * kSize);
    });
  }

  struct Result {
    const void* bias = nullptr;
    bool accumulate = false;
    Matrix out;
  };
  // out = x . w^T, or x . w unless kTransposed, with panels of w that are decoded into `memory`.
  template <bool kTransposed>
  static void multiply(ConstMatrix x, ElementRows w, char* memory, const Result& result) {
    const std::int64_t inner = x.cols, cols = result.out.cols, at_once = cols_at_once({inner, cols});
    for (std::int64_t n = 0; n < cols; n += at_once) {
      const std::int64_t count = smaller(at_once, cols - n);
      const Matrix panel =
          kTransposed ? Matrix{memory, kType, count, inner, inner} : Matrix{memory, kType, inner, count, count};
      decode_rows(w, kTransposed ? n : 0, kTransposed ? 0 : n, panel);
      hooks().dense_gemm({.x = x,
                          .w = readable(panel),
                          .transpose_w = kTransposed,
                          .bias = result.bias == nullptr ? nullptr : static_cast<const char*>(result.bias) + n * kSize,
                          .accumulate = result.accumulate,
                          .out = columns_of(result.out, n, count)},
                         {});
    }
  }
};

// A product by panels of rows that have one adapter or none.
template <class Dot, class Rows, class Args>
class PanelsJob final : public Job {
 public:
  PanelsJob(const Rows& w, const Args& args, const WeightRows& part)
      : w_(w), args_(args_of(args, part, part.end - part.begin)) {
    rows_ = part.end - part.begin;
    const std::vector<JobAdapter> adapters = job_adapters(args.lora, part, rows_, args.weight);
    if (adapters.empty())
      args_.lora.rank = 0;
    else
      args_.lora = adapters.front().lora;
  }
  void cut(std::int64_t) override {}
  void prepare(std::byte*) override {}
  void run(int, std::int64_t) override {
    if constexpr (std::is_same_v<Args, LinearForwardArgs>)
      Panels<Dot>::forward(elements_of<Dot::kActivation>(w_), args_);
    else
      Panels<Dot>::backward_input(elements_of<Dot::kActivation>(w_), args_);
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
