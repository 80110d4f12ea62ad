// linear_forward of a few rows of x: lanes along K, and a weight is decoded where it is used.
#pragma once

#include "cpu/generic/lora-inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/way.h"
#include "qlora_native/runtime.h"

namespace qlora_native {
namespace {

template <class Dot>
struct FewRows {
  static constexpr std::int64_t kStepUnits = Dot::kStepVectors * kLanes;

  template <class Rows>
  static std::int64_t steps(const Rows& rows) {
    return ceil_div(rows.cols(), kStepElements<Dot>);
  }

  // x as [step][row][unit].
  template <class Rows>
  static void pack(const Rows& x, int rows, float* out) {
    for (int m = 0; m < rows; ++m)
      x.template steps<1>(m, 1, [&](std::int64_t s, const typename Dot::Step(&step)[1]) {
        for (int k = 0; k < Dot::kStepVectors; ++k)
          store(out + (s * rows + m) * kStepUnits + k * kLanes, step[0].vector(k));
      });
  }

  // The low-rank part for row n of B: `u` is [row][padded rank], in floats.
  struct LowRank {
    ConstMatrix b;
    float scaling = 0.0f;
    const float* u = nullptr;
    std::int64_t padded_rank = 0;

    // Asks for rows n ... n+count-1 of B.
    void prefetch(std::int64_t n, std::int64_t count) const {
      const std::int64_t row_bytes = b.stride * static_cast<std::int64_t>(size_of(b.dtype));
      const char* rows = static_cast<const char*>(b.data) + n * row_bytes;
      for (std::int64_t i = 0; i < count * row_bytes; i += 64) __builtin_prefetch(rows + i, 0, 3);
    }
    F32 row(std::int64_t n, std::int64_t r) const {
      return with_dtype(b.dtype, [&](auto dtype) {
        constexpr auto kSize = static_cast<std::int64_t>(size_of(dtype()));
        const char* p = static_cast<const char*>(b.data) + (n * b.stride + r) * kSize;
        const int count = static_cast<int>(smaller<std::int64_t>(kLanes, b.cols - r));
        return round_to<Dot::kActivation>(mul(load_as_f32<dtype()>(p, count), set1(scaling)));
      });
    }
  };

  // So many rows of W at a time share what is loaded of x; their sums, and what decodes them, should fit the registers.
  template <int kM>
  static constexpr int kRowsOf = Dot::kStepVectors <= 4 && kM * 4 <= kRegisters / 2 ? 4 : 2;
  // Sums for each row of x and of W: two multiply-adds begin in a cycle and take four, so eight keep them busy.
  template <int kM>
  static constexpr int kPartsOf = smaller(larger(8 / (kRowsOf<kM> * kM), 1), Dot::kStepVectors);

  // Where sums in fp32 start afresh: after so many steps they are added to a total. 0: one chain is good enough.
  static constexpr std::int64_t kChainSteps = Dot::kRestart < Dot::kBlock ? 256 / kStepElements<Dot> : 0;

  template <int kM>
  struct Sums {
    static constexpr int kRows = kRowsOf<kM>, kParts = kPartsOf<kM>;
    F32 part[kRows][kM][kParts], total[kRows][kM];

    [[gnu::always_inline]] Sums() {
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          total[j][m] = zero();
#pragma GCC unroll 8
          for (int i = 0; i < kParts; ++i) part[j][m][i] = zero();
        }
    }
    // One step of x and of the rows of W. A vector of W is made for the products that need it.
    template <class Step>
    [[gnu::always_inline]] void multiply(std::int64_t s, const float* x, const Step (&step)[kRows]) {
      const float* units = x + s * kM * kStepUnits;
#pragma GCC unroll 16
      for (int k = 0; k < Dot::kStepVectors; ++k) {
        F32 w[kRows];
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) w[j] = step[j].vector(k);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const F32 value = load(units + m * kStepUnits + k * kLanes);
#pragma GCC unroll 8
          for (int j = 0; j < kRows; ++j) part[j][m][k % kParts] = Dot::dot(part[j][m][k % kParts], value, w[j]);
        }
      }
      if constexpr (kChainSteps != 0)
        if ((s + 1) % kChainSteps == 0) add_up();
    }
    // Ends a chain: the parts of every sum go into its total.
    [[gnu::always_inline]] void add_up() {
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
          for (int i = 0; i < kParts; ++i) {
            total[j][m] = add(total[j][m], part[j][m][i]);
            part[j][m][i] = zero();
          }
    }
    // The low-rank part of rows n ... n+count-1, then the sums to out[m][j].
    [[gnu::always_inline]] void finish(std::int64_t n, int count, const LowRank* lora, float* out) {
      add_up();
      if (lora != nullptr)
        for (std::int64_t r = 0; r < lora->b.cols; r += kLanes)
#pragma GCC unroll 8
          for (int j = 0; j < kRows; ++j) {
            const F32 b = j < count ? lora->row(n + j, r) : zero();
#pragma GCC unroll 8
            for (int m = 0; m < kM; ++m) total[j][m] = fma(b, load(lora->u + m * lora->padded_rank + r), total[j][m]);
          }
#pragma GCC unroll 8
      for (int i = 0; i < kM * kRows; i += 4) {
        F32 four[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) four[k] = i + k < kM * kRows ? total[(i + k) % kRows][(i + k) / kRows] : zero();
        store_sums(out + i, four);
      }
    }
  };

  static constexpr int kGroup = 16;  // rows of W whose scales are decoded, and whose results are written, together
  // Long stretches of W for each thread: at the end of one, the rows that were asked for ahead are another thread's.
  static constexpr std::int64_t kTasksOfThread = 2;

  // out[m][j] for kRowsOf<kM> aligned rows from n on.
  template <int kM, class Rows>
  static void whole_rows(const Rows& w, std::int64_t n, const float* scales, const float* x, const LowRank* lora,
                         float* out) {
    constexpr int kRows = kRowsOf<kM>;
    Sums<kM> sums;
    const std::uint8_t* codes[kRows];
    const float* scale[kRows];
    for (int j = 0; j < kRows; ++j) {
      codes[j] = w.codes_at(n + j, 0);
      scale[j] = scales + j * (w.cols() / kChunk) * Rows::kChunkScales;
    }
    // The rows after these are next in memory, and next to be read. Into the second-level cache: asked for in the
    // first, they cost a third more time.
    const std::int64_t ahead = kRows * w.row_bytes();
    if (lora != nullptr) lora->prefetch(n + kRows, kRows);
    const std::int64_t whole = w.cols() / kStepElements<Dot>;
    for (std::int64_t s = 0; s < whole; ++s) {
      typename Rows::QuantizedStep step[kRows];
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) {
        const std::uint8_t* p = codes[j] + s * Rows::kStepBytes;
        for (std::int64_t i = 0; i < Rows::kStepBytes; i += 64) __builtin_prefetch(p + ahead + i, 0, 2);
        step[j] = w.step(p, scale[j] + s * Dot::kStepChunks * Rows::kChunkScales);
      }
      sums.multiply(s, x, step);
    }
    if constexpr (Dot::kStepChunks > 1)
      if (whole != steps(w)) {
        typename Rows::QuantizedStep step[kRows];
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j)
          step[j] = w.half_step(codes[j] + whole * Rows::kStepBytes,
                                scale[j] + whole * Dot::kStepChunks * Rows::kChunkScales);
        sums.multiply(whole, x, step);
      }
    sums.finish(n, kRows, lora, out);
  }
  // The same for `count` rows of any kind.
  template <int kM, class Rows>
  static void ragged_rows(const Rows& w, std::int64_t n, int count, const float* x, const LowRank* lora, float* out) {
    Sums<kM> sums;
    w.template steps<kRowsOf<kM>>(n, count, [&](std::int64_t s, const auto& step) {
      // In registers: as far as the compiler knows x might lie where the sums do, and each had to be stored at once.
      Sums<kM> copy = sums;
      copy.multiply(s, x, step);
      sums = copy;
    });
    sums.finish(n, count, lora, out);
  }

  // write(m, n, count, sums) for all rows of W, kGroup of them at most. `w` must live until the stage has run.
  template <int kM, class Rows, class Write>
  static auto product(const Rows& w, const float* x, const LowRank* lora, Write write) {
    constexpr int kRows = kRowsOf<kM>;
    static_assert(kGroup % kRows == 0);
    const std::int64_t row_scales = w.cols() / kChunk * Rows::kChunkScales;
    const std::int64_t tiles = ceil_div(w.rows(), std::int64_t{kRows});
    const std::int64_t task_rows = ceil_div(tiles, num_threads() * kTasksOfThread) * kRows;
    const auto multiply = [=, &w](std::int64_t task) {
      // [tile][m][row of the tile]; the last tile is written with up to three floats too many
      float sums[kM * kGroup + 3], of_row[kGroup] = {};
      float* scales = nullptr;
      if constexpr (Rows::kQuantized)
        if (w.aligned())
          scales = reinterpret_cast<float*>(
              scratch(Slot::thread, static_cast<std::size_t>(kGroup * row_scales) * sizeof(float)));
      const std::int64_t end = smaller((task + 1) * task_rows, w.rows());
      for (std::int64_t first = task * task_rows; first < end; first += kGroup) {
        const int count = static_cast<int>(smaller<std::int64_t>(kGroup, end - first));
        int whole = 0;
        if constexpr (Rows::kQuantized)
          if (scales != nullptr) {
            w.prefetch_scales(first + count, kGroup, 0, w.cols() / kChunk);
            w.chunk_scales(first, count, 0, w.cols() / kChunk, scales, row_scales);
            whole = count / kRows * kRows;
            for (int j = 0; j < whole; j += kRows)
              whole_rows<kM>(w, first + j, scales + j * row_scales, x, lora, sums + j * kM);
          }
        for (int j = whole; j < count; j += kRows)
          ragged_rows<kM>(w, first + j, smaller(kRows, count - j), x, lora, sums + j * kM);
        for (int m = 0; m < kM; ++m) {
          for (int j = 0; j < count; j += kRows)
            __builtin_memcpy(of_row + j, sums + j * kM + m * kRows, kRows * sizeof(float));
          write(m, first, count, of_row);
        }
      }
    };
    return Stage{ceil_div(w.rows(), task_rows), multiply};
  }
  // Calls f with the number of rows of x as a compile-time constant.
  template <class F>
  static void with_rows_of_x(int rows, F&& f) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
      ((rows == i + 1 ? f(std::integral_constant<int, i + 1>()) : void()), ...);
    }(std::make_integer_sequence<int, kMostFewRows>());
  }

  template <class Rows>
  static void forward(const Rows& w, const LinearForwardArgs& args) {
    const int rows = static_cast<int>(args.x.rows);
    const std::int64_t rank = args.lora.rank;
    const std::int64_t padded_rank = ceil_div(rank, kLanes) * kLanes;
    const std::int64_t x_floats = steps(w) * rows * kStepUnits;
    const Dropout dropout = dropout_of(args.lora);
    float* x = reinterpret_cast<float*>(scratch(
        Slot::call, static_cast<std::size_t>(x_floats * (dropout ? 2 : 1) + rows * padded_rank) * sizeof(float)));
    pack(DenseRows<Dot, false>(args.x), rows, x);
    LowRank lora{lora_b(args.lora, args.weight.N), args.lora.scaling, nullptr, padded_rank};
    float* dropped = x;
    float* u = x + x_floats;
    if (rank > 0) {
      if (dropout) {
        dropped = x + x_floats;
        u = dropped + x_floats;
        pack(DenseRows<Dot, false>(args.x, 1.0f, dropout), rows, dropped);
      }
      __builtin_memset(u, 0, static_cast<std::size_t>(rows * padded_rank) * sizeof(float));
      lora.u = u;
    }
    const DenseRows<Dot, false> a(lora_a(args.lora, args.x.cols));
    const auto write_u = [&args, u, padded_rank](int m, std::int64_t first, int count, const float* sums) {
      const F32 scale = set1(dropout_scale(args.lora));
      for (int r = 0; r < count; r += kLanes) {
        const int lanes = smaller(kLanes, count - r);
        // U is rounded like any operand of a product.
        const F32 value = round_to<Dot::kActivation>(mul(load(sums + r), scale));
        store_from_f32<DType::f32>(u + m * padded_rank + first + r, value, lanes);
        if (args.u.data != nullptr) store_elements(args.u, m, first + r, value, lanes);
      }
    };
    const auto write_y = [&args](int m, std::int64_t first, int count, const float* sums) {
      for (int j = 0; j < count; j += kLanes) {
        const int lanes = smaller(kLanes, count - j);
        store_elements(args.y, m, first + j, add(load(sums + j), bias(args, first + j, lanes)), lanes);
      }
    };
    with_rows_of_x(rows, [&](auto kM) {
      const auto y = product<kM>(w, x, rank > 0 ? &lora : nullptr, write_y);
      if (rank > 0)
        parallel_stages(product<kM>(a, dropped, nullptr, write_u), y);
      else
        parallel_stages(y);
    });
  }

 private:
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));

  static void store_elements(Matrix out, std::int64_t row, std::int64_t col, F32 values, int count) {
    store_from_f32<Dot::kActivation>(static_cast<char*>(out.data) + (row * out.stride + col) * kSize, values, count);
  }
  static F32 bias(const LinearForwardArgs& args, std::int64_t n, int count) {
    if (args.bias == nullptr) return zero();
    return load_as_f32<Dot::kActivation>(static_cast<const char*>(args.bias) + n * kSize, count);
  }
};

}  // namespace
}  // namespace qlora_native
