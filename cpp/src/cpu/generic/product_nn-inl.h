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
#include "cpu/generic/rows-inl.h"
#include "cpu/generic/tiles-inl.h"
#include "cpu/scratch.h"

namespace qlora_native {
namespace {

template <class Dot>
struct ProductNn {
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

  // Rows `first` ... end-1 of left, one after another from `out` on; those that left has not are zero.
  static void pack(ConstMatrix left, std::int64_t first, std::int64_t end, float* out) {
    const DenseRows<Dot, true> rows(left);
    const std::int64_t stride = packed_stride(units_of(left.cols)), chunks = ceil_div(left.cols, kChunk);
    for (std::int64_t row = first; row < end; ++row, out += stride)
      rows.template chunks<1>(row, row >= 0 && row < rows.rows(), {0, chunks},
                              [&](std::int64_t c, const Chunk(&chunk)[1]) {
                                for (int i = 0; i < Dot::kVectors; ++i)
                                  store(out + c * Dot::kUnits + i * kLanes, chunk[0].v[i]);
                              });
  }

  // Units u0 ... u1-1 (rows of W), chunks c0 ... c1-1 (columns).
  template <class Rows>
  static void decode_panel(const Rows& w, std::int64_t u0, std::int64_t u1, std::int64_t c0, std::int64_t c1,
                           float* panel) {
    constexpr int kRows = Dot::kElementsPerUnit;
    const std::int64_t units = whole_steps(u1 - u0);
    clear_rest(panel, u1 - u0, c1 - c0);
    for (std::int64_t unit = u0; unit < u1; ++unit) {
      const int count = static_cast<int>(smaller<std::int64_t>(kRows, w.rows() - unit * kRows));
      w.template chunks<kRows>(unit * kRows, count, {c0, c1}, [&](std::int64_t c, const Chunk(&chunk)[kRows]) {
        const typename Dot::Columns columns = to_columns<Rows::kNatural>(chunk);
        float* out = panel + ((c - c0) * units + (unit - u0)) * kChunk;
        for (int i = 0; i < Dot::kColumnVectors; ++i) store(out + i * kLanes, columns.v[i]);
      });
    }
  }

  // Zeros after the units of a panel, up to a whole step.
  static void clear_rest(float* panel, std::int64_t units, std::int64_t width) {
    const std::int64_t whole = whole_steps(units);
    for (std::int64_t chunk = 0; chunk < width && units < whole; ++chunk)
      __builtin_memset(panel + (chunk * whole + units) * kChunk, 0,
                       static_cast<std::size_t>((whole - units) * kChunk) * sizeof(float));
  }

  // Decodes a panel a little at a time while another one multiplies, as ProductNt's.
  template <class Rows>
  class Decoder {
   public:
    Decoder(const Rows& w, std::int64_t u0, std::int64_t u1, std::int64_t c0, std::int64_t c1, float* panel)
        : w_(w), u0_(u0), units_(u1 - u0), c0_(c0), width_(c1 - c0), panel_(panel) {
      const std::int64_t rows = smaller(units_ * kUnitRows, w.rows() - u0 * kUnitRows);
      stepwise_ = w.aligned() && rows == units_ * kUnitRows;
      if (!stepwise_) return;
      codes_ = w.codes_at(u0 * kUnitRows, c0);
      w.chunk_scales({u0 * kUnitRows, u0 * kUnitRows + rows}, {c0, c1}, scales_, width_ * Rows::kChunkScales);
      w.prefetch_scales({u1 * kUnitRows, u1 * kUnitRows + rows}, {c0, c1});
      clear_rest(panel, units_, width_);
      start(0);
    }

    // How often step() has something to do.
    std::int64_t steps() const { return stepwise_ ? units_ * ceil_div(width_, std::int64_t{2}) : 0; }

    // Two chunks of one unit: of 4-bit codes a cache line a row. Asks for those of a later unit, into the second-level
    // cache: rows that are a power of two apart share so few sets of the first one that they would push each other out.
    // At the end of a panel that unit is of the next one.
    [[gnu::always_inline]] void step() {
      if (left_ == 0) return;
#pragma GCC unroll 2
      for (int i = 0; i < kUnitRows; ++i) {
        const std::uint8_t* later = from_ + (kAhead * kUnitRows + i) * w_.row_bytes();
        __builtin_prefetch(later, 0, 2);
        __builtin_prefetch(later + 2 * Rows::kChunkBytes - 1, 0, 2);
      }
      put(from_, scale_, out_);
      if (chunk_ + 1 < width_)
        put(from_ + Rows::kChunkBytes, scale_ + Rows::kChunkScales, out_ + whole_steps(units_) * kChunk);
      from_ += kUnitRows * w_.row_bytes();
      scale_ += kUnitRows * width_ * Rows::kChunkScales;
      out_ += kChunk;
      if (--left_ == 0 && chunk_ + 2 < width_) start(chunk_ + 2);
    }
    void finish() {
      if (!stepwise_) return decode_panel(w_, u0_, u0_ + units_, c0_, c0_ + width_, panel_);
      while (left_ > 0) step();
    }

   private:
    static constexpr int kUnitRows = Dot::kElementsPerUnit;
    static constexpr std::int64_t kAhead = 32;  // units

    void start(std::int64_t chunk) {
      chunk_ = chunk;
      left_ = units_;
      from_ = codes_ + chunk * Rows::kChunkBytes;
      scale_ = scales_ + chunk * Rows::kChunkScales;
      out_ = panel_ + chunk * whole_steps(units_) * kChunk;
    }

    [[gnu::always_inline]] void put(const std::uint8_t* codes, const float* scales, float* out) const {
      Chunk chunk[kUnitRows];
#pragma GCC unroll 2
      for (int i = 0; i < kUnitRows; ++i)
        chunk[i] = w_.chunk(codes + i * w_.row_bytes(), scales + i * width_ * Rows::kChunkScales);
      const typename Dot::Columns columns = to_columns<Rows::kNatural>(chunk);
      for (int i = 0; i < Dot::kColumnVectors; ++i) store(out + i * kLanes, columns.v[i]);
    }

    const Rows& w_;
    std::int64_t u0_, units_, c0_, width_;
    float* panel_;
    bool stepwise_;
    const std::uint8_t* codes_ = nullptr;
    // The next step: chunks chunk_ and chunk_ + 1 of a unit; so many units are left of these chunks.
    std::int64_t chunk_ = 0, left_ = 0;
    const std::uint8_t* from_ = nullptr;
    const float* scale_ = nullptr;
    float* out_ = nullptr;
    float scales_[kPanelFloats / kChunk * kUnitRows * Rows::kChunkScales];
  };
  struct NoDecoder {
    void step() {}
  };

  // One register tile: kRows rows of L times kVectors vectors of columns, and its share of another panel's decoding.
  template <int kRows, int kVectors, class Decoding>
  [[gnu::noinline]] static void tile(const float* left, std::int64_t stride, const float* panel, std::int64_t units,
                                     float* sums, bool accumulate, Decoding& decoding) {
    F32 sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        sum[i][j] = kOneChain && accumulate ? load(sums + i * kChunk + j * kLanes) : zero();
    const auto multiply = [&](std::int64_t unit) {
      F32 columns[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) columns[j] = load(panel + unit * kChunk + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const float* unit_of_row = left + i * stride + unit;
        if constexpr (kVectors == 1) {
          sum[i][0] = Dot::dot_broadcast(sum[i][0], columns[0], unit_of_row);
        } else {
          const auto value = Dot::broadcast(unit_of_row);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) sum[i][j] = Dot::dot(sum[i][j], value, columns[j]);
        }
      }
    };
    std::int64_t unit = 0;
    if constexpr (!std::is_same_v<Decoding, NoDecoder>) {
      // A group has a tile for every kDecodingColumnStep vectors of a chunk, and a step decodes two chunks of a unit.
      constexpr std::int64_t kStep = 2 * Dot::kColumnVectors / kDecodingColumnStep;
      for (; unit + kStep <= units; unit += kStep) {
        decoding.step();
        for (std::int64_t i = 0; i < kStep; ++i) multiply(unit + i);
      }
    }
    for (; unit < units; ++unit) multiply(unit);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* out = sums + i * kChunk + j * kLanes;
        store(out, accumulate && !kOneChain ? add(load(out), sum[i][j]) : sum[i][j]);
      }
  }

  template <int kRows, class Decoding>
  static void group(const float* left, std::int64_t stride, const float* panel, std::int64_t units, int vectors,
                    float* sums, bool accumulate, Decoding& decoding) {
    constexpr std::int64_t kChain = Dot::kRestart / Dot::kElementsPerUnit;
    constexpr int kStep = std::is_same_v<Decoding, NoDecoder> ? kColumnStep : kDecodingColumnStep;
    for (int j = 0; j < vectors; j += kStep)
      for (std::int64_t unit = 0; unit < units; unit += kChain) {
        const float* columns = panel + unit * kChunk + j * kLanes;
        const std::int64_t count = smaller(kChain, units - unit);
        float* out = sums + j * kLanes;
        const bool add = accumulate || unit != 0;
        if (vectors - j == 1)
          tile<kRows, 1>(left + unit, stride, columns, count, out, add, decoding);
        else if (vectors - j == 2 || kStep == 2)
          tile<kRows, 2>(left + unit, stride, columns, count, out, add, decoding);
        else
          tile<kRows, kStep>(left + unit, stride, columns, count, out, add, decoding);
      }
  }
  template <class Decoding>
  static void group(int rows, const float* left, std::int64_t stride, const float* panel, std::int64_t units,
                    int vectors, float* sums, bool accumulate, Decoding& decoding) {
    static_assert(kGroupRows == 6);
    switch (rows) {
      case 1:
        return group<1>(left, stride, panel, units, vectors, sums, accumulate, decoding);
      case 2:
        return group<2>(left, stride, panel, units, vectors, sums, accumulate, decoding);
      case 3:
        return group<3>(left, stride, panel, units, vectors, sums, accumulate, decoding);
      case 4:
        return group<4>(left, stride, panel, units, vectors, sums, accumulate, decoding);
      case 5:
        return group<5>(left, stride, panel, units, vectors, sums, accumulate, decoding);
      default:
        return group<6>(left, stride, panel, units, vectors, sums, accumulate, decoding);
    }
  }

  // What a task computes: the groups g0 ... g1-1 and the chunks c0 ... c1-1.
  struct Part {
    const Groups& groups;
    std::int64_t g0, g1, c0, c1;
    std::int64_t step;  // units of a panel
    float* panels;      // two
    float* sums;
    float* totals;              // as sums, or null: sums go on to the end
    std::int64_t left_row = 0;  // the row of L with which packed L begins

    std::int64_t width() const { return c1 - c0; }
    float* sums_of(std::int64_t group, std::int64_t chunk) const { return at(sums, group, chunk); }
    float* at(float* all, std::int64_t group, std::int64_t chunk) const {
      return all + ((group - g0) * width() + (chunk - c0)) * kGroup * kChunk;
    }
    // Of the groups that are in `range` too.
    Part within(Range range, std::int64_t row) const {
      Part part = *this;
      part.g0 = larger(g0, range.begin);
      part.g1 = smaller(g1, range.end);
      part.left_row = row;
      if (part.g0 >= part.g1) return part;
      part.sums = at(sums, part.g0, c0);
      if (totals != nullptr) part.totals = at(totals, part.g0, c0);
      return part;
    }
  };

  // Adds all units of `left` times w to the part's sums, or sets them.
  template <class Rows>
  static void multiply(Tiles& tiles, const Rows& w, const float* left, const Part& part, bool accumulate) {
    const std::int64_t units = units_of(w.rows());
    const std::int64_t step = whole_steps(ceil_div(units, ceil_div(units, part.step)));  // panels of equal size
    const auto end_of = [&](std::int64_t u) { return smaller(u + step, units); };
    const auto panel_of = [&](std::int64_t u) { return part.panels + u / step % 2 * kPanelFloats; };
    const bool has_totals = part.totals != nullptr && units > kPanelsOfTotal * step;
    const auto multiply_with = [&](std::int64_t u, auto& decoding) {
      const bool afresh = has_totals && u != 0 && u / step % kPanelsOfTotal == 0;
      if (afresh) add_sums(part, part.sums, part.totals, u / step != kPanelsOfTotal);
      multiply_panel<Rows>(tiles, w.cols(), left, units, u, end_of(u), panel_of(u), part,
                           !afresh && (accumulate || u != 0), decoding);
    };
    NoDecoder none;
    if constexpr (Rows::kQuantized) {
      const auto decoder = [&](std::int64_t u) {
        return Decoder<Rows>(w, u, end_of(u), part.c0, part.c1, panel_of(u));
      };
      decoder(0).finish();
      for (std::int64_t u = 0; u < units; u += step) {
        if (end_of(u) == units) {
          multiply_with(u, none);
        } else {
          auto next = decoder(end_of(u));
          multiply_with(u, next);
          next.finish();
        }
      }
    } else {
      for (std::int64_t u = 0; u < units; u += step) {
        decode_panel(w, u, end_of(u), part.c0, part.c1, panel_of(u));
        multiply_with(u, none);
      }
    }
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
    const std::int64_t g1 = smaller(g0 + grid.row_part, cut.groups.end);
    const std::int64_t c0 = task / grid.row_parts * grid.column_tile;
    const std::int64_t c1 = smaller(c0 + grid.column_tile, ceil_div(w.cols(), kChunk)), width = c1 - c0;
    const bool has_totals = !kOneChain && cut.tiling.step() < Dot::kRestart / Dot::kElementsPerUnit;
    const std::int64_t count = (g1 - g0) * width * kGroup * kChunk;  // of sums
    float* panels = scratch_floats(Slot::thread, 2 * kPanelFloats + (has_totals ? 2 : 1) * count);
    float* sums = panels + 2 * kPanelFloats;
    const Part part{groups, g0, g1, c0, c1, cut.tiling.step(), panels, sums, has_totals ? sums + count : nullptr};
    Tiles tiles;
    const bool begun = add_low_rank(tiles, lora, part, count);
    multiply(tiles, w, left, part, begun);
    for (std::int64_t g = g0; g < g1; ++g)
      for (int row = 0; row < groups.size(g); ++row)
        for (std::int64_t c = c0; c < c1; ++c) {
          F32 natural[Dot::kColumnVectors];
          const float* from = part.sums_of(g, c) + row * kChunk;
          for (int i = 0; i < Dot::kColumnVectors; ++i) natural[i] = load(from + i * kLanes);
          if (!Rows::kNatural) Dot::to_natural(natural);
          write(groups.first(g) + row, c * kChunk, natural);
        }
  }

 private:
  // Begins the sums of a part with what its adapters give, and says whether there is an adapter.
  static bool add_low_rank(Tiles& tiles, const LowRanks& lora, const Part& part, std::int64_t floats) {
    if (lora.parts.empty()) return false;
    const LowRank& first = lora.parts.front();
    // The only adapter of all groups sets the sums; several add to them.
    const bool covers = lora.parts.size() == 1 && first.groups.begin <= part.g0 && first.groups.end >= part.g1;
    if (!covers) __builtin_memset(part.sums, 0, static_cast<std::size_t>(floats) * sizeof(float));
    for (const LowRank& of : lora.parts) {
      const Part own = part.within(of.groups, part.groups.first(of.groups.begin));
      if (own.g0 < own.g1) multiply(tiles, of.a, of.v, own, !covers);
    }
    if (lora.dropout) drop(lora, part);
    return true;
  }

  template <class Rows, class Decoding>
  static void multiply_panel(Tiles& tiles, std::int64_t cols, const float* left, std::int64_t units, std::int64_t u,
                             std::int64_t end, const float* panel, const Part& part, bool accumulate,
                             Decoding& decoding) {
    if constexpr (kByTiles) {
      return multiply_panel_by_tiles<Rows>(tiles, cols, left, units, u, end, panel, part, accumulate, decoding);
    } else {
      NoDecoder none;
      for (std::int64_t c = part.c0; c < part.c1; ++c) {
        const std::int64_t columns = smaller<std::int64_t>(kChunk, cols - c * kChunk);
        const int vectors = Rows::kNatural ? static_cast<int>(ceil_div(columns, kLanes)) : Dot::kColumnVectors;
        const float* from = panel + (c - part.c0) * (end - u) * kChunk;
        for (std::int64_t g = part.g0; g < part.g1; ++g) {
          const std::int64_t stride = packed_stride(units);
          const float* rows = left + (part.groups.first(g) - part.left_row) * stride + u;
          if (g == part.g0)
            group(part.groups.size(g), rows, stride, from, end - u, vectors, part.sums_of(g, c), accumulate, decoding);
          else
            group(part.groups.size(g), rows, stride, from, end - u, vectors, part.sums_of(g, c), accumulate, none);
        }
      }
    }
  }

  // The columns of two tiles for all groups, one after another: their part of the panel stays in the first-level cache.
  template <class Rows, class Decoding>
  static void multiply_panel_by_tiles(Tiles& tiles, std::int64_t cols, const float* left, std::int64_t units,
                                      std::int64_t u, std::int64_t end, const float* panel, const Part& part,
                                      bool accumulate, Decoding& decoding) {
    const std::int64_t steps = whole_steps(end - u), stride = packed_stride(units);
    const auto multiply_with = [&](auto& meanwhile) {
      for (std::int64_t c = part.c0; c < part.c1; ++c) {
        const std::int64_t columns = smaller<std::int64_t>(kChunk, cols - c * kChunk);
        const auto column_tiles = static_cast<int>(Rows::kNatural ? ceil_div(columns, kLanes) : kChunk / kLanes);
        const float* from = panel + (c - part.c0) * steps * kChunk;
        const auto block = [&](auto row_tiles, auto tile_columns, std::int64_t g, int first) {
          multiply_tiles<row_tiles, tile_columns>(
              tiles,
              {left + (part.groups.first(g) - part.left_row) * stride + u, stride, kTileRows * stride, kTileUnits},
              {from + first * kLanes, kChunk, kLanes, kTileUnits * kChunk}, steps,
              {part.sums_of(g, c) + first * kLanes, kChunk, kTileRows * kChunk, kLanes}, accumulate, meanwhile);
        };
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        constexpr std::integral_constant<int, 4> four;
        const bool one_tile_high = part.g1 - part.g0 == 1 && part.groups.size(part.g0) <= kTileRows;
        if (one_tile_high && column_tiles == 4) {
          block(one, four, part.g0, 0);
          continue;
        }
        for (int first = 0; first < column_tiles; first += 2)
          for (std::int64_t g = part.g0; g < part.g1; ++g) {
            const bool high = part.groups.size(g) > kTileRows, wide = first + 2 <= column_tiles;
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
      const std::int64_t tile_rows = ceil_div(part.groups.first(part.g1) - part.groups.first(part.g0), kTileRows);
      const std::int64_t products = tile_rows * part.width() * (kChunk / kLanes) * (steps / kTileUnits);
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
    for (std::int64_t g = part.g0; g < part.g1; ++g)
      for (std::int64_t c = part.c0; c < part.c1; ++c) {
        const std::int64_t first = part.sums_of(g, c) - part.sums;
        for (std::int64_t i = first; i < first + part.groups.size(g) * kChunk; i += kLanes)
          store(to + i, accumulate ? add(load(to + i), load(from + i)) : load(from + i));
      }
  }

  static void drop(const LowRanks& lora, const Part& part) {
    for (std::int64_t g = part.g0; g < part.g1; ++g)
      for (int row = 0; row < part.groups.size(g); ++row)
        for (std::int64_t c = part.c0; c < part.c1; ++c) {
          const std::uint64_t keep = lora.dropout.keep_bits(lora.first_row + part.groups.first(g) + row, c);
          float* p = part.sums_of(g, c) + row * kChunk;
          for (int i = 0; i < Dot::kColumnVectors; ++i)
            store(p + i * kLanes, Dot::keep_columns(load(p + i * kLanes), i, keep));
        }
  }
};

}  // namespace
}  // namespace qlora_native
