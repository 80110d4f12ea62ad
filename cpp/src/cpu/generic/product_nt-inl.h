// Y = X . W^T for many rows of X: lanes across the rows of X, units of W broadcast.
//
//   packed X   strips of 1 ... kWidestStrip vectors of rows; a strip is [unit][vector][lane]
//   panel      the decoded rows of W, [row][unit], kPanelStride units apart
//   sums       fp32, a strip is [row of W][vector][lane]: Y transposed, turned when it is written
//
// Decoding leaves a row of W contiguous, and a broadcast wants just that; so W is never transposed. With tiles, rows of
// the panel are A, a strip is B, and the sums are C (tiles-inl.h).
#pragma once

#include "cpu/generic/rows-inl.h"
#include "cpu/generic/tiles-inl.h"

namespace qlora_native {
namespace {

// The strips that `vectors` vectors of rows are cut into: all of one width, but for the last ones.
class Strips {
 public:
  Strips(std::int64_t vectors, int width, int widest) : vectors_(vectors), width_(width) {
    const std::int64_t rest = vectors % width;
    count_ = vectors / width + (rest != 0);
    if (rest == 1 && vectors > width && widest > width) --count_;  // 3 + 1 -> 4
  }
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
  // Vectors of rows in a strip. Of tiles two, so that a block has 2 x 2 of them.
  static constexpr int kStripVectors = kTiled<Dot> ? 2 : 3;
  static constexpr int kWidest = kTiled<Dot> ? 2 : kWidestStrip;
  // Chunks of the inner dimension that are multiplied at once: the panel stays in the second-level cache.
  static constexpr std::int64_t kBlockChunks = Dot::kBlock / kChunk;
  static constexpr std::int64_t kBlockUnits = kBlockChunks * Dot::kUnits;
  static constexpr std::int64_t kPanelStride = kBlockUnits + 16;  // a power of two would share few cache sets
  // Rows of W. Of tiles more, for these multiply so fast that reading X again for other rows of W would be the limit.
  static constexpr std::int64_t kWidestTile = kTiled<Dot> ? 256 : 64;
  static constexpr std::int64_t kNarrowestTile = 16;  // a multiple of every kRowsOfStrip
  static constexpr std::int64_t kPanelFloats = kWidestTile * kPanelStride;

  template <class Rows>
  static std::int64_t padded_units(const Rows& rows) {
    constexpr std::int64_t kMultiple = kTiled<Dot> ? kTileUnits : 1;
    if (Rows::kNatural) return ceil_div(ceil_div(rows.cols(), Dot::kElementsPerUnit), kMultiple) * kMultiple;
    return ceil_div(rows.cols(), kChunk) * Dot::kUnits;
  }

  // Rows of x from `first` on, chunks c0 ... c1-1, as one strip. Rows before the first and past the end are zero.
  template <class Rows>
  static void pack_strip(const Rows& x, std::int64_t first, int width, std::int64_t c0, std::int64_t c1, float* out) {
    alignas(64) float rows[kLanes][Dot::kUnits];
    const std::int64_t units_end = padded_units(x) - c0 * Dot::kUnits;
    for (std::int64_t c = c0; c < c1; ++c) {
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
            const std::int64_t at = (c - c0) * Dot::kUnits + i * kLanes + unit;
            if (at < units_end) store(out + (at * width + vector) * kLanes, tile[unit]);
          }
        }
      }
    }
  }

  // Rows n ... n+count-1 of W, chunks c0 ... c1-1, into the panel; zeros up to `rows`, a whole register tile.
  template <class Rows>
  static void decode_panel(const Rows& w, std::int64_t n, std::int64_t count, std::int64_t rows, std::int64_t c0,
                           std::int64_t c1, float* panel) {
    for (std::int64_t row = 0; row < rows; ++row) {
      float* out = panel + row * kPanelStride;
      w.template chunks<1>(n + row, row < count, {c0, c1}, [&](std::int64_t c, const Chunk(&chunk)[1]) {
        for (int i = 0; i < Dot::kVectors; ++i) store(out + (c - c0) * Dot::kUnits + i * kLanes, chunk[0].v[i]);
      });
    }
  }

  // Decodes a panel a little at a time, between the multiplications of another one, so that decoding, multiplying and
  // reading memory overlap.
  template <class Rows>
  class Decoder {
   public:
    // `next`: the codes that are wanted after these ones, or null; asked for meanwhile.
    Decoder(const Rows& w, std::int64_t n, std::int64_t count, std::int64_t rows, std::int64_t c0, std::int64_t c1,
            const std::uint8_t* next, float* panel)
        : w_(w), n_(n), count_(count), rows_(rows), c0_(c0), c1_(c1), panel_(panel) {
      if (!w.aligned()) return;
      left_ = count;
      from_ = w.codes_at(n, c0);
      out_ = panel;
      scale_ = scales_;
      ahead_ = next != nullptr ? next - from_ : 0;
      w.chunk_scales({n, n + count}, {c0, c1}, scales_, kBlockChunks * Rows::kChunkScales);
      if (c1 * kChunk < w.cols())
        w.prefetch_scales({n, n + count}, {c1, smaller(c1 + (c1 - c0), w.cols() / kChunk)});
      else
        w.prefetch_scales({n + count, n + 2 * count}, {0, c1 - c0});
      for (std::int64_t row = count; row < rows; ++row)
        __builtin_memset(panel + row * kPanelStride, 0,
                         static_cast<std::size_t>((c1 - c0) * Dot::kUnits) * sizeof(float));
    }

    // How often step() has something to do.
    std::int64_t steps() const { return w_.aligned() ? count_ * ceil_div(c1_ - c0_, std::int64_t{2}) : 0; }
    // Two chunks, one cache line of 4-bit codes.
    void step() {
      if (left_ == 0) return;
      for (std::int64_t i = 0; i < 2 * Rows::kChunkBytes; i += 64) __builtin_prefetch(from_ + ahead_ + i, 0, 2);
      put(w_.chunk(from_, scale_), out_);
      if (chunk_ + 1 < c1_ - c0_)
        put(w_.chunk(from_ + Rows::kChunkBytes, scale_ + Rows::kChunkScales), out_ + Dot::kUnits);
      chunk_ += 2;
      from_ += 2 * Rows::kChunkBytes;
      out_ += 2 * Dot::kUnits;
      scale_ += 2 * Rows::kChunkScales;
      if (chunk_ < c1_ - c0_) return;
      from_ += w_.row_bytes() - chunk_ * Rows::kChunkBytes;  // the next row
      out_ += kPanelStride - chunk_ * Dot::kUnits;
      scale_ += (kBlockChunks - chunk_) * Rows::kChunkScales;
      chunk_ = 0;
      --left_;
    }
    void finish() {
      if (!w_.aligned()) return decode_panel(w_, n_, count_, rows_, c0_, c1_, panel_);
      while (left_ > 0) step();
    }

   private:
    static void put(const Chunk& chunk, float* out) {
      for (int i = 0; i < Dot::kVectors; ++i) store(out + i * kLanes, chunk.v[i]);
    }

    const Rows& w_;
    std::int64_t n_, count_, rows_, c0_, c1_;
    float* panel_;
    // The next step: chunks chunk_ and chunk_ + 1 of a row; so many rows are left.
    std::int64_t left_ = 0, chunk_ = 0, ahead_ = 0;
    const std::uint8_t* from_ = nullptr;
    float* out_ = nullptr;
    const float* scale_ = nullptr;
    float scales_[kWidestTile * kBlockChunks * Rows::kChunkScales];
  };
  struct NoDecoder {
    void step() {}
  };

  // One register tile: kWidth vectors of rows of x times kRows rows of W, and its share of another panel's decoding.
  template <int kWidth, int kRows, class Decoding>
  [[gnu::noinline]] static void tile(const float* x, std::int64_t x_row, const float* panel, std::int64_t units,
                                     float* sums, std::int64_t sums_row, bool accumulate, Decoding& decoding) {
    F32 sum[kRows][kWidth];
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) sum[j][i] = zero();
    const auto multiply = [&](std::int64_t unit) {
      F32 rows[kWidth];
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) rows[i] = load(x + i * kLanes);
      x += x_row;
#pragma GCC unroll 16
      for (int j = 0; j < kRows; ++j) {
        const float* weight = panel + j * kPanelStride + unit;
        if constexpr (kWidth == 1) {
          sum[j][0] = Dot::dot_broadcast(sum[j][0], rows[0], weight);
        } else {
          const auto weights = Dot::broadcast(weight);
#pragma GCC unroll 4
          for (int i = 0; i < kWidth; ++i) sum[j][i] = Dot::dot(sum[j][i], rows[i], weights);
        }
      }
    };
    std::int64_t unit = 0;
    if constexpr (!std::is_same_v<Decoding, NoDecoder>) {
      // The strip's tiles have kWidestTile / kRows * units between them, the panel kWidestTile * units / (2 * kUnits)
      // pairs of chunks.
      constexpr std::int64_t kStep = larger(2 * Dot::kUnits / kRows, 1);
      for (; unit + kStep <= units; unit += kStep) {
        decoding.step();
        for (std::int64_t i = 0; i < kStep; ++i) multiply(unit + i);
      }
    }
    for (; unit < units; ++unit) multiply(unit);
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) {
        float* out = sums + j * sums_row + i * kLanes;
        store(out, accumulate ? add(load(out), sum[j][i]) : sum[j][i]);
      }
  }

  // `x_row` and `sums_row`: floats from a unit of x, and from the sums of a row of W, to the next. They are more than
  // kWidth vectors where those are a part of a wider strip.
  template <int kWidth, class Decoding>
  static void strip(const float* x, std::int64_t x_row, const float* panel, std::int64_t rows, std::int64_t units,
                    float* sums, std::int64_t sums_row, bool accumulate, Decoding& decoding) {
    constexpr int kRows = std::is_same_v<Decoding, NoDecoder> ? kRowsOfStrip[kWidth] : kRowsOfDecodingStrip[kWidth];
    constexpr std::int64_t kChain = Dot::kRestart / Dot::kElementsPerUnit;
    // All rows of W for a chain, so that its part of the strip is read from the first-level cache, but for once.
    for (std::int64_t unit = 0; unit < units; unit += kChain)
      for (std::int64_t n = 0; n < rows; n += kRows)
        tile<kWidth, kRows>(x + unit * x_row, x_row, panel + n * kPanelStride + unit, smaller(kChain, units - unit),
                            sums + n * sums_row, sums_row, accumulate || unit != 0, decoding);
  }
  // The same by tiles: blocks of 2 x 2, or of four rows of tiles where the strip is one tile wide.
  template <int kWidth, class Decoding>
  static void strip_of_tiles(Tiles& tiles, const float* x, std::int64_t x_row, const float* panel, std::int64_t rows,
                             std::int64_t units, float* sums, std::int64_t sums_row, bool accumulate,
                             Decoding& decoding) {
    const TileGrid<const float*> b{x, x_row, kLanes, kTileUnits * x_row};
    const auto multiply = [&](auto tile_rows, std::int64_t n) {
      multiply_tiles<tile_rows, kWidth>(
          tiles, {panel + n * kPanelStride, kPanelStride, kTileRows * kPanelStride, kTileUnits}, b, units,
          {sums + n * sums_row, sums_row, kTileRows * sums_row, kLanes}, accumulate, decoding);
    };
    constexpr int kBlockRows = 4 / kWidth;
    std::int64_t n = 0;
    for (; n + kBlockRows * kTileRows <= rows; n += kBlockRows * kTileRows)
      multiply(std::integral_constant<int, kBlockRows>(), n);
    for (; n < rows; n += kTileRows) multiply(std::integral_constant<int, 1>(), n);
  }
  template <class Decoding>
  static void strip(Tiles& tiles, int width, const float* x, std::int64_t x_row, const float* panel, std::int64_t rows,
                    std::int64_t units, float* sums, std::int64_t sums_row, bool accumulate, Decoding& decoding) {
    if constexpr (kTiled<Dot>) {
      if (width == 1)
        return strip_of_tiles<1>(tiles, x, x_row, panel, rows, units, sums, sums_row, accumulate, decoding);
      return strip_of_tiles<2>(tiles, x, x_row, panel, rows, units, sums, sums_row, accumulate, decoding);
    } else {
      switch (width) {
        case 1:
          return strip<1>(x, x_row, panel, rows, units, sums, sums_row, accumulate, decoding);
        case 2:
          return strip<2>(x, x_row, panel, rows, units, sums, sums_row, accumulate, decoding);
        case 3:
          return strip<3>(x, x_row, panel, rows, units, sums, sums_row, accumulate, decoding);
        default:
          return strip<kWidestStrip>(x, x_row, panel, rows, units, sums, sums_row, accumulate, decoding);
      }
    }
  }

  // Packed rows of x: the strips first ... last-1 of `strips`, each row `units` units.
  struct Packed {
    const float* data;
    std::int64_t units;
    const Strips& strips;
    std::int64_t first, last;

    const float* strip(std::int64_t s, std::int64_t unit) const {
      return data + (strips.first(s) * units + unit * strips.width(s)) * kLanes;
    }
    // Where strip s has its sums, in a buffer [strip][tile_rows][vector][lane].
    std::int64_t sums(std::int64_t s, std::int64_t tile_rows) const {
      return (strips.first(s) - strips.first(first)) * tile_rows * kLanes;
    }
  };

  template <class Decoding>
  static void multiply_panel(Tiles& tiles, const Packed& x, std::int64_t unit, std::int64_t units, const float* panel,
                             std::int64_t tile_rows, float* sums, bool accumulate, Decoding& decoding) {
    NoDecoder none;
    for (std::int64_t s = x.first; s < x.last; ++s) {
      const std::int64_t row = x.strips.width(s) * kLanes;
      const auto strip_with = [&](auto& meanwhile) {
        strip(tiles, x.strips.width(s), x.strip(s, unit), row, panel, tile_rows, units, sums + x.sums(s, tile_rows),
              row, accumulate, meanwhile);
      };
      if constexpr (kTiled<Dot> && !std::is_same_v<Decoding, NoDecoder>) {
        // Decoding takes longer than one strip's products, so all strips share it.
        const std::int64_t products = (x.strips.first(x.last) - x.strips.first(x.first)) * (tile_rows / kTileRows);
        Paced<Decoding> paced{decoding, ceil_div(4 * decoding.steps(), products * (units / kTileUnits))};
        strip_with(paced);
      } else if (s == x.first) {
        strip_with(decoding);
      } else {
        strip_with(none);
      }
    }
  }

  // All rows `begin` ... end-1 of W, tile by tile; done(n, tile_rows, sums) after each.
  template <class Rows, class Done>
  static void multiply(Tiles& tiles, const Rows& w, std::int64_t begin, std::int64_t end, const Packed& x,
                       float* panels, float* sums, Done&& done) {
    const std::int64_t chunks = ceil_div(w.cols(), kChunk), blocks = ceil_div(chunks, kBlockChunks);
    const std::int64_t total = ceil_div(end - begin, kWidestTile) * blocks;
    const auto tile_of = [&](std::int64_t i) { return begin + i / blocks * kWidestTile; };
    const auto chunk_of = [&](std::int64_t i) { return i % blocks * kBlockChunks; };
    const auto rows_of_tile = [&](std::int64_t i) { return smaller(kWidestTile, end - tile_of(i)); };
    const auto decoder = [&](std::int64_t i) {
      const std::int64_t count = rows_of_tile(i);
      return Decoder<Rows>(
          w, tile_of(i), count, whole_tiles(count), chunk_of(i), smaller(chunk_of(i) + kBlockChunks, chunks),
          i + 1 < total ? w.codes_at(tile_of(i + 1), chunk_of(i + 1)) : nullptr, panels + i % 2 * kPanelFloats);
    };
    decoder(0).finish();
    for (std::int64_t i = 0; i < total; ++i) {
      const std::int64_t tile_rows = whole_tiles(rows_of_tile(i)), unit = chunk_of(i) * Dot::kUnits;
      const std::int64_t units = smaller(kBlockUnits, x.units - unit);
      float* panel = panels + i % 2 * kPanelFloats;
      if (i + 1 < total) {
        auto next = decoder(i + 1);
        multiply_panel(tiles, x, unit, units, panel, tile_rows, sums, chunk_of(i) != 0, next);
        next.finish();
      } else {
        NoDecoder none;
        multiply_panel(tiles, x, unit, units, panel, tile_rows, sums, chunk_of(i) != 0, none);
      }
      if (i % blocks == blocks - 1) done(tile_of(i), tile_rows, panel);
    }
  }

  static std::int64_t whole_tiles(std::int64_t rows) { return ceil_div(rows, kNarrowestTile) * kNarrowestTile; }

  // The sums of one strip, times `scale`, plus bias, to rows m ... and columns n ... of `out`, as far as it has them.
  static void write(const float* sums, int width, std::int64_t tile_rows, float scale, const void* bias, Matrix out,
                    std::int64_t m, std::int64_t n) {
    constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));
    for (std::int64_t j = 0; j < tile_rows && n + j < out.cols; j += kLanes) {
      const int columns = static_cast<int>(smaller<std::int64_t>(kLanes, out.cols - (n + j)));
      F32 added = zero();
      if (bias != nullptr)
        added = load_as_f32<Dot::kActivation>(static_cast<const char*>(bias) + (n + j) * kSize, columns);
      for (int vector = 0; vector < width; ++vector) {
        F32 block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = j + i < tile_rows ? load(sums + ((j + i) * width + vector) * kLanes) : zero();
        transpose(block);
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t row = m + vector * kLanes + lane;
          if (row < 0) continue;
          if (row >= out.rows) break;
          store_from_f32<Dot::kActivation>(static_cast<char*>(out.data) + (row * out.stride + n + j) * kSize,
                                           add(mul(block[lane], set1(scale)), added), columns);
        }
      }
    }
  }
};

}  // namespace
}  // namespace qlora_native
