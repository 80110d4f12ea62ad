// Y = X . W^T: lanes across the rows of X, units of W broadcast.
//
//   packed X       strips of 1 ... kMaxStripVectors vectors of rows; a strip is [unit][vector][lane]
//   panel          the decoded rows of W, [row][unit], kPanelStride units apart
//   accumulators   fp32, a strip is [row of W][vector][lane]: Y transposed, until it is written
//
// Decoding leaves a row of W contiguous, which is what a broadcast reads, so W is never transposed. With tiles, rows of
// the panel are A, a strip is B, and the accumulators are C (tiles-inl.h).
#pragma once

#include "cpu/product/panel_pipeline-inl.h"
#include "cpu/product/prefetch-inl.h"
#include "cpu/product/register_tile-inl.h"
#include "cpu/product/strip_nt-inl.h"
#include "cpu/product/tiles-inl.h"
#include "cpu/runtime/blocking.h"

namespace qlora_native::QLN_ISA {
namespace {

// The strips that `vectors` vectors of rows are cut into. All have one width, but for the last ones.
class Strips {
 public:
  Strips(std::int64_t vectors, int width, int max_width) : vectors_(vectors), width_(width) {
    const std::int64_t rest = vectors % width;
    count_ = vectors / width + (rest != 0);
    if (rest == 1 && vectors > width && max_width > width) --count_;  // 3 + 1 -> 4
  }
  std::int64_t vectors() const { return vectors_; }
  std::int64_t count() const { return count_; }
  std::int64_t first(std::int64_t strip) const { return strip < count_ ? strip * width_ : vectors_; }
  int width(std::int64_t strip) const {
    return static_cast<int>(strip + 1 < count_ ? width_ : vectors_ - strip * width_);
  }

 private:
  std::int64_t vectors_, width_, count_;
};

template <class Dot>
struct ProductNt {
  using Chunk = typename Dot::Chunk;
  using Tiles = typename TilesOf<Dot>::type;
  static_assert(!kTiled<Dot> || kLanes == kTileUnits);
  // Vectors of rows in a strip. With tiles there are two, so that a block of a panel has 2 x 2 tiles.
  static constexpr int kStripVectors = kTiled<Dot> ? 2 : 3;
  static constexpr int kMaxStripWidth = kTiled<Dot> ? kMaxDecodingVectors : kMaxStripVectors;
  // Chunks of the inner dimension that are multiplied at once: the panel stays in the second-level cache.
  static constexpr std::int64_t kBlockChunks = Dot::kBlock / kChunk;
  // With tiles a panel may have some more, so that a narrow W has one panel and its accumulators stay in registers.
  static constexpr std::int64_t kMaxChunks = kTiled<Dot> ? kBlockChunks * 5 / 4 : kBlockChunks;
  static constexpr std::int64_t kBlockUnits = kMaxChunks * Dot::kUnits;
  static constexpr std::int64_t kPanelStride = kBlockUnits + 16;  // a power of two would share few cache sets
  // Rows of W in a panel. Tiles get more of them, because they multiply so fast that reading X again for other rows of
  // W would be the limit.
  static constexpr std::int64_t kMaxPanelRows = kTiled<Dot> ? 256 : 64;
  static constexpr std::int64_t kMinPanelRows = 16;  // a multiple of every kRowsOfStrip
  static constexpr std::int64_t kPanelFloats = kMaxPanelRows * kPanelStride;
  static constexpr int kPanels = kTiled<Dot> ? 1 : 2;  // that there is memory for

  // Whether strips decode W for themselves (strip_nt-inl.h), without panels.
  static bool strips_decode(std::int64_t vectors) { return kTiled<Dot> && vectors <= kMaxDecodingVectors; }
  // The strips of rows that have `units` units each. Where strips decode there is one, unless X would leave the
  // second-level cache: it is read again for each block of W. On an Intel Xeon (Emerald Rapids) one strip of 33 to 64
  // rows took 0.70 to 0.94 times as long as two, and 1.05 times for 64 rows of 14336 columns.
  static Strips strips_of(std::int64_t rows, std::int64_t units) {
    const std::int64_t vectors = ceil_div(rows, kLanes);
    if (strips_decode(vectors) && vectors * kLanes * units * 4 <= kTunedL2)
      return Strips(vectors, kMaxStripWidth, kMaxStripWidth);
    return Strips(vectors, kStripVectors, kTiled<Dot> ? kStripVectors : kMaxStripWidth);
  }

  template <class Rows>
  static std::int64_t padded_units(const Rows& rows) {
    constexpr std::int64_t kMultiple = kTiled<Dot> ? kTileUnits : 1;
    if (Rows::kNatural) return ceil_div(ceil_div(rows.cols(), Dot::kElementsPerUnit), kMultiple) * kMultiple;
    return ceil_div(rows.cols(), kChunk) * Dot::kUnits;
  }

  // Packs some chunks of rows of x, from row `first` on, as one strip. Rows that x does not have become zero.
  template <class Rows>
  static void pack_strip(const Rows& x, std::int64_t first, int width, Range chunks, float* out) {
    alignas(64) float rows[kLanes][Dot::kUnits];
    const std::int64_t units_end = padded_units(x) - chunks.begin * Dot::kUnits;
    for (std::int64_t c = chunks.begin; c < chunks.end; ++c) {
      for (int vector = 0; vector < width; ++vector) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t row = first + vector * kLanes + lane;
          x.template chunks<1>(row, row >= 0 && row < x.rows(), {c, c + 1}, [&](std::int64_t, const Chunk(&chunk)[1]) {
            for (int i = 0; i < Dot::kVectors; ++i) store(&rows[lane][i * kLanes], chunk[0].v[i]);
          });
        }
        for (int i = 0; i < Dot::kVectors; ++i) {
          F32 tile[kLanes];
          for (int lane = 0; lane < kLanes; ++lane) tile[lane] = load(&rows[lane][i * kLanes]);
          transpose(tile);
          for (int unit = 0; unit < kLanes; ++unit) {
            const std::int64_t at = (c - chunks.begin) * Dot::kUnits + i * kLanes + unit;
            if (at < units_end) store(out + (at * width + vector) * kLanes, tile[unit]);
          }
        }
      }
    }
  }

  static std::int64_t whole_tiles(std::int64_t rows) { return ceil_div(rows, kMinPanelRows) * kMinPanelRows; }

  // Rows of W, [row][unit], and zeros up to a whole register tile.
  struct Panel {
    using Chunk = typename Dot::Chunk;
    static constexpr int kLineRows = 1;
    static constexpr bool kLineAfterLine = true;
    static constexpr std::int64_t kMaxScaledChunks = kMaxPanelRows * kMaxChunks;
    Range lines, chunks;
    float* data;

    static std::int64_t line_stride() { return kPanelStride; }
    static std::int64_t chunk_stride() { return Dot::kUnits; }
    // Rows that are multiplied.
    std::int64_t rows() const { return whole_tiles(lines.count()); }
    const float* row(std::int64_t r) const { return data + r * kPanelStride; }

    template <bool>
    static void write(const Chunk (&chunk)[1], float* out) {
      for (int i = 0; i < Dot::kVectors; ++i) store(out + i * kLanes, chunk[0].v[i]);
    }
    void clear_rest() const {
      for (std::int64_t row = lines.count(); row < rows(); ++row)
        __builtin_memset(data + row * kPanelStride, 0,
                         static_cast<std::size_t>(chunks.count() * Dot::kUnits) * sizeof(float));
    }
  };

  // Some vectors of rows of X, [unit][vector][lane]. From a unit to the next it is more than `width` vectors where they
  // are a part of a wider strip. `next` is what is multiplied after it, if that is known.
  struct Strip {
    const float* data;
    int width;
    std::int64_t unit_stride;
    const float* next = nullptr;

    const float* ahead() const { return next == nullptr ? data : next; }
  };
  // Its accumulators, [row of W][vector][lane].
  struct Accumulators {
    float* data;
    std::int64_t row_stride;
  };

  // Multiplies a strip by the first `units` units of a panel. strip.data begins with the same units.
  template <class Decoding>
  static void multiply_strip(Tiles& tiles, const Strip& strip, const Panel& panel, std::int64_t units,
                             const Accumulators& accumulators, bool accumulate, Decoding& decoding) {
    with_constant<kMaxStripWidth>(strip.width, [&](auto width) {
      if constexpr (kTiled<Dot>)
        multiply_by_tiles<width>(tiles, strip, panel, units, accumulators, accumulate);
      else
        multiply_by_vectors<width>(strip, panel, units, accumulators, accumulate, decoding);
    });
  }

  // Some strips of packed X, whose rows have `units` units each.
  struct Packed {
    const float* data;
    std::int64_t units;
    const Strips& strips;
    Range range;

    std::int64_t vectors() const { return strips.first(range.end) - strips.first(range.begin); }
    Strip strip(std::int64_t s, std::int64_t unit) const {
      const int width = strips.width(s);
      return {data + (strips.first(s) * units + unit * width) * kLanes, width, width * kLanes};
    }
    // The accumulators of strip s in a buffer [strip][row of W][vector][lane] for these rows of W.
    Accumulators accumulators(std::int64_t s, float* all, Range rows) const {
      const std::int64_t vectors_before = strips.first(s) - strips.first(range.begin);
      return {all + vectors_before * whole_tiles(rows.count()) * kLanes, strips.width(s) * kLanes};
    }
  };

  // Panels side by side, of rows of W that have `cols` elements.
  static std::int64_t blocks(std::int64_t cols) {
    const std::int64_t chunks = ceil_div(cols, kChunk);
    return chunks <= kMaxChunks ? 1 : ceil_div(chunks, kBlockChunks);
  }
  // The panels of w [N, K].
  static std::int64_t panels(std::int64_t N, std::int64_t K) { return ceil_div(N, kMaxPanelRows) * blocks(K); }
  // The floats of the accumulators that multiply() takes. Where a panel has all columns of W, they are for one strip
  // after the other, and stay in the first-level cache.
  static std::int64_t accumulator_floats(std::int64_t vectors, std::int64_t cols) {
    return (blocks(cols) == 1 ? kMaxStripWidth : vectors) * kLanes * kMaxPanelRows;
  }

  // Multiplies by some rows of W. For each panel of them and each strip it calls before(rows, strip) before the last
  // part of the product, and after(rows, strip, its accumulators) after it.
  template <class Rows, class Before, class After>
  static void multiply(Tiles& tiles, const Rows& w, Range rows, const Packed& x, float* panels, float* accumulators,
                       const Before& before, const After& after) {
    if constexpr (kTiled<Dot> && Rows::kQuantized && !Rows::kRare)
      if (strips_decode(x.strips.vectors()) && w.aligned())
        return multiply_each_strip(tiles, w, rows, x, panels, accumulators, after);
    const std::int64_t chunks = ceil_div(w.cols(), kChunk), blocks = ProductNt::blocks(w.cols());
    // Panels are of equal size, because only a panel that is not larger than the one before is prefetched as a whole.
    const std::int64_t width = ceil_div(chunks, blocks);
    const auto panel_of = [&](std::int64_t i) {
      const std::int64_t row = rows.begin + i / blocks * kMaxPanelRows, chunk = i % blocks * width;
      return Panel{.lines = {row, smaller(row + kMaxPanelRows, rows.end)},
                   .chunks = {chunk, smaller(chunk + width, chunks)},
                   .data = panels + i % kPanels * kPanelFloats};
    };
    multiply_panels<!kTiled<Dot>>(w, ceil_div(rows.count(), kMaxPanelRows) * blocks, panel_of,
                                  [&](std::int64_t i, const Panel& panel, auto& decoding) {
                                    multiply_panel(tiles, x, panel, accumulators, blocks, i, before, after, decoding);
                                  });
  }

  // Writes the accumulators of a strip of `width` vectors and some rows of W, times `scale`, plus bias, to rows m ...
  // of `out`, as far as it has them.
  static void write(const Accumulators& accumulators, int width, Range rows, float scale, const void* bias, Matrix out,
                    std::int64_t m) {
    constexpr DType kType = Dot::kActivation;
    constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
    constexpr int kColumns = kSize == 2 ? 2 * kLanes : kLanes;  // that are as long as a vector
    const std::int64_t n = rows.begin, count = rows.count();
    for (std::int64_t j = 0; j < count;) {
      const int columns = static_cast<int>(smaller<std::int64_t>(count - j < kColumns ? kLanes : kColumns, count - j));
      const bool pairs = columns > kLanes;  // then a lane is two columns
      alignas(64) float added[kColumns] = {};
      if (bias != nullptr)
        for (int i = 0; i < columns; i += kLanes)
          store(added + i,
                load_as_f32<kType>(static_cast<const char*>(bias) + (n + j + i) * kSize, smaller(kLanes, columns - i)));
      for (int vector = 0; vector < width; ++vector) {
        const auto column = [&](int i) {
          const float* from = accumulators.data + (j + i) * accumulators.row_stride + vector * kLanes;
          return add(mul(i < columns ? load(from) : zero(), set1(scale)), set1(added[i]));
        };
        F32 block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = pairs ? pair_of<kType>(column(2 * i), column(2 * i + 1)) : column(i);
        transpose(block);
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t row = m + vector * kLanes + lane;
          if (row < 0) continue;
          if (row >= out.rows) break;
          char* to = static_cast<char*>(out.data) + (row * out.stride + n + j) * kSize;
          if (pairs)
            store(reinterpret_cast<float*>(to), block[lane]);
          else
            store_from_f32<kType>(to, block[lane], columns);
        }
      }
      j += columns;
    }
  }

 private:
  // While a part of a strip, `units` units, is multiplied by kRows rows of W at a time, the rows together prefetch the
  // part that begins at `next`.
  template <int kRows, int kWidth>
  static auto share_of_next(const float* next, std::int64_t units, std::int64_t row) {
    constexpr std::int64_t kBytes = kWidth * kLanes * 4 * kRows / kMaxPanelRows;  // of a unit
    return BytesAhead<kBytes, kTiled<Dot> ? kTileUnits : 1>{reinterpret_cast<const char*>(next) +
                                                            row / kRows * units * kBytes};
  }

  // Lanes of two adjacent elements of 16 bits, x before y.
  template <DType kType>
  static F32 pair_of(F32 x, F32 y) {
    alignas(64) float pairs[2 * kLanes];
    store_pairs<kType, false>(pairs, round_to<kType>(x), round_to<kType>(y));
    return load(pairs);
  }

  static TileGrid<const float*> tiles_of(const Strip& strip) {
    return {strip.data, strip.unit_stride, kLanes, kTileUnits * strip.unit_stride};
  }
  static TileGrid<float*> tiles_of(const Accumulators& accumulators) {
    return {accumulators.data, accumulators.row_stride, kTileRows * accumulators.row_stride, kLanes};
  }

  template <class Rows, class After>
  static void multiply_each_strip(Tiles& tiles, const Rows& w, Range rows, const Packed& x, float* memory,
                                  float* accumulators, const After& after) {
    for (std::int64_t row = rows.begin; row < rows.end; row += kMaxPanelRows) {
      const Range panel{row, smaller(row + kMaxPanelRows, rows.end)};
      for (std::int64_t s = x.range.begin; s < x.range.end; ++s)
        with_constant<kMaxDecodingVectors>(x.strips.width(s), [&](auto width) {
          using Kernel = StripNt<Dot, Rows, width>;
          static_assert(Kernel::kFloats <= kPanels * kPanelFloats && kMaxPanelRows % Kernel::kRows == 0);
          const Accumulators into{accumulators, width * kLanes};
          Kernel::multiply(tiles, w, panel, tiles_of(x.strip(s, 0)), tiles_of(into), memory);
          after(panel, s, into);
        });
    }
  }

  // Multiplies all strips by panel i of rows that `blocks` panels have side by side.
  template <class Before, class After, class Decoding>
  static void multiply_panel(Tiles& tiles, const Packed& x, const Panel& panel, float* accumulators,
                             std::int64_t blocks, std::int64_t i, const Before& before, const After& after,
                             Decoding& decoding) {
    const std::int64_t unit = panel.chunks.begin * Dot::kUnits,
                       units = smaller(panel.chunks.count() * Dot::kUnits, x.units - unit);
    const bool last = i % blocks == blocks - 1;
    const auto multiply_with = [&](std::int64_t s, auto& meanwhile) {
      Accumulators into = x.accumulators(s, accumulators, panel.lines);
      if (blocks == 1) into.data = accumulators;
      if (last) before(panel.lines, s);
      Strip strip = x.strip(s, unit);
      strip.next =
          s + 1 < x.range.end ? x.strip(s + 1, unit).data : x.strip(x.range.begin, last ? 0 : unit + units).data;
      multiply_strip(tiles, strip, panel, units, into, unit != 0, meanwhile);
      if (last) after(panel.lines, s, into);
    };
    NoDecoder none;
    multiply_with(x.range.begin, decoding);
    for (std::int64_t s = x.range.begin + 1; s < x.range.end; ++s) multiply_with(s, none);
  }

  template <int kWidth, class Decoding>
  static void multiply_by_vectors(const Strip& strip, const Panel& panel, std::int64_t units,
                                  const Accumulators& accumulators, bool accumulate, Decoding& decoding) {
    constexpr bool kDecodes = !std::is_same_v<Decoding, NoDecoder>;
    constexpr int kRows = kDecodes ? kRowsOfDecodingStrip[kWidth] : kRowsOfStrip[kWidth];
    constexpr std::int64_t kChain = Dot::kRestart / Dot::kElementsPerUnit;
    // The strip's tiles have kMaxPanelRows / kRows * units between them, the panel kMaxPanelRows * units / (2 * kUnits)
    // pairs of chunks.
    constexpr std::int64_t kDecodingUnits = larger(2 * Dot::kUnits / kRows, 1);
    // A chain of units is multiplied by all rows of W, so that its part of the strip is in the first-level cache from
    // the second rows on.
    for (std::int64_t unit = 0; unit < units; unit += kChain) {
      const float* part = strip.data + unit * strip.unit_stride;
      const float* next = unit + kChain < units ? part + kChain * strip.unit_stride : strip.ahead();
      for (std::int64_t row = 0; row < panel.rows(); row += kRows)
        multiply_register_tile<Dot, kRows, kWidth, false, kDecodingUnits>(
            Strided{panel.row(row) + unit, FixedStride<kPanelStride>()}, Strided{part, strip.unit_stride},
            smaller(kChain, units - unit),
            Strided{accumulators.data + row * accumulators.row_stride, accumulators.row_stride},
            accumulate || unit != 0, share_of_next<kRows, kWidth>(next, smaller(kChain, units), row), decoding);
    }
  }

  // Multiplies blocks of 2 x 2 tiles, or of four rows of tiles where the strip is one tile wide.
  template <int kWidth>
  static void multiply_by_tiles(Tiles& tiles, const Strip& strip, const Panel& panel, std::int64_t units,
                                const Accumulators& accumulators, bool accumulate) {
    constexpr int kBlockRows = 4 / kWidth;
    const auto multiply = [&](auto tile_rows, std::int64_t row) {
      multiply_tiles<tile_rows, kWidth, Streamed::a>(
          tiles, {panel.row(row), kPanelStride, kTileRows * kPanelStride, kTileUnits}, tiles_of(strip), units,
          tiles_of(Accumulators{accumulators.data + row * accumulators.row_stride, accumulators.row_stride}),
          accumulate, tile_rows * kTileRows * accumulators.row_stride,
          share_of_next<kBlockRows * kTileRows, kWidth>(strip.ahead(), units, row));
    };
    std::int64_t row = 0;
    for (; row + kBlockRows * kTileRows <= panel.rows(); row += kBlockRows * kTileRows)
      multiply(std::integral_constant<int, kBlockRows>(), row);
    for (; row < panel.rows(); row += kTileRows) multiply(std::integral_constant<int, 1>(), row);
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
