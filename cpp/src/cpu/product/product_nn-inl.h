// C[M,K] = X[M,N] . W[N,K]: lanes along the columns of W, units of X broadcast. A unit spans kElementsPerUnit rows of
// W (two bfloat16, one float). product_nn_layout-inl.h says how operands and accumulators lie in memory.
#pragma once

#include <span>

#include "cpu/product/panel_pipeline-inl.h"
#include "cpu/product/prefetch-inl.h"
#include "cpu/product/product_nn_layout-inl.h"
#include "cpu/product/register_tile-inl.h"
#include "cpu/product/stage_nn-inl.h"
#include "cpu/product/strip_nn-inl.h"
#include "cpu/product/tiles-inl.h"
#include "cpu/runtime/scratch.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
struct ProductNn : LayoutNn<Dot> {
  using Layout = LayoutNn<Dot>;
  using Layout::kByTiles, Layout::kMaxAccumulators, Layout::kPanelFloats, Layout::kPanels, Layout::kStripRows,
      Layout::packed_stride, Layout::tiling, Layout::units_of, Layout::whole_steps;
  using Panel = typename Layout::template PanelOf<Layout::kParts>;
  using typename Layout::Decoded, typename Layout::Packed, typename Layout::Part, typename Layout::Strips,
      typename Layout::Tiling;
  using Tiles = typename TilesOf<Dot>::type;
  // Panels of the widest tiles are shorter than kRestart, so there are more of them, and the error grows with their
  // number. Therefore the accumulators of so many panels are added to a total.
  static constexpr std::int64_t kPanelsOfTotal = 16;

  // A strip's part of packed X is prefetched by so many blocks of tiles, which four chunks have.
  static constexpr std::int64_t kBlocksAhead = 4 * 2;
  // With so few strips W is decoded stage by stage (strip_nn-inl.h), without panels.
  static constexpr std::int64_t kMaxDecodingStrips = 2;

  // What one adapter adds to the accumulators of its strips: V . A.
  struct LowRank {
    float* v = nullptr;  // packed, from the first row of the first strip on; zero in rows of other adapters
    DenseRows<Dot, false> a;
    Range rows;    // of X
    Range strips;  // that have one of them

    bool has(Range these) const { return rows.begin <= these.begin && these.end <= rows.end; }
  };
  // What all adapters of a product add: mask o (the sum of their parts).
  struct LowRanks {
    std::span<const LowRank> parts;
    Dropout dropout;
    std::int64_t first_row = 0;  // what dropout counts the first row of X as
  };

  // Adds x . w, of the rows of w for which x has units, to the accumulators of a part, or sets them to it.
  template <class Rows>
  static void multiply(Tiles& tiles, const Rows& w, const Packed& x, const Part& part, bool accumulate) {
    if constexpr (kByTiles && !Rows::kNatural && !Rows::kRare)
      if (part.strips.count() <= kMaxDecodingStrips && w.aligned())
        return StripNn<Dot, Rows>::multiply(tiles, w, x, part, accumulate);
    if constexpr (!kByTiles && !Rows::kNatural && !Rows::kRare)
      if (Layout::decoded(w, part.all_strips.rows) == Decoded::in_stages)
        return StageNn<Dot, Rows>::multiply(w, x, part, accumulate);
    const std::int64_t units = x.units.count();
    const std::int64_t step = whole_steps(ceil_div(units, ceil_div(units, part.panel_units)));  // panels of equal size
    const std::int64_t panels = ceil_div(units, step);
    const auto panel_of = [&](std::int64_t i) {
      return Panel{.lines = {x.units.begin + i * step, smaller(x.units.begin + (i + 1) * step, x.units.end)},
                   .chunks = part.chunks,
                   .data = part.panels + i % kPanels * kPanelFloats};
    };
    const bool has_totals = part.totals != nullptr && panels > kPanelsOfTotal;
    multiply_panels<!kByTiles>(w, panels, panel_of, [&](std::int64_t i, const Panel& panel, auto& decoding) {
      const bool restarts = has_totals && i != 0 && i % kPanelsOfTotal == 0;
      if (restarts) add_accumulators(part, part.accumulators, part.totals, i != kPanelsOfTotal);
      multiply_panel<Rows>(tiles, w.cols(), x, panel, part, !restarts && (accumulate || i != 0), decoding);
    });
    if (has_totals) add_accumulators(part, part.totals, part.accumulators, true);
  }

  // Some packed rows times one chunk of columns, [unit][64 columns], of which `vectors` vectors count. Accumulators are
  // [row][64 columns]. With tiles there is room for a whole one after the last row.
  static void multiply_rows(Tiles& tiles, const float* rows, std::int64_t stride, std::int64_t count,
                            const float* columns, std::int64_t units, int vectors, float* accumulators,
                            bool accumulate) {
    if constexpr (kByTiles) {
      const auto block = [&](auto row_tiles, auto tile_columns, std::int64_t row, int first) {
        multiply_tiles<row_tiles, tile_columns, Streamed::a>(
            tiles, {rows + row * stride, stride, kTileRows * stride, kTileUnits},
            {columns + first * kLanes, kChunk, kLanes, kTileUnits * kChunk}, units,
            {accumulators + row * kChunk + first * kLanes, kChunk, kTileRows * kChunk, kLanes}, accumulate,
            2 * kTileRows * kChunk, NothingAhead());
      };
      for (int first = 0; first < vectors; first += 2)
        for (std::int64_t row = 0; row < count; row += 2 * kTileRows)
          with_constant<2>(count - row > kTileRows ? 2 : 1, [&](auto row_tiles) {
            with_constant<2>(vectors - first > 1 ? 2 : 1, [&](auto columns) { block(row_tiles, columns, row, first); });
          });
    } else {
      NoDecoder none;
      for (std::int64_t row = 0; row < count; row += kMaxStripRows)
        with_constant<kMaxStripRows>(
            static_cast<int>(smaller<std::int64_t>(kMaxStripRows, count - row)), [&](auto strip) {
              multiply_strip<strip>(
                  {rows + row * stride, stride, columns, units, vectors, accumulators + row * kChunk, accumulate},
                  NothingAhead(), none);
            });
    }
  }

  // How x . w is cut into tasks, for some strips of x.
  struct Cut {
    Tiling tiling{};
    Grid grid{};
    Range strips{};
    std::int64_t tasks() const { return grid.row_parts * grid.column_tiles; }
  };
  static Cut cut(const Strips& strips, Range range, std::int64_t cols, Decoded decoded, std::int64_t threads,
                 std::int64_t min_tasks_per_thread = 1) {
    const Tiling cut = tiling(strips.rows, decoded);
    const std::int64_t max_strips =
        larger<std::int64_t>(scaled_to_l2(kMaxAccumulators, 1, caches()) / (cut.chunks * kChunk * kStripRows), 1);
    const std::int64_t min_strips = 128 / kStripRows;
    const Grid grid = make_grid(range.count(), ceil_div(cols, kChunk), {max_strips, min_strips, cut.chunks, 1, 1},
                                threads, larger(cut.tasks_per_thread, min_tasks_per_thread));
    return {cut, grid, range};
  }

  // What a product keeps that multiplies some rows of W after the others. It must be one chain, without totals.
  struct Kept {
    float* accumulators = nullptr;  // kept_floats() of them, or null if all rows are multiplied at once
    bool begun = false;             // whether they hold what was multiplied before
    bool ends = true;               // whether the result is complete, and is written
  };
  static std::int64_t kept_floats(Range strips, std::int64_t cols) {
    return strips.count() * kStripRows * ceil_div(cols, kChunk) * kChunk;
  }

  // Computes a task of x . w. write(row, first column, accumulators in natural order) takes each row and chunk of the
  // result.
  template <class Rows, class Write>
  static void product(const Cut& cut, std::int64_t task, const Packed& x, const Strips& strips, const Rows& w,
                      const LowRanks& lora, const Kept& kept, const Write& write) {
    const Grid& grid = cut.grid;
    const std::int64_t s0 = cut.strips.begin + task % grid.row_parts * grid.row_part;
    const std::int64_t c0 = task / grid.row_parts * grid.column_tile;
    Part part{.all_strips = strips,
              .strips = {s0, smaller(s0 + grid.row_part, cut.strips.end)},
              .chunks = {c0, smaller(c0 + grid.column_tile, ceil_div(w.cols(), kChunk))},
              .panel_units = cut.tiling.panel_units()};
    const bool has_totals = !kOneChain<Dot> && Layout::decoded(w, strips.rows) != Decoded::in_stages &&
                            part.panel_units < Dot::kRestart / Dot::kElementsPerUnit;
    const bool keeps = kept.accumulators != nullptr;
    const std::int64_t own_floats = keeps ? 0 : (has_totals ? 2 : 1) * part.floats();
    part.panels = scratch_floats(Slot::thread, kPanels * kPanelFloats + own_floats);
    part.accumulators = part.panels + kPanels * kPanelFloats;
    part.totals = has_totals ? part.accumulators + part.floats() : nullptr;
    if (keeps)  // after all chunks of the strips before, and the chunks before of these strips
      part.accumulators = kept.accumulators + kept_floats({cut.strips.begin, s0}, w.cols()) +
                          c0 * kChunk * kStripRows * part.strips.count();
    Tiles tiles;
    const bool begun = kept.begun || add_low_rank(tiles, lora, part);
    multiply(tiles, w, x, part, begun);
    if (!kept.ends) return;
    for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s)
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c)
        for (int row = 0; row < strips.size(s); ++row) {
          F32 natural[Dot::kColumnVectors];
          const float* from = part.accumulators_of(s, c);
          for (int i = 0; i < Dot::kColumnVectors; ++i) natural[i] = load(from + Part::place(row, i));
          if (!Rows::kNatural) Dot::to_natural(natural);
          write(strips.first(s) + row, c * kChunk, natural);
        }
  }

 private:
  // Begins the accumulators of a part with what its adapters add, and says whether there is an adapter.
  static bool add_low_rank(Tiles& tiles, const LowRanks& lora, const Part& part) {
    if (lora.parts.empty()) return false;
    // A strip that is one adapter's alone is set by it; others begin with zeros.
    if (!lora.parts.front().has(part.all_strips.rows_of(part.strips)))
      __builtin_memset(part.accumulators, 0, static_cast<std::size_t>(part.floats()) * sizeof(float));
    for (const LowRank& adapter : lora.parts) {
      Range strips = part.within(adapter.strips).strips;
      if (strips.begin >= strips.end) continue;
      const Packed v{adapter.v, {0, units_of(adapter.a.rows())}, part.all_strips.first(adapter.strips.begin)};
      const auto shared = [&](std::int64_t strip) { return !adapter.has(part.all_strips.rows_of({strip, strip + 1})); };
      if (shared(strips.begin)) add_beside_others(tiles, adapter, v, part, strips.begin++);
      if (strips.begin < strips.end && shared(strips.end - 1)) add_beside_others(tiles, adapter, v, part, --strips.end);
      if (strips.begin < strips.end) multiply(tiles, adapter.a, v, part.within(strips), false);
    }
    if (lora.dropout) apply_dropout(lora, part);
    return true;
  }
  // Adds to a strip that has rows of other adapters, too, and leaves their accumulators as they were: the zeros that
  // these rows have for V would make NaN of an A that is NaN or infinite.
  static void add_beside_others(Tiles& tiles, const LowRank& adapter, const Packed& v, const Part& part,
                                std::int64_t strip) {
    const std::int64_t first = part.all_strips.first(strip);
    for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
      const Part chunk = part.only(strip, c);
      alignas(64) float kept[kStripRows * kChunk];
      __builtin_memcpy(kept, chunk.accumulators, sizeof(kept));
      multiply(tiles, adapter.a, v, chunk, true);
      for (int row = 0; row < part.all_strips.size(strip); ++row) {
        if (adapter.has({first + row, first + row + 1})) continue;
        for (int i = 0; i < Dot::kColumnVectors; ++i)
          store(chunk.accumulators + Part::place(row, i), load(kept + Part::place(row, i)));
      }
    }
  }

  // The vectors of a chunk whose columns w has; decoding spreads its columns over all of them.
  template <class Rows>
  static int vectors_of(std::int64_t chunk, std::int64_t cols) {
    if (!Rows::kNatural) return Dot::kColumnVectors;
    return static_cast<int>(ceil_div(smaller<std::int64_t>(kChunk, cols - chunk * kChunk), kLanes));
  }

  template <class Rows, class Decoding>
  static void multiply_panel(Tiles& tiles, std::int64_t cols, const Packed& x, const Panel& panel, const Part& part,
                             bool accumulate, Decoding& decoding) {
    if constexpr (kByTiles) {
      return multiply_panel_by_tiles<Rows>(tiles, cols, x, panel, part, accumulate);
    } else {
      NoDecoder none;
      const auto rows_of = [&](std::int64_t s) {
        return x.row(part.all_strips.first(s)) + panel.lines.begin - x.units.begin;
      };
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c)
        for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s) {
          const StripAndChunk operands{.x = rows_of(s),
                                       .stride = x.stride(),
                                       .columns = panel.columns(c),
                                       .units = panel.units(),
                                       .vectors = vectors_of<Rows>(c, cols),
                                       .accumulators = part.accumulators_of(s, c),
                                       .accumulate = accumulate};
          const std::int64_t next = s + 1 < part.strips.end ? s + 1 : part.strips.begin;
          with_constant<kMaxStripRows>(part.all_strips.size(s), [&](auto rows) {
            if (s == part.strips.begin)  // beside decoding no register is left for it
              multiply_strip<rows>(operands, NothingAhead(), decoding);
            else if constexpr (kColumnStep == Dot::kColumnVectors)
              multiply_strip<rows>(operands, RowsAhead<rows>{rows_of(next), x.stride()}, none);
            else  // each row would be prefetched again for every kColumnStep vectors: AVX2 took 1.02 times as long
              multiply_strip<rows>(operands, NothingAhead(), none);
          });
        }
    }
  }

  // A strip of X and a chunk of a panel.
  struct StripAndChunk {
    const float* x;
    std::int64_t stride;   // from one of its rows to the next
    const float* columns;  // [unit][64 columns]
    std::int64_t units;
    int vectors;
    float* accumulators;
    bool accumulate;
  };
  template <int kRows, class Ahead, class Decoding>
  static void multiply_strip(const StripAndChunk& operands, Ahead ahead, Decoding& decoding) {
    constexpr std::int64_t kChain = Dot::kRestart / Dot::kElementsPerUnit;
    constexpr int kStep = std::is_same_v<Decoding, NoDecoder> ? kColumnStep : kDecodingColumnStep;
    for (int j = 0; j < operands.vectors; j += kStep)
      for (std::int64_t unit = 0; unit < operands.units; unit += kChain) {
        const auto multiply = [&](auto vectors) {
          // A strip has a tile for every kDecodingColumnStep vectors of a chunk, and a step decodes two chunks of a
          // unit.
          constexpr std::int64_t kDecodingUnits = 2 * Dot::kColumnVectors / kDecodingColumnStep;
          multiply_register_tile<Dot, kRows, vectors, kOneChain<Dot>, kDecodingUnits>(
              Strided{operands.x + unit, operands.stride},
              Strided{operands.columns + unit * kChunk + j * kLanes, FixedStride<kChunk>()},
              smaller(kChain, operands.units - unit),
              Strided{operands.accumulators + j * kLanes, FixedStride<kChunk>()}, operands.accumulate || unit != 0,
              ahead.after(unit), decoding);
        };
        if constexpr (!std::is_same_v<Decoding, NoDecoder>)  // W is quantized, and no chunk is cut
          multiply(std::integral_constant<int, kStep>());
        else if (operands.vectors - j == 1)
          multiply(std::integral_constant<int, 1>());
        else if (operands.vectors - j == 2 || kStep == 2)
          multiply(std::integral_constant<int, 2>());
        else
          multiply(std::integral_constant<int, kStep>());
      }
  }

  // Multiplies strip after strip by all columns of the panel, so that a strip's part stays in the first-level cache and
  // the panel in the second-level one. Meanwhile the part of the next strip is prefetched. On an Intel Xeon (Granite
  // Rapids), NF4 of 4096 x 4096, this took 0.94 to 0.87 of the time of strips that follow one another for each block of
  // columns, with 128 to 2048 rows: those read all of packed X again for each block.
  template <class Rows>
  static void multiply_panel_by_tiles(Tiles& tiles, std::int64_t cols, const Packed& x, const Panel& panel,
                                      const Part& part, bool accumulate) {
    const std::int64_t units = panel.units();
    for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s)
      with_constant<2>(part.all_strips.size(s) > kTileRows ? 2 : 1, [&](auto row_tiles) {
        const TileGrid<const float*> rows = Layout::tiles_of(x, part.all_strips, s, panel.lines.begin);
        const bool last = s + 1 == part.strips.end;
        const std::int64_t next = last ? part.strips.begin : s + 1;
        const float* ahead = Layout::tiles_of(x, part.all_strips, next, panel.lines.begin + (last ? units : 0)).data;
        constexpr std::int64_t kBytes = kStripRows * 4 / kBlocksAhead;  // of a unit
        std::int64_t block = 0;
        for (std::int64_t c = panel.chunks.begin; c < panel.chunks.end; ++c)
          for (int first = 0; first < vectors_of<Rows>(c, cols); first += 2)
            with_constant<2>(vectors_of<Rows>(c, cols) - first > 1 ? 2 : 1, [&](auto column_tiles) {
              multiply_tiles<row_tiles, column_tiles, Streamed::b>(
                  tiles, rows, panel.tiles_of(c, first / 2), units,
                  {part.accumulators_of(s, c) + Part::place(0, first), Part::kRowStride, kTileRows * Part::kRowStride,
                   kLanes},
                  accumulate, kStripRows * Part::kRowStride,
                  BytesAhead<kBytes, kTileUnits>{reinterpret_cast<const char*>(ahead) +
                                                 block++ % kBlocksAhead * units * kBytes});
            });
      });
  }

  // Copies all accumulators of a part, or adds them to what stands there.
  static void add_accumulators(const Part& part, const float* from, float* to, bool accumulate) {
    for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s)
      for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
        const std::int64_t first = part.accumulators_of(s, c) - part.accumulators;
        for (std::int64_t i = first; i < first + part.all_strips.size(s) * kChunk; i += kLanes)
          store(to + i, accumulate ? add(load(to + i), load(from + i)) : load(from + i));
      }
  }

  static void apply_dropout(const LowRanks& lora, const Part& part) {
    for (std::int64_t s = part.strips.begin; s < part.strips.end; ++s)
      for (int row = 0; row < part.all_strips.size(s); ++row)
        for (std::int64_t c = part.chunks.begin; c < part.chunks.end; ++c) {
          const std::uint64_t mask = lora.dropout.keep_mask(lora.first_row + part.all_strips.first(s) + row, c);
          for (int i = 0; i < Dot::kColumnVectors; ++i) {
            float* p = part.accumulators_of(s, c) + Part::place(row, i);
            store(p, Dot::mask_columns(load(p), i, mask));
          }
        }
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
