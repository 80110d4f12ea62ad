// C[M,K] = L[M,N] . W[N,K]: lanes along the columns of W, units of L broadcast. A unit spans kElementsPerUnit rows of
// W (two bfloat16, one float).
//
//   packed L   groups of kGroupRows rows; a group is [unit][row]
//   panel      the decoded columns of W, [chunk][unit][64 columns]
//   sums       fp32, [group][chunk][row of the group][64 columns], in the order that decoding left (Dot::to_natural)
#pragma once

namespace qlora_native {
namespace {

template <class Dot>
struct ProductNn {
  using Chunk = typename Dot::Chunk;
  static constexpr std::int64_t kPanelFloats = kPanelBytes / 4;
  static constexpr std::int64_t kMostSums = 160 << 10;  // floats; with the panel below 1 MB a thread

  // Rows of L go in groups whose sizes differ by at most one.
  struct Groups {
    explicit Groups(std::int64_t rows) : rows(rows), count(ceil_div(rows, kGroupRows)) {}
    std::int64_t first(std::int64_t group) const { return group * (rows / count) + smaller(group, rows % count); }
    int size(std::int64_t group) const { return static_cast<int>(first(group + 1) - first(group)); }
    std::int64_t rows, count;
  };

  // An adapter's part of the sums, added before the product's own: mask o (V . A).
  struct LowRank {
    const float* v = nullptr;  // packed
    std::int64_t units = 0;
    DenseRows<Dot, false> a;
    Dropout dropout;
    std::int64_t first_row = 0;
  };

  static std::int64_t units_of(std::int64_t inner) { return ceil_div(inner, Dot::kElementsPerUnit); }

  static void pack(ConstMatrix left, const Groups& groups, float* out) {
    const DenseRows<Dot, true> rows(left);
    const std::int64_t units = units_of(left.cols), chunks = ceil_div(left.cols, kChunk);
    parallel_for(groups.count, [&](std::int64_t group) {
      float* packed = out + group * units * kGroupRows;
      for (int row = 0; row < groups.size(group); ++row)
        rows.template chunks<1>(groups.first(group) + row, 1, 0, chunks, [&](std::int64_t c, const Chunk(&chunk)[1]) {
          alignas(64) float natural[Dot::kUnits];
          for (int i = 0; i < Dot::kVectors; ++i) store(natural + i * kLanes, chunk[0].v[i]);
          const std::int64_t count = smaller<std::int64_t>(Dot::kUnits, units - c * Dot::kUnits);
          for (std::int64_t unit = 0; unit < count; ++unit)
            packed[(c * Dot::kUnits + unit) * kGroupRows + row] = natural[unit];
        });
    });
  }

  // Units u0 ... u1-1 (rows of W), chunks c0 ... c1-1 (columns).
  template <class Rows>
  static void decode_panel(const Rows& w, std::int64_t u0, std::int64_t u1, std::int64_t c0, std::int64_t c1,
                           float* panel) {
    constexpr int kRows = Dot::kElementsPerUnit;
    for (std::int64_t unit = u0; unit < u1; ++unit) {
      const int count = static_cast<int>(smaller<std::int64_t>(kRows, w.rows() - unit * kRows));
      w.template chunks<kRows>(unit * kRows, count, c0, c1, [&](std::int64_t c, const Chunk(&chunk)[kRows]) {
        const typename Dot::Columns columns = to_columns<Rows::kNatural>(chunk);
        float* out = panel + ((c - c0) * (u1 - u0) + (unit - u0)) * kChunk;
        for (int i = 0; i < Dot::kColumnVectors; ++i) store(out + i * kLanes, columns.v[i]);
      });
    }
  }

  // The codes of the next panel, asked for while this one multiplies.
  struct Ahead {
    const std::uint8_t* codes = nullptr;  // null: nothing
    std::int64_t row_bytes = 0;
  };

  // One register tile: kRows rows of L times kVectors vectors of columns.
  template <int kRows, int kVectors>
  static void tile(const float* left, const float* panel, std::int64_t units, float* sums, bool accumulate,
                   const Ahead& ahead) {
    F32 sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
    const auto step = [&](std::int64_t unit) {
      F32 columns[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) columns[j] = load(panel + unit * kChunk + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const F32 value = set1(left[unit * kGroupRows + i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = Dot::dot(sum[i][j], value, columns[j]);
      }
    };
    if (ahead.codes != nullptr) {
      const std::uint8_t* row = ahead.codes;
      for (std::int64_t unit = 0; unit < units; ++unit) {
        for (int i = 0; i < Dot::kElementsPerUnit; ++i, row += ahead.row_bytes) __builtin_prefetch(row, 0, 2);
        step(unit);
      }
    } else {
      for (std::int64_t unit = 0; unit < units; ++unit) step(unit);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* out = sums + i * kChunk + j * kLanes;
        store(out, accumulate ? add(load(out), sum[i][j]) : sum[i][j]);
      }
  }

  template <int kRows>
  static void group(const float* left, const float* panel, std::int64_t units, int vectors, float* sums,
                    bool accumulate, Ahead ahead) {
    for (int j = 0; j < vectors; j += kColumnStep) {
      const float* columns = panel + j * kLanes;
      float* out = sums + j * kLanes;
      if (vectors - j == 1)
        tile<kRows, 1>(left, columns, units, out, accumulate, ahead);
      else if (vectors - j == 2 || kColumnStep == 2)
        tile<kRows, 2>(left, columns, units, out, accumulate, ahead);
      else
        tile<kRows, kColumnStep>(left, columns, units, out, accumulate, ahead);
      ahead.codes = nullptr;
    }
  }
  static void group(int rows, const float* left, const float* panel, std::int64_t units, int vectors, float* sums,
                    bool accumulate, Ahead ahead) {
    static_assert(kGroupRows == 6);
    switch (rows) {
      case 1: return group<1>(left, panel, units, vectors, sums, accumulate, ahead);
      case 2: return group<2>(left, panel, units, vectors, sums, accumulate, ahead);
      case 3: return group<3>(left, panel, units, vectors, sums, accumulate, ahead);
      case 4: return group<4>(left, panel, units, vectors, sums, accumulate, ahead);
      case 5: return group<5>(left, panel, units, vectors, sums, accumulate, ahead);
      default: return group<6>(left, panel, units, vectors, sums, accumulate, ahead);
    }
  }

  // All units of `left` times the columns c0 ... c1-1 of w, for the groups g0 ... g1-1.
  template <class Rows>
  static void multiply(const Rows& w, const Groups& groups, std::int64_t g0, std::int64_t g1, std::int64_t c0,
                       std::int64_t c1, const float* left, float* panel, float* sums, bool accumulate) {
    const std::int64_t units = units_of(w.rows()), width = c1 - c0;
    const std::int64_t step =
        smaller<std::int64_t>(kPanelFloats / kChunk / width, Dot::kRestart / Dot::kElementsPerUnit);
    for (std::int64_t u = 0; u < units; u += step) {
      const std::int64_t end = smaller(u + step, units);
      decode_panel(w, u, end, c0, c1, panel);
      for (std::int64_t c = c0; c < c1; ++c) {
        const std::int64_t columns = smaller<std::int64_t>(kChunk, w.cols() - c * kChunk);
        const int vectors =
            Rows::kNatural ? static_cast<int>(ceil_div(columns, kLanes)) : static_cast<int>(Dot::kColumnVectors);
        // Two chunks of codes share a cache line, as a rule.
        Ahead ahead{nullptr, w.row_bytes()};
        if (end < units && (c - c0) % 2 == 0) ahead.codes = w.codes_at(end * Dot::kElementsPerUnit, c);
        for (std::int64_t g = g0; g < g1; ++g) {
          group(groups.size(g), left + (g * units + u) * kGroupRows, panel + (c - c0) * (end - u) * kChunk, end - u,
                vectors, sums_of(sums, g - g0, c - c0, width), accumulate || u != 0, ahead);
          ahead.codes = nullptr;
        }
      }
    }
  }

  // left . w, each row and chunk of the result handed to write(row, first column, sums in natural order).
  template <class Rows, class Write>
  static void run(const float* left, const Groups& groups, const Rows& w, const LowRank* lora, Write&& write) {
    const std::int64_t chunks = ceil_div(w.cols(), kChunk);
    // Few rows: wide tiles, so that each row of W is read in long stretches.
    const std::int64_t widest = groups.rows >= 256 ? 4 : groups.rows >= 64 ? 8 : 16;
    const std::int64_t most_groups = kMostSums / (widest * kChunk * kGroupRows);
    const std::int64_t fewest_groups = 128 / kGroupRows;
    Grid grid = make_grid(groups.count, 1, fewest_groups, chunks, widest, 1, num_threads());
    if (grid.row_part > most_groups) {
      grid.row_part = most_groups;
      grid.row_parts = ceil_div(groups.count, most_groups);
    }
    parallel_for(grid.row_parts * grid.column_tiles, [&](std::int64_t task) {
      const std::int64_t g0 = task % grid.row_parts * grid.row_part;
      const std::int64_t g1 = smaller(g0 + grid.row_part, groups.count);
      const std::int64_t c0 = task / grid.row_parts * grid.column_tile;
      const std::int64_t c1 = smaller(c0 + grid.column_tile, chunks), width = c1 - c0;
      float* panel = reinterpret_cast<float*>(
          scratch(Slot::thread, static_cast<std::size_t>(kPanelFloats + (g1 - g0) * width * kGroupRows * kChunk) *
                                    sizeof(float)));
      float* sums = panel + kPanelFloats;
      if (lora != nullptr) {
        multiply(lora->a, groups, g0, g1, c0, c1, lora->v, panel, sums, false);
        if (lora->dropout) drop(*lora, groups, g0, g1, c0, c1, sums);
      }
      multiply(w, groups, g0, g1, c0, c1, left, panel, sums, lora != nullptr);
      for (std::int64_t g = g0; g < g1; ++g)
        for (int row = 0; row < groups.size(g); ++row)
          for (std::int64_t c = c0; c < c1; ++c) {
            F32 natural[Dot::kColumnVectors];
            const float* from = sums_of(sums, g - g0, c - c0, width) + row * kChunk;
            for (int i = 0; i < Dot::kColumnVectors; ++i) natural[i] = load(from + i * kLanes);
            if (!Rows::kNatural) Dot::to_natural(natural);
            write(groups.first(g) + row, c * kChunk, natural);
          }
    });
  }

 private:
  static float* sums_of(float* sums, std::int64_t group, std::int64_t chunk, std::int64_t width) {
    return sums + (group * width + chunk) * kGroupRows * kChunk;
  }

  template <bool kNatural, int kRows>
  static typename Dot::Columns to_columns(const Chunk (&chunk)[kRows]) {
    if constexpr (kRows == 1)
      return kNatural ? Dot::columns_natural(chunk[0]) : Dot::columns(chunk[0]);
    else
      return kNatural ? Dot::columns_natural(chunk[0], chunk[1]) : Dot::columns(chunk[0], chunk[1]);
  }

  static void drop(const LowRank& lora, const Groups& groups, std::int64_t g0, std::int64_t g1, std::int64_t c0,
                   std::int64_t c1, float* sums) {
    for (std::int64_t g = g0; g < g1; ++g)
      for (int row = 0; row < groups.size(g); ++row)
        for (std::int64_t c = c0; c < c1; ++c) {
          const std::uint64_t keep = lora.dropout.keep_bits(lora.first_row + groups.first(g) + row, c);
          float* p = sums_of(sums, g - g0, c - c0, c1 - c0) + row * kChunk;
          for (int i = 0; i < Dot::kColumnVectors; ++i)
            store(p + i * kLanes, Dot::keep_columns(load(p + i * kLanes), i, keep));
        }
  }
};

}  // namespace
}  // namespace qlora_native
