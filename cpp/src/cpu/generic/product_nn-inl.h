// C[M,K] = L[M,N] . W[N,K]: lanes along the columns of W, units of L broadcast. A unit spans kElementsPerUnit rows of
// W (two bfloat16, one float).
//
//   packed L   [row][unit], packed_stride(units) apart
//   panel      the decoded columns of W, [chunk][unit][64 columns]
//   sums       fp32, [strip][chunk][row of the strip][64 columns], in the order that decoding leaves (Dot::to_natural)
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
  // Rows of a strip, which are multiplied together: as many as registers hold, or two tiles.
  static constexpr int kStripRows = kByTiles ? 2 * kTileRows : kMostRows;
  // So many units are multiplied at a time. A panel has zeros up to the next multiple.
  static constexpr std::int64_t kStepUnits = kByTiles ? kTileUnits : 1;
  static std::int64_t whole_steps(std::int64_t units) { return ceil_div(units, kStepUnits) * kStepUnits; }
  // How the columns are cut into tiles. With few rows tiles are wide, so that each row of W is read in long stretches.
  // The same holds for ragged W, which is not asked for ahead. With many rows panels are long, so that the sums are
  // added to rarely. Two panels and the sums stay below 1 MB.
  struct Tiling {
    std::int64_t chunks;  // of a tile, at most
    std::int64_t tasks_per_thread;
    std::int64_t tuned_chunks = chunks;  // of a tile, if the second-level cache has the size of kTunedSecondLevel

    // Units of a panel. Sums in fp32 start afresh with each panel, so its length must not depend on how wide the tile
    // of a task really is, which follows the number of threads and the cache.
    constexpr std::int64_t panel_units() const {
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
  // Whether a sum goes on from panel to panel. Else the sums of each panel are added to those before, because the error
  // of one sum of N terms would be too large for a result in fp32.
  static constexpr bool kOneChain = Dot::kActivation == DType::bf16;
  // Panels of the widest tiles are shorter than kRestart, so there are more of them, and the error grows with their
  // number. Therefore the sums of so many panels are added to a total.
  static constexpr std::int64_t kPanelsOfTotal = 16;
  static constexpr std::int64_t kPanelFloats = 64 << 10;
  static constexpr std::int64_t kMostSums = 128 << 10;  // floats

  // The strips that rows of L are cut into. Their sizes differ by at most one; with tiles they are whole, but for the
  // last.
  struct Strips {
    explicit Strips(std::int64_t rows) : rows(rows), count(ceil_div(rows, kStripRows)) {}
    std::int64_t first(std::int64_t strip) const {
      if (kByTiles) return smaller(strip * kStripRows, rows);
      return strip * (rows / count) + smaller(strip, rows % count);
    }
    int size(std::int64_t strip) const { return static_cast<int>(first(strip + 1) - first(strip)); }
    // Where a strip begins in packed L. A last tile has zeros after the last row.
    std::int64_t first_packed(std::int64_t strip) const {
      if (strip < count) return first(strip);
      return kByTiles ? ceil_div(rows, kTileRows) * kTileRows : rows;
    }
    std::int64_t packed_rows() const { return first_packed(count); }
    // The strips that have one of these rows; none before strip `from` does.
    Range of(Range these, std::int64_t from) const {
      while (first(from + 1) <= these.begin) ++from;
      Range strips{from, from + 1};
      while (first(strips.end) < these.end) ++strips.end;
      return strips;
    }
    std::int64_t rows, count;
  };

  // What one adapter adds to the sums of its strips: V . A.
  struct LowRank {
    float* v = nullptr;  // packed, from the first row of the first strip on; zero in rows of other adapters
    DenseRows<Dot, false> a;
    Range strips;
  };
  // What all adapters of a product add: mask o (the sum of their parts).
  struct LowRanks {
    std::span<const LowRank> parts;
    Dropout dropout;
    std::int64_t first_row = 0;  // what dropout counts the first row of L as
  };

  static std::int64_t units_of(std::int64_t inner) { return ceil_div(inner, Dot::kElementsPerUnit); }

  // Floats of a packed row: whole chunks, and no power of two, because rows that are a power of two apart share few
  // cache sets.
  static std::int64_t packed_stride(std::int64_t units) { return ceil_div(units, Dot::kUnits) * Dot::kUnits + kLanes; }

  // Packed rows of L, from row `first` on.
  struct Packed {
    const float* data;
    std::int64_t stride;
    std::int64_t first = 0;
    const float* row(std::int64_t r) const { return data + (r - first) * stride; }
  };
  // Packs some rows of left, one after another. Rows that left does not have become zero.
  static void pack(ConstMatrix left, Range rows, float* out) {
    const DenseRows<Dot, true> from(left);
    const std::int64_t stride = packed_stride(units_of(left.cols));
    const Range chunks{0, ceil_div(left.cols, kChunk)};
    for (std::int64_t row = rows.begin; row < rows.end; ++row, out += stride)
      from.template chunks<1>(row, row >= 0 && row < from.rows(), chunks, [&](std::int64_t c, const Chunk(&chunk)[1]) {
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

  // What a task computes: the sums of some strips and some chunks of columns.
  struct Part {
    const Strips& all_strips;
    Range strips, chunks;
    std::int64_t panel_units;
    float* panels;  // two
    float* sums;
    float* totals;  // laid out as sums, or null where sums go on to the end

    std::int64_t floats() const { return strips.count() * chunks.count() * kStripRows * kChunk; }
    float* sums_of(std::int64_t strip, std::int64_t chunk) const { return at(sums, strip, chunk); }
    float* at(float* data, std::int64_t strip, std::int64_t chunk) const {
      return data + ((strip - strips.begin) * chunks.count() + (chunk - chunks.begin)) * kStripRows * kChunk;
    }
    // What this part has of these strips, which may be nothing.
    Part within(Range range) const {
      Part part = *this;
      part.strips = {larger(strips.begin, range.begin), smaller(strips.end, range.end)};
      if (part.strips.begin >= part.strips.end) return part;
      part.sums = at(sums, part.strips.begin, chunks.begin);
      if (totals != nullptr) part.totals = at(totals, part.strips.begin, chunks.begin);
      return part;
    }
  };

  // Adds `left` . w to the sums of a part, or sets them to it.
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

  // How left . w is cut into tasks, for some strips of left.
  struct Cut {
    Tiling tiling{};
    Grid grid{};
    Range strips{};
    std::int64_t tasks() const { return grid.row_parts * grid.column_tiles; }
  };
  template <class Rows>
  static Cut cut(const Strips& strips, Range range, const Rows& w, std::int64_t threads) {
    const Tiling cut = tiling(strips.rows, Rows::kQuantized && !w.aligned());
    const std::int64_t most_strips =
        larger<std::int64_t>(for_second_level(kMostSums, 1, caches()) / (cut.chunks * kChunk * kStripRows), 1);
    const std::int64_t fewest_strips = 128 / kStripRows;
    const Grid grid = make_grid(range.count(), ceil_div(w.cols(), kChunk),
                                {most_strips, fewest_strips, cut.chunks, 1, 1}, threads, cut.tasks_per_thread);
    return {cut, grid, range};
  }

  // Computes a task of left . w. write(row, first column, sums in natural order) takes each row and chunk of the
  // result.
  template <class Rows, class Write>
  static void product(const Cut& cut, std::int64_t task, const float* left, const Strips& strips, const Rows& w,
                      const LowRanks& lora, const Write& write) {
    const Grid& grid = cut.grid;
    const std::int64_t s0 = cut.strips.begin + task % grid.row_parts * grid.row_part;
    const std::int64_t c0 = task / grid.row_parts * grid.column_tile;
    Part part{.all_strips = strips,
              .strips = {s0, smaller(s0 + grid.row_part, cut.strips.end)},
              .chunks = {c0, smaller(c0 + grid.column_tile, ceil_div(w.cols(), kChunk))},
              .panel_units = cut.tiling.panel_units()};
    const bool has_totals = !kOneChain && part.panel_units < Dot::kRestart / Dot::kElementsPerUnit;
    part.panels = scratch_floats(Slot::thread, 2 * kPanelFloats + (has_totals ? 2 : 1) * part.floats());
    part.sums = part.panels + 2 * kPanelFloats;
    part.totals = has_totals ? part.sums + part.floats() : nullptr;
    Tiles tiles;
    const bool begun = add_low_rank(tiles, lora, part);
    multiply(tiles, w, {left, packed_stride(units_of(w.rows()))}, part, begun);
    for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s)
      for (int row = 0; row < strips.size(s); ++row)
        for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
          F32 natural[Dot::kColumnVectors];
          const float* from = part.sums_of(s, c) + row * kChunk;
          for (int i = 0; i < Dot::kColumnVectors; ++i) natural[i] = load(from + i * kLanes);
          if (!Rows::kNatural) Dot::to_natural(natural);
          write(strips.first(s) + row, c * kChunk, natural);
        }
  }

 private:
  // Begins the sums of a part with what its adapters add, and says whether there is an adapter.
  static bool add_low_rank(Tiles& tiles, const LowRanks& lora, const Part& part) {
    if (lora.parts.empty()) return false;
    const Range covered = lora.parts.front().strips;
    // An adapter that is the only one of all strips sets the sums; several add to them.
    const bool covers = lora.parts.size() == 1 && covered.begin <= part.strips.begin && covered.end >= part.strips.end;
    if (!covers) __builtin_memset(part.sums, 0, static_cast<std::size_t>(part.floats()) * sizeof(float));
    for (const LowRank& adapter : lora.parts) {
      const Part own = part.within(adapter.strips);
      if (own.strips.begin >= own.strips.end) continue;
      const Packed v{adapter.v, packed_stride(units_of(adapter.a.rows())), part.all_strips.first(adapter.strips.begin)};
      multiply(tiles, adapter.a, v, own, !covers);
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
        for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s) {
          const StripAndChunk operands{.left = left.row(part.all_strips.first(s)) + panel.lines.begin,
                                       .stride = left.stride,
                                       .columns = panel.columns(c),
                                       .units = panel.units(),
                                       .vectors = vectors_of<Rows>(c, cols),
                                       .sums = part.sums_of(s, c),
                                       .accumulate = accumulate};
          with_constant<kMostRows>(part.all_strips.size(s), [&](auto rows) {
            if (s == part.strips.begin)
              multiply_strip<rows>(operands, decoding);
            else
              multiply_strip<rows>(operands, none);
          });
        }
    }
  }

  // A strip of L and a chunk of a panel.
  struct StripAndChunk {
    const float* left;
    std::int64_t stride;   // from one of its rows to the next
    const float* columns;  // [unit][64 columns]
    std::int64_t units;
    int vectors;
    float* sums;
    bool accumulate;
  };
  template <int kRows, class Decoding>
  static void multiply_strip(const StripAndChunk& operands, Decoding& decoding) {
    constexpr std::int64_t kChain = Dot::kRestart / Dot::kElementsPerUnit;
    constexpr int kStep = std::is_same_v<Decoding, NoDecoder> ? kColumnStep : kDecodingColumnStep;
    for (int j = 0; j < operands.vectors; j += kStep)
      for (std::int64_t unit = 0; unit < operands.units; unit += kChain) {
        const auto multiply = [&](auto vectors) {
          // A strip has a tile for every kDecodingColumnStep vectors of a chunk, and a step decodes two chunks of a
          // unit.
          constexpr std::int64_t kDecodingUnits = 2 * Dot::kColumnVectors / kDecodingColumnStep;
          multiply_register_tile<ProductNn, kRows, vectors, kOneChain, kDecodingUnits>(
              Strided{operands.left + unit, operands.stride},
              Strided{operands.columns + unit * kChunk + j * kLanes, FixedStride<kChunk>()},
              smaller(kChain, operands.units - unit), Strided{operands.sums + j * kLanes, FixedStride<kChunk>()},
              operands.accumulate || unit != 0, decoding);
        };
        if (operands.vectors - j == 1)
          multiply(std::integral_constant<int, 1>());
        else if (operands.vectors - j == 2 || kStep == 2)
          multiply(std::integral_constant<int, 2>());
        else
          multiply(std::integral_constant<int, kStep>());
      }
  }

  // Multiplies the columns of two tiles by all strips, one after another, so that this part of the panel stays in the
  // first-level cache.
  template <class Rows, class Decoding>
  static void multiply_panel_by_tiles(Tiles& tiles, std::int64_t cols, const Packed& left, const Panel& panel,
                                      const Part& part, bool accumulate, Decoding& decoding) {
    const std::int64_t units = panel.units();
    const auto multiply_with = [&](auto& meanwhile) {
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
        const int column_tiles = vectors_of<Rows>(c, cols);
        const auto block = [&](auto row_tiles, auto tile_columns, std::int64_t s, int first) {
          multiply_tiles<row_tiles, tile_columns>(
              tiles,
              {left.row(part.all_strips.first(s)) + panel.lines.begin, left.stride, kTileRows * left.stride,
               kTileUnits},
              {panel.columns(c) + first * kLanes, kChunk, kLanes, kTileUnits * kChunk}, units,
              {part.sums_of(s, c) + first * kLanes, kChunk, kTileRows * kChunk, kLanes}, accumulate, meanwhile);
        };
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        constexpr std::integral_constant<int, 4> four;
        const bool one_tile_high = part.strips.count() == 1 && part.all_strips.size(part.strips.begin) <= kTileRows;
        if (one_tile_high && column_tiles == 4) {
          block(one, four, part.strips.begin, 0);
          continue;
        }
        for (int first = 0; first < column_tiles; first += 2)
          for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s) {
            const bool high = part.all_strips.size(s) > kTileRows, wide = first + 2 <= column_tiles;
            if (high)
              wide ? block(two, two, s, first) : block(two, one, s, first);
            else
              wide ? block(one, two, s, first) : block(one, one, s, first);
          }
      }
    };
    if constexpr (std::is_same_v<Decoding, NoDecoder>) {
      multiply_with(decoding);
    } else {
      // Decoding takes longer than the products of one strip, so all strips share it. A block has two tiles of sums or
      // more.
      const std::int64_t rows = part.all_strips.first(part.strips.end) - part.all_strips.first(part.strips.begin);
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

  // Copies all sums of a part, or adds them to what stands there.
  static void add_sums(const Part& part, const float* from, float* to, bool accumulate) {
    for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s)
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
        const std::int64_t first = part.sums_of(s, c) - part.sums;
        for (std::int64_t i = first; i < first + part.all_strips.size(s) * kChunk; i += kLanes)
          store(to + i, accumulate ? add(load(to + i), load(from + i)) : load(from + i));
      }
  }

  static void drop(const LowRanks& lora, const Part& part) {
    for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s)
      for (int row = 0; row < part.all_strips.size(s); ++row)
        for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
          const std::uint64_t keep = lora.dropout.keep_bits(lora.first_row + part.all_strips.first(s) + row, c);
          float* p = part.sums_of(s, c) + row * kChunk;
          for (int i = 0; i < Dot::kColumnVectors; ++i)
            store(p + i * kLanes, Dot::keep_columns(load(p + i * kLanes), i, keep));
        }
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
