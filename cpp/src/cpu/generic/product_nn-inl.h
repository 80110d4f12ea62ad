// C[M,K] = L[M,N] . W[N,K]: lanes along the columns of W, units of L broadcast. A unit spans kElementsPerUnit rows of
// W (two bfloat16, one float).
//
//   packed L   [row][unit], packed_stride(units) apart
//   panel      the decoded columns of W, [chunk][unit][64 columns]
//   sums       fp32, [group][chunk][row of the group][64 columns], in the order that decoding left (Dot::to_natural)
//
// With tiles, packed L is A, a quarter of a chunk of the panel is B, and the sums are C (tiles-inl.h).
#pragma once

#include <span>

#include "cpu/blocking.h"
#include "cpu/generic/panel_pipeline-inl.h"
#include "cpu/generic/tiles-inl.h"
#include "cpu/scratch.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class DotOf>
struct ProductNn {
  using Dot = DotOf;
  using Chunk = typename Dot::Chunk;
  using Tiles = typename TilesOf<Dot>::type;
  static constexpr bool kByTiles = kTiled<Dot>;
  // Rows of L that are multiplied together: what registers hold, or two tiles.
  static constexpr int kGroup = kByTiles ? 2 * kTileRows : kGroupRows;
  // Units are multiplied so many at a time; a panel has zeros up to the next multiple.
  static constexpr std::int64_t kStepUnits = kByTiles ? kTileUnits : 1;
  static std::int64_t whole_steps(std::int64_t units) { return ceil_div(units, kStepUnits) * kStepUnits; }
  // How the columns are cut. Few rows: wide tiles, so that each row of W is read in long stretches; also of ragged W,
  // which is not asked for ahead. Many rows: many units, so that the sums are added to rarely. Two panels and the sums
  // stay below 1 MB.
  struct Tiling {
    std::int64_t chunks;  // of a tile, at most
    std::int64_t tasks_per_thread;
    std::int64_t tuned_chunks = chunks;  // where the second-level cache has the size of kTunedSecondLevel

    // Units of a panel. Sums in fp32 start afresh with each, so it must not depend on how wide a task's tile really is,
    // which follows the number of threads and the cache.
    constexpr std::int64_t step() const {
      return smaller<std::int64_t>(kPanelFloats / kChunk / tuned_chunks, Dot::kBlock / Dot::kElementsPerUnit);
    }
  };
  static Tiling tiling(std::int64_t rows, bool ragged) {
    Tiling tuned{rows <= 256 || kByTiles ? 4 : 2, kTasksPerThread};
    if (rows <= (ragged && kOneChain ? 32 : 8))
      tuned = {32, 1};
    else if (ragged && rows <= 96)
      tuned = {16, 2};
    return {for_second_level(tuned.chunks, 1, caches()), tuned.tasks_per_thread, tuned.chunks};
  }
  // Whether a sum goes on from panel to panel, or each panel's are added to those before: of N terms in fp32 the error
  // would outgrow an fp32 result.
  static constexpr bool kOneChain = Dot::kActivation == DType::bf16;
  // Panels of the widest tiles are shorter than kRestart, so there are more of them, and the error grows with their
  // number: the sums of so many panels make a total.
  static constexpr std::int64_t kPanelsOfTotal = 16;
  static constexpr std::int64_t kPanelFloats = 64 << 10;
  static constexpr std::int64_t kMostSums = 128 << 10;  // floats

  // Rows of L go in groups, whose sizes differ by at most one; groups of tiles are whole, but for the last.
  struct Groups {
    explicit Groups(std::int64_t rows) : rows(rows), count(ceil_div(rows, kGroup)) {}
    std::int64_t first(std::int64_t group) const {
      if (kByTiles) return smaller(group * kGroup, rows);
      return group * (rows / count) + smaller(group, rows % count);
    }
    int size(std::int64_t group) const { return static_cast<int>(first(group + 1) - first(group)); }
    // Where a group begins in packed L. Those rows of a last tile that are past the end are zero.
    std::int64_t first_packed(std::int64_t group) const {
      if (group < count) return first(group);
      return kByTiles ? ceil_div(rows, kTileRows) * kTileRows : rows;
    }
    std::int64_t packed_rows() const { return first_packed(count); }
    std::int64_t rows, count;
  };
  // The groups that have one of these rows, looked for from group `from` on.
  static Range groups_of(const Groups& groups, Range rows, std::int64_t from) {
    while (groups.first(from + 1) <= rows.begin) ++from;
    Range range{from, from + 1};
    while (groups.first(range.end) < rows.end) ++range.end;
    return range;
  }

  // One adapter's part of the sums of its groups, added before the product's own: V . A.
  struct LowRank {
    float* v = nullptr;  // packed, from the first row of the first group on; zero in rows of other adapters
    std::int64_t units = 0;
    DenseRows<Dot, false> a;
    Range groups;
  };
  // Those of a product: mask o (the sum of all).
  struct LowRanks {
    std::span<const LowRank> parts;
    Dropout dropout;
    std::int64_t first_row = 0;  // the row that dropout counts for the first one of L
  };

  static std::int64_t units_of(std::int64_t inner) { return ceil_div(inner, Dot::kElementsPerUnit); }

  // Whole chunks, and not a power of two: rows a power of two apart would share few cache sets.
  static std::int64_t packed_stride(std::int64_t units) { return ceil_div(units, Dot::kUnits) * Dot::kUnits + kLanes; }

  // Packed rows of L, from row `first` on.
  struct Packed {
    const float* data;
    std::int64_t stride;
    std::int64_t first = 0;
    const float* row(std::int64_t r) const { return data + (r - first) * stride; }
  };
  // Some rows of left, one after another from `out` on; those that left has not are zero.
  static void pack(ConstMatrix left, Range of, float* out) {
    const DenseRows<Dot, true> rows(left);
    const std::int64_t stride = packed_stride(units_of(left.cols));
    const Range chunks{0, ceil_div(left.cols, kChunk)};
    for (std::int64_t row = of.begin; row < of.end; ++row, out += stride)
      rows.template chunks<1>(row, row >= 0 && row < rows.rows(), chunks, [&](std::int64_t c, const Chunk(&chunk)[1]) {
        for (int i = 0; i < Dot::kVectors; ++i) store(out + c * Dot::kUnits + i * kLanes, chunk[0].v[i]);
      });
  }

  // Columns of W, [chunk][unit][64 columns], and zeros after the units up to a whole step.
  struct Panel {
    using Chunk = typename Dot::Chunk;
    static constexpr int kLineRows = Dot::kElementsPerUnit;
    static constexpr bool kLineAfterLine = false;
    static constexpr std::int64_t kMostScaledChunks = kPanelFloats / kChunk * kLineRows;
    Range lines, chunks;  // lines are units
    float* data;

    std::int64_t units() const { return whole_steps(lines.count()); }
    static std::int64_t line_stride() { return kChunk; }
    std::int64_t chunk_stride() const { return units() * kChunk; }
    const float* columns(std::int64_t chunk) const { return data + (chunk - chunks.begin) * chunk_stride(); }

    template <bool kNatural>
    [[gnu::always_inline]] static void write(const Chunk (&chunk)[kLineRows], float* out) {
      const typename Dot::Columns columns = to_columns<kNatural>(chunk);
      for (int i = 0; i < Dot::kColumnVectors; ++i) store(out + i * kLanes, columns.v[i]);
    }
    void clear_rest() const {
      const std::int64_t zeros = units() - lines.count();
      for (std::int64_t chunk = 0; chunk < chunks.count() && zeros > 0; ++chunk)
        __builtin_memset(data + chunk * chunk_stride() + lines.count() * kChunk, 0,
                         static_cast<std::size_t>(zeros * kChunk) * sizeof(float));
    }
  };

  // What a task computes: some of the groups, some chunks of columns.
  struct Part {
    const Groups& all_groups;
    Range groups, chunks;
    std::int64_t panel_units;
    float* panels;  // two
    float* sums;
    float* totals;  // as sums, or null: sums go on to the end

    std::int64_t floats() const { return groups.count() * chunks.count() * kGroup * kChunk; }
    float* sums_of(std::int64_t group, std::int64_t chunk) const { return at(sums, group, chunk); }
    float* at(float* data, std::int64_t group, std::int64_t chunk) const {
      return data + ((group - groups.begin) * chunks.count() + (chunk - chunks.begin)) * kGroup * kChunk;
    }
    // What it has of these groups; nothing if they are others.
    Part within(Range range) const {
      Part part = *this;
      part.groups = {larger(groups.begin, range.begin), smaller(groups.end, range.end)};
      if (part.groups.begin >= part.groups.end) return part;
      part.sums = at(sums, part.groups.begin, chunks.begin);
      if (totals != nullptr) part.totals = at(totals, part.groups.begin, chunks.begin);
      return part;
    }
  };

  // Adds all units of `left` times w to the part's sums, or sets them.
  template <class Rows>
  static void multiply(Tiles& tiles, const Rows& w, const Packed& left, const Part& part, bool accumulate) {
    const std::int64_t units = units_of(w.rows());
    const std::int64_t step = whole_steps(ceil_div(units, ceil_div(units, part.panel_units)));  // panels of equal size
    const std::int64_t panels = ceil_div(units, step);
    const auto panel_of = [&](std::int64_t i) {
      return Panel{.lines = {i * step, smaller((i + 1) * step, units)},
                   .chunks = part.chunks,
                   .data = part.panels + i % 2 * kPanelFloats};
    };
    const bool has_totals = part.totals != nullptr && panels > kPanelsOfTotal;
    multiply_panels(w, panels, panel_of, [&](std::int64_t i, const Panel& panel, auto& decoding) {
      const bool afresh = has_totals && i != 0 && i % kPanelsOfTotal == 0;
      if (afresh) add_sums(part, part.sums, part.totals, i != kPanelsOfTotal);
      multiply_panel<Rows>(tiles, w.cols(), left, panel, part, !afresh && (accumulate || i != 0), decoding);
    });
    if (has_totals) add_sums(part, part.totals, part.sums, true);
  }

  // How left . w is cut into tasks, for some of the groups of left's rows.
  struct Cut {
    Tiling tiling{};
    Grid grid{};
    Range groups{};
    std::int64_t tasks() const { return grid.row_parts * grid.column_tiles; }
  };
  template <class Rows>
  static Cut cut(const Groups& groups, Range range, const Rows& w, std::int64_t threads) {
    const Tiling cut = tiling(groups.rows, Rows::kQuantized && !w.aligned());
    const std::int64_t most_groups =
        larger<std::int64_t>(for_second_level(kMostSums, 1, caches()) / (cut.chunks * kChunk * kGroup), 1);
    const std::int64_t fewest_groups = 128 / kGroup;
    const Grid grid = make_grid(range.count(), ceil_div(w.cols(), kChunk),
                                {most_groups, fewest_groups, cut.chunks, 1, 1}, threads, cut.tasks_per_thread);
    return {cut, grid, range};
  }

  // A task of left . w: each row and chunk of the result is handed to write(row, first column, sums in natural order).
  template <class Rows, class Write>
  static void product(const Cut& cut, std::int64_t task, const float* left, const Groups& groups, const Rows& w,
                      const LowRanks& lora, const Write& write) {
    const Grid& grid = cut.grid;
    const std::int64_t g0 = cut.groups.begin + task % grid.row_parts * grid.row_part;
    const std::int64_t c0 = task / grid.row_parts * grid.column_tile;
    Part part{.all_groups = groups,
              .groups = {g0, smaller(g0 + grid.row_part, cut.groups.end)},
              .chunks = {c0, smaller(c0 + grid.column_tile, ceil_div(w.cols(), kChunk))},
              .panel_units = cut.tiling.step()};
    const bool has_totals = !kOneChain && part.panel_units < Dot::kRestart / Dot::kElementsPerUnit;
    part.panels = scratch_floats(Slot::thread, 2 * kPanelFloats + (has_totals ? 2 : 1) * part.floats());
    part.sums = part.panels + 2 * kPanelFloats;
    part.totals = has_totals ? part.sums + part.floats() : nullptr;
    Tiles tiles;
    const bool begun = add_low_rank(tiles, lora, part);
    multiply(tiles, w, {left, packed_stride(units_of(w.rows()))}, part, begun);
    for (std::int64_t g = part.groups.begin; g < part.groups.end; ++g)
      for (int row = 0; row < groups.size(g); ++row)
        for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
          F32 natural[Dot::kColumnVectors];
          const float* from = part.sums_of(g, c) + row * kChunk;
          for (int i = 0; i < Dot::kColumnVectors; ++i) natural[i] = load(from + i * kLanes);
          if (!Rows::kNatural) Dot::to_natural(natural);
          write(groups.first(g) + row, c * kChunk, natural);
        }
  }

 private:
  // Begins the sums of a part with what its adapters give, and says whether there is an adapter.
  static bool add_low_rank(Tiles& tiles, const LowRanks& lora, const Part& part) {
    if (lora.parts.empty()) return false;
    const Range covered = lora.parts.front().groups;
    // The only adapter of all groups sets the sums; several add to them.
    const bool covers = lora.parts.size() == 1 && covered.begin <= part.groups.begin && covered.end >= part.groups.end;
    if (!covers) __builtin_memset(part.sums, 0, static_cast<std::size_t>(part.floats()) * sizeof(float));
    for (const LowRank& of : lora.parts) {
      const Part own = part.within(of.groups);
      if (own.groups.begin >= own.groups.end) continue;
      const Packed v{of.v, packed_stride(units_of(of.a.rows())), part.all_groups.first(of.groups.begin)};
      multiply(tiles, of.a, v, own, !covers);
    }
    if (lora.dropout) drop(lora, part);
    return true;
  }

  // The vectors of a chunk whose columns w has; decoding spreads its columns over all of them.
  template <class Rows>
  static int vectors_of(std::int64_t chunk, std::int64_t cols) {
    if (!Rows::kNatural) return Dot::kColumnVectors;
    return static_cast<int>(ceil_div(smaller<std::int64_t>(kChunk, cols - chunk * kChunk), kLanes));
  }

  template <class Rows, class Decoding>
  static void multiply_panel(Tiles& tiles, std::int64_t cols, const Packed& left, const Panel& panel, const Part& part,
                             bool accumulate, Decoding& decoding) {
    if constexpr (kByTiles) {
      return multiply_panel_by_tiles<Rows>(tiles, cols, left, panel, part, accumulate, decoding);
    } else {
      NoDecoder none;
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c)
        for (std::int64_t g = part.groups.begin; g < part.groups.end; ++g) {
          const GroupOfChunk operands{.left = left.row(part.all_groups.first(g)) + panel.lines.begin,
                                      .stride = left.stride,
                                      .columns = panel.columns(c),
                                      .units = panel.units(),
                                      .vectors = vectors_of<Rows>(c, cols),
                                      .sums = part.sums_of(g, c),
                                      .accumulate = accumulate};
          with_constant<kGroupRows>(part.all_groups.size(g), [&](auto rows) {
            if (g == part.groups.begin)
              multiply_group<rows>(operands, decoding);
            else
              multiply_group<rows>(operands, none);
          });
        }
    }
  }

  // A group of rows of L times a chunk of a panel.
  struct GroupOfChunk {
    const float* left;
    std::int64_t stride;   // from one of its rows to the next
    const float* columns;  // [unit][64 columns]
    std::int64_t units;
    int vectors;
    float* sums;
    bool accumulate;
  };
  template <int kRows, class Decoding>
  static void multiply_group(const GroupOfChunk& of, Decoding& decoding) {
    constexpr std::int64_t kChain = Dot::kRestart / Dot::kElementsPerUnit;
    constexpr int kStep = std::is_same_v<Decoding, NoDecoder> ? kColumnStep : kDecodingColumnStep;
    for (int j = 0; j < of.vectors; j += kStep)
      for (std::int64_t unit = 0; unit < of.units; unit += kChain) {
        const auto multiply = [&](auto vectors) {
          // A group has a tile for every kDecodingColumnStep vectors of a chunk, and a step decodes two chunks of a
          // unit.
          constexpr std::int64_t kDecodingUnits = 2 * Dot::kColumnVectors / kDecodingColumnStep;
          multiply_register_tile<ProductNn, kRows, vectors, kOneChain, kDecodingUnits>(
              Strided{of.left + unit, of.stride},
              Strided{of.columns + unit * kChunk + j * kLanes, FixedStride<kChunk>()}, smaller(kChain, of.units - unit),
              Strided{of.sums + j * kLanes, FixedStride<kChunk>()}, of.accumulate || unit != 0, decoding);
        };
        if (of.vectors - j == 1)
          multiply(std::integral_constant<int, 1>());
        else if (of.vectors - j == 2 || kStep == 2)
          multiply(std::integral_constant<int, 2>());
        else
          multiply(std::integral_constant<int, kStep>());
      }
  }

  // The columns of two tiles for all groups, one after another: their part of the panel stays in the first-level cache.
  template <class Rows, class Decoding>
  static void multiply_panel_by_tiles(Tiles& tiles, std::int64_t cols, const Packed& left, const Panel& panel,
                                      const Part& part, bool accumulate, Decoding& decoding) {
    const std::int64_t units = panel.units();
    const auto multiply_with = [&](auto& meanwhile) {
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
        const int column_tiles = vectors_of<Rows>(c, cols);
        const auto block = [&](auto row_tiles, auto tile_columns, std::int64_t g, int first) {
          multiply_tiles<row_tiles, tile_columns>(
              tiles,
              {left.row(part.all_groups.first(g)) + panel.lines.begin, left.stride, kTileRows * left.stride,
               kTileUnits},
              {panel.columns(c) + first * kLanes, kChunk, kLanes, kTileUnits * kChunk}, units,
              {part.sums_of(g, c) + first * kLanes, kChunk, kTileRows * kChunk, kLanes}, accumulate, meanwhile);
        };
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        constexpr std::integral_constant<int, 4> four;
        const bool one_tile_high = part.groups.count() == 1 && part.all_groups.size(part.groups.begin) <= kTileRows;
        if (one_tile_high && column_tiles == 4) {
          block(one, four, part.groups.begin, 0);
          continue;
        }
        for (int first = 0; first < column_tiles; first += 2)
          for (std::int64_t g = part.groups.begin; g < part.groups.end; ++g) {
            const bool high = part.all_groups.size(g) > kTileRows, wide = first + 2 <= column_tiles;
            if (high)
              wide ? block(two, two, g, first) : block(two, one, g, first);
            else
              wide ? block(one, two, g, first) : block(one, one, g, first);
          }
      }
    };
    if constexpr (std::is_same_v<Decoding, NoDecoder>) {
      multiply_with(decoding);
    } else {
      // Decoding takes longer than one group's products, so all groups share it. A block has two tiles of sums or more.
      const std::int64_t rows = part.all_groups.first(part.groups.end) - part.all_groups.first(part.groups.begin);
      const std::int64_t products =
          ceil_div(rows, kTileRows) * part.chunks.count() * (kChunk / kLanes) * (units / kTileUnits);
      Paced<Decoding> paced{decoding, ceil_div(4 * decoding.steps(), products)};
      multiply_with(paced);
    }
  }

  template <bool kNatural, int kRows>
  static typename Dot::Columns to_columns(const Chunk (&chunk)[kRows]) {
    if constexpr (kRows == 1)
      return kNatural ? Dot::columns_natural(chunk[0]) : Dot::columns(chunk[0]);
    else
      return kNatural ? Dot::columns_natural(chunk[0], chunk[1]) : Dot::columns(chunk[0], chunk[1]);
  }

  // Copies all sums of a part, or adds them to what is there.
  static void add_sums(const Part& part, const float* from, float* to, bool accumulate) {
    for (std::int64_t g = part.groups.begin; g < part.groups.end; ++g)
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
        const std::int64_t first = part.sums_of(g, c) - part.sums;
        for (std::int64_t i = first; i < first + part.all_groups.size(g) * kChunk; i += kLanes)
          store(to + i, accumulate ? add(load(to + i), load(from + i)) : load(from + i));
      }
  }

  static void drop(const LowRanks& lora, const Part& part) {
    for (std::int64_t g = part.groups.begin; g < part.groups.end; ++g)
      for (int row = 0; row < part.all_groups.size(g); ++row)
        for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
          const std::uint64_t keep = lora.dropout.keep_bits(lora.first_row + part.all_groups.first(g) + row, c);
          float* p = part.sums_of(g, c) + row * kChunk;
          for (int i = 0; i < Dot::kColumnVectors; ++i)
            store(p + i * kLanes, Dot::keep_columns(load(p + i * kLanes), i, keep));
        }
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
