// How the operands and the accumulators of ProductNn (product_nn-inl.h) lie in memory, and how they are cut:
//
//   packed X       [row][unit], packed_stride(units) apart; with tiles a strip is [step of 16 units][row][unit], so
//                  that a tile is 1 KB in one piece: 16 rows that lie apart would be as many pages, for each of its
//                  steps
//   panel          the decoded columns of W, [chunk][unit][64 columns]; with tiles [chunk][half][unit][32 columns], so
//                  that the two tiles of a block lie in one piece and spread over all sets of the first-level cache
//   accumulators   fp32, [strip][chunk][row of the strip][64 columns] in decoded order (Dot::to_natural); with tiles
//                  [strip][chunk][half][row][32 columns]
//
// With tiles, packed X is A, a quarter of a chunk of the panel is B, and the accumulators are C (tiles-inl.h).
#pragma once

#include "cpu/product/dense_rows-inl.h"
#include "cpu/product/panel_pipeline-inl.h"
#include "cpu/product/tiles-inl.h"
#include "cpu/runtime/blocking.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
struct LayoutNn {
  using Chunk = typename Dot::Chunk;
  static constexpr bool kByTiles = kTiled<Dot>;
  // Rows of a strip, which are multiplied together: as many as registers hold, or two tiles.
  static constexpr int kStripRows = kByTiles ? 2 * kTileRows : kMaxStripRows;
  // How W comes to a product: in stages (stage_nn-inl.h), or in panels. Rows that lie ragged in their blocks
  // or codes are not prefetched.
  enum class Decoded { in_stages, in_panels, in_ragged_panels };
  template <class Rows>
  static Decoded decoded(const Rows& w, std::int64_t rows) {
    if (!w.aligned()) return Rows::kQuantized ? Decoded::in_ragged_panels : Decoded::in_panels;
    // Pairs of rows are decoded for their products in registers alone, and dense ones nowhere: no processor with BF16
    // has timed their stages.
    const bool stages = Dot::kElementsPerUnit == 1 || (Rows::kQuantized && rows <= kMaxDirectRows);
    if (!kByTiles && !Rows::kRare && stages) return Decoded::in_stages;
    return Decoded::in_panels;
  }
  // So few rows are multiplied where a weight is decoded: their accumulators leave registers for decoding, and one
  // chain is accurate enough.
  static constexpr int kMaxDirectRows = kByTiles || !kOneChain<Dot> ? 0 : kRegisters * 3 / 4 / Dot::kColumnVectors;
  // The parts that the columns of a chunk are laid out in, in the panels and the accumulators of a product.
  static constexpr int kParts = kByTiles ? 2 : 1;
  // So many units are multiplied at a time. A panel has zeros up to the next multiple.
  static constexpr std::int64_t kStepUnits = kByTiles ? kTileUnits : 1;
  static std::int64_t whole_steps(std::int64_t units) { return ceil_div(units, kStepUnits) * kStepUnits; }
  // Chunks of columns of a tile, at most. The scales of a group of rows of W have room for so many.
  static constexpr std::int64_t kMaxTileChunks = 32;
  // How the columns are cut into tiles. With few rows tiles are wide, so that each row of W is read in long ranges. The
  // same holds for ragged W. With stages they are as wide as the second-level cache has room for the accumulators. With
  // many rows panels are long, so that the accumulators are added to rarely. Two panels and the accumulators stay below
  // 1 MB.
  struct Tiling {
    std::int64_t chunks;  // of a tile, at most
    std::int64_t tasks_per_thread;
    std::int64_t tuned_chunks = chunks;  // of a tile, if the second-level cache has the size of kTunedL2

    // Units of a panel. Accumulators in fp32 start from zero with each panel, so its length must not depend on how wide
    // the tile of a task really is, which follows the number of threads and the cache.
    constexpr std::int64_t panel_units() const {
      return smaller<std::int64_t>(kPanelFloats / kChunk / tuned_chunks, Dot::kBlock / Dot::kElementsPerUnit);
    }
  };
  static Tiling tiling(std::int64_t rows, Decoded decoded) {
    const bool ragged = decoded == Decoded::in_ragged_panels;
    Tiling tuned{rows <= 256 || kByTiles ? 4 : 2, kTasksPerThread};
    const std::int64_t fitting = kMaxAccumulators / (round_up(rows, kStripRows) * kChunk);
    if (decoded == Decoded::in_stages)
      tuned = {smaller<std::int64_t>(larger<std::int64_t>(fitting, 4), kMaxTileChunks), rows <= kStripRows ? 1 : 2};
    else if (rows <= (ragged && kOneChain<Dot> ? 32 : kByTiles ? 0 : 8))
      tuned = {kMaxTileChunks, 1};
    else if (ragged && rows <= 96)
      tuned = {16, 2};
    else if (kByTiles && rows <= 64)
      tuned = rows <= 32 ? Tiling{kMaxTileChunks, 1} : Tiling{16, 2};
    else if (!kByTiles && rows <= 128)
      // On an AMD EPYC (Zen 5) NF4 took 0.9 to 1.0 times as long as by tiles of four chunks, and Q4_1 0.8 to 1.0: the
      // lines that hold a row's scales and minima are read for half as many tiles.
      tuned = {8, 2};
    return {scaled_to_l2(tuned.chunks, 1, caches()), tuned.tasks_per_thread, tuned.chunks};
  }
  // Floats of the accumulators of a task, which stay in the second-level cache.
  static constexpr std::int64_t kMaxAccumulators = kByTiles ? 704 * 4 * kChunk : 128 << 10;
  static constexpr std::int64_t kPanelFloats = 64 << 10;
  static constexpr int kPanels = kByTiles ? 1 : 2;  // that there is memory for

  // The strips that rows of X are cut into. Their sizes differ by at most one; with tiles they are whole, but for the
  // last.
  struct Strips {
    explicit Strips(std::int64_t rows) : rows(rows), count(ceil_div(rows, kStripRows)) {}
    std::int64_t first(std::int64_t strip) const {
      if (kByTiles) return smaller(strip * kStripRows, rows);
      return strip * (rows / count) + smaller(strip, rows % count);
    }
    int size(std::int64_t strip) const { return static_cast<int>(first(strip + 1) - first(strip)); }
    Range rows_of(Range strips) const { return {first(strips.begin), first(strips.end)}; }
    // Returns where a strip begins in packed X. A last tile has zeros after the last row.
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

  static std::int64_t units_of(std::int64_t inner) { return ceil_div(inner, Dot::kElementsPerUnit); }

  // Floats of a packed row: whole chunks, and no power of two, because rows that are a power of two apart share few
  // cache sets.
  static std::int64_t packed_stride(std::int64_t units) { return ceil_div(units, Dot::kUnits) * Dot::kUnits + kLanes; }

  // Packed rows of X, from row `first` on, of which these units are there.
  struct Packed {
    const float* data;
    Range units;
    std::int64_t first = 0;
    std::int64_t stride() const { return packed_stride(units.count()); }
    const float* row(std::int64_t r) const { return data + (r - first) * stride(); }
  };
  // Packs some rows of x, one after another. Rows that x does not have become zero.
  static void pack(ConstMatrix x, Range rows, float* out) {
    const DenseRows<Dot, true> from(x);
    const std::int64_t stride = packed_stride(units_of(x.cols));
    const Range chunks{0, ceil_div(x.cols, kChunk)};
    for (std::int64_t row = rows.begin; row < rows.end; ++row, out += stride)
      from.template chunks<1>(row, row >= 0 && row < from.rows(), chunks, [&](std::int64_t c, const Chunk(&chunk)[1]) {
        for (int i = 0; i < Dot::kVectors; ++i) store(out + c * Dot::kUnits + i * kLanes, chunk[0].v[i]);
      });
  }

  // Packs one strip of x, as a product takes it.
  static void pack_strip(ConstMatrix x, Range rows, float* out) {
    static_assert(!kByTiles || Dot::kUnits == Dot::kVectors * kTileUnits);
    if constexpr (!kByTiles) {
      pack(x, rows, out);
    } else {
      const DenseRows<Dot, true> from(x);
      const std::int64_t step = rows.count() * kTileUnits;
      for (std::int64_t row = rows.begin; row < rows.end; ++row, out += kTileUnits)
        from.template chunks<1>(row, row >= 0 && row < from.rows(), {0, ceil_div(x.cols, kChunk)},
                                [&](std::int64_t c, const Chunk(&chunk)[1]) {
                                  for (int i = 0; i < Dot::kVectors; ++i)
                                    store(out + (c * Dot::kVectors + i) * step, chunk[0].v[i]);
                                });
    }
  }
  // The tiles of a packed strip from a unit on.
  static TileGrid<const float*> tiles_of(const Packed& x, const Strips& strips, std::int64_t strip, std::int64_t unit) {
    const std::int64_t first = strips.first(strip), rows = strips.first_packed(strip + 1) - first;
    return {x.row(first) + (unit - x.units.begin) * rows, kTileUnits, kTileRows * kTileUnits, rows * kTileUnits};
  }

  // Columns of W, [chunk][part][unit][64 / kParts columns], and zeros after the units up to a whole step.
  template <int kParts>
  struct PanelOf {
    using Chunk = typename Dot::Chunk;
    static constexpr int kLineRows = Dot::kElementsPerUnit;
    static constexpr bool kLineAfterLine = kParts > 1;
    static constexpr std::int64_t kMaxScaledChunks = kPanelFloats / kChunk * kLineRows;
    Range lines, chunks;  // lines are units
    float* data;

    std::int64_t units() const { return whole_steps(lines.count()); }
    static std::int64_t line_stride() { return kChunk / kParts; }
    std::int64_t part_stride() const { return units() * line_stride(); }
    std::int64_t chunk_stride() const { return units() * kChunk; }
    const float* columns(std::int64_t chunk) const { return data + (chunk - chunks.begin) * chunk_stride(); }
    // The tiles of a part.
    TileGrid<const float*> tiles_of(std::int64_t chunk, int part) const {
      return {columns(chunk) + part * part_stride(), line_stride(), kLanes, kTileUnits * line_stride()};
    }

    template <bool kNatural>
    [[gnu::always_inline]] void write(const Chunk (&chunk)[kLineRows], float* out) const {
      const typename Dot::Columns columns = to_columns<kNatural>(chunk);
      constexpr int kVectors = Dot::kColumnVectors / kParts;
      for (int i = 0; i < Dot::kColumnVectors; ++i)
        store(out + i / kVectors * part_stride() + i % kVectors * kLanes, columns.v[i]);
    }
    void clear_rest() const {
      const std::int64_t zeros = units() - lines.count();
      for (std::int64_t chunk = 0; chunk < chunks.count() && zeros > 0; ++chunk)
        for (int part = 0; part < kParts; ++part)
          __builtin_memset(data + chunk * chunk_stride() + part * part_stride() + lines.count() * line_stride(), 0,
                           static_cast<std::size_t>(zeros * line_stride()) * sizeof(float));
    }
  };
  using WholePanel = PanelOf<1>;
  // Transposes a panel of whole steps of kLanes units: [chunk][unit][64 columns] -> [column][unit], `stride` apart.
  static void transpose_panel(const float* panel, std::int64_t units, std::int64_t chunks, float* out,
                              std::int64_t stride) {
    for (std::int64_t c = 0; c < chunks; ++c)
      for (std::int64_t unit = 0; unit < units; unit += kLanes)
        for (std::int64_t column = 0; column < kChunk; column += kLanes) {
          F32 square[kLanes];
          for (int i = 0; i < kLanes; ++i) square[i] = load(panel + (c * units + unit + i) * kChunk + column);
          transpose(square);
          for (int i = 0; i < kLanes; ++i) store(out + (c * kChunk + column + i) * stride + unit, square[i]);
        }
  }

  // What a task computes: the accumulators of some strips and some chunks of columns.
  struct Part {
    const Strips& all_strips;
    Range strips, chunks;
    std::int64_t panel_units;
    float* panels;  // memory for kPanels of them
    float* accumulators;
    float* totals;  // laid out as accumulators, or null where accumulators go on to the end

    // Returns where a vector of the columns of a row lies in the accumulators of its strip and chunk.
    static constexpr std::int64_t kRowStride = kChunk / kParts;
    static constexpr std::int64_t place(std::int64_t row, int vector) {
      constexpr int kVectors = Dot::kColumnVectors / kParts;
      return (vector / kVectors * kStripRows + row) * kRowStride + vector % kVectors * kLanes;
    }
    std::int64_t floats() const { return strips.count() * chunks.count() * kStripRows * kChunk; }
    float* accumulators_of(std::int64_t strip, std::int64_t chunk) const { return at(accumulators, strip, chunk); }
    float* at(float* data, std::int64_t strip, std::int64_t chunk) const {
      return data + ((strip - strips.begin) * chunks.count() + (chunk - chunks.begin)) * kStripRows * kChunk;
    }
    // What this part has of these strips, which may be nothing.
    Part within(Range range) const {
      Part part = *this;
      part.strips = {larger(strips.begin, range.begin), smaller(strips.end, range.end)};
      if (part.strips.begin >= part.strips.end) return part;
      part.accumulators = at(accumulators, part.strips.begin, chunks.begin);
      if (totals != nullptr) part.totals = at(totals, part.strips.begin, chunks.begin);
      return part;
    }
    // A single strip and chunk of this part.
    Part only(std::int64_t strip, std::int64_t chunk) const {
      Part part = *this;
      part.strips = {strip, strip + 1};
      part.chunks = {chunk, chunk + 1};
      part.accumulators = accumulators_of(strip, chunk);
      if (totals != nullptr) part.totals = at(totals, strip, chunk);
      return part;
    }
  };

  // The columns of a unit, whose rows of W these chunks are.
  template <bool kNatural, int kRows>
  static typename Dot::Columns to_columns(const Chunk (&chunk)[kRows]) {
    if constexpr (kRows == 1)
      return kNatural ? Dot::columns_natural(chunk[0]) : Dot::columns(chunk[0]);
    else
      return kNatural ? Dot::columns_natural(chunk[0], chunk[1]) : Dot::columns(chunk[0], chunk[1]);
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
