// Y = X . W^T for many rows of X: lanes across the rows of X, units of W broadcast.
//
//   packed X   strips of 1 ... kWidestStrip vectors of rows; a strip is [unit][vector][lane]
//   panel      the decoded rows of W, [row][unit], kPanelStride units apart
//   sums       fp32, a strip is [row of W][vector][lane]: Y transposed, turned when it is written
//
// Decoding leaves a row of W contiguous, and a broadcast wants just that; so W is never transposed.
#pragma once

namespace qlora_native {
namespace {

// The strips that `vectors` vectors of rows are cut into: all of width 3, but for the last ones.
class Strips {
 public:
  explicit Strips(std::int64_t vectors) : vectors_(vectors) {
    const std::int64_t rest = vectors % 3;
    count_ = vectors / 3 + (rest != 0);
    if (rest == 1 && vectors > 3 && kWidestStrip >= 4) --count_;  // 3 + 1 -> 4
  }
  std::int64_t count() const { return count_; }
  std::int64_t first(std::int64_t strip) const { return strip < count_ ? strip * 3 : vectors_; }
  int width(std::int64_t strip) const {
    return static_cast<int>(strip + 1 < count_ ? 3 : vectors_ - strip * 3);
  }

 private:
  std::int64_t vectors_, count_;
};

template <class Dot>
struct ProductNt {
  using Chunk = typename Dot::Chunk;
  // Chunks of the inner dimension that are multiplied at once: the panel stays in the second-level cache, and the
  // sums start afresh.
  static constexpr std::int64_t kBlockChunks = Dot::kRestart / kChunk;
  static constexpr std::int64_t kBlockUnits = kBlockChunks * Dot::kUnits;
  static constexpr std::int64_t kPanelStride = kBlockUnits + 16;  // a power of two would share few cache sets
  static constexpr std::int64_t kWidestTile = 64;                 // rows of W
  static constexpr std::int64_t kPanelFloats = kWidestTile * kPanelStride;

  template <class Rows>
  static std::int64_t padded_units(const Rows& rows) {
    if (Rows::kNatural) return ceil_div(rows.cols(), Dot::kElementsPerUnit);
    return ceil_div(rows.cols(), kChunk) * Dot::kUnits;
  }

  // Rows of x from `first` on, chunks c0 ... c1-1, as one strip. Rows past the end are zero.
  template <class Rows>
  static void pack_strip(const Rows& x, std::int64_t first, int width, std::int64_t c0, std::int64_t c1, float* out) {
    alignas(64) float rows[kLanes][Dot::kUnits];
    const std::int64_t units_end = padded_units(x) - c0 * Dot::kUnits;
    for (std::int64_t c = c0; c < c1; ++c) {
      for (int vector = 0; vector < width; ++vector) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t row = first + vector * kLanes + lane;
          x.template chunks<1>(row, row < x.rows(), c, c + 1, [&](std::int64_t, const Chunk(&chunk)[1]) {
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
      w.template chunks<1>(n + row, row < count, c0, c1, [&](std::int64_t c, const Chunk(&chunk)[1]) {
        for (int i = 0; i < Dot::kVectors; ++i) store(out + (c - c0) * Dot::kUnits + i * kLanes, chunk[0].v[i]);
      });
    }
  }

  // The codes that the next panel will be decoded from, asked for while this one multiplies: memory is then busy all
  // the time, instead of in bursts.
  struct Ahead {
    const std::uint8_t* codes = nullptr;  // null: nothing
    std::int64_t row_bytes = 0;
    std::int64_t units_per_line = 1;  // units of a panel that 64 bytes of codes stand for
  };

  // One register tile: kWidth vectors of rows of x times kRows rows of W.
  template <int kWidth, int kRows>
  static void tile(const float* x, const float* panel, std::int64_t units, float* sums, bool accumulate,
                   const Ahead& ahead) {
    F32 sum[kRows][kWidth];
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) sum[j][i] = zero();
    const auto step = [&](std::int64_t unit) {
      F32 rows[kWidth];
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) rows[i] = load(x + i * kLanes);
      x += kWidth * kLanes;
#pragma GCC unroll 16
      for (int j = 0; j < kRows; ++j) {
        const F32 weight = set1(panel[j * kPanelStride + unit]);
#pragma GCC unroll 4
        for (int i = 0; i < kWidth; ++i) sum[j][i] = Dot::dot(sum[j][i], rows[i], weight);
      }
    };
    std::int64_t unit = 0;
    if (ahead.codes != nullptr) {
      for (const std::uint8_t* line = ahead.codes; unit + ahead.units_per_line <= units; line += 64) {
        for (int j = 0; j < kRows; ++j) __builtin_prefetch(line + j * ahead.row_bytes, 0, 2);
        for (const std::int64_t end = unit + ahead.units_per_line; unit < end; ++unit) step(unit);
      }
    }
    for (; unit < units; ++unit) step(unit);
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) {
        float* out = sums + (j * kWidth + i) * kLanes;
        store(out, accumulate ? add(load(out), sum[j][i]) : sum[j][i]);
      }
  }

  template <int kWidth>
  static void strip(const float* x, const float* panel, std::int64_t rows, std::int64_t units, float* sums,
                    bool accumulate, Ahead ahead) {
    constexpr int kRows = kRowsOfStrip[kWidth];
    for (std::int64_t n = 0; n < rows; n += kRows) {
      tile<kWidth, kRows>(x, panel + n * kPanelStride, units, sums + n * kWidth * kLanes, accumulate, ahead);
      ahead.codes += ahead.codes != nullptr ? kRows * ahead.row_bytes : 0;
    }
  }
  static void strip(int width, const float* x, const float* panel, std::int64_t rows, std::int64_t units, float* sums,
                    bool accumulate, const Ahead& ahead) {
    switch (width) {
      case 1: return strip<1>(x, panel, rows, units, sums, accumulate, ahead);
      case 2: return strip<2>(x, panel, rows, units, sums, accumulate, ahead);
      case 3: return strip<3>(x, panel, rows, units, sums, accumulate, ahead);
      default: return strip<kWidestStrip>(x, panel, rows, units, sums, accumulate, ahead);
    }
  }

  // Rows n ... n+count-1 of W times the strips first ... last-1; x is packed with `x_units` units a row. `more`: the
  // caller goes on with the rows after these. sums: [strip][tile_rows][vector][lane].
  template <class Rows>
  static void multiply(const Rows& w, std::int64_t n, std::int64_t count, std::int64_t tile_rows, const Strips& strips,
                       std::int64_t first, std::int64_t last, const float* x, std::int64_t x_units, float* panel,
                       float* sums, bool accumulate, bool more) {
    const std::int64_t chunks = ceil_div(w.cols(), kChunk);
    for (std::int64_t c = 0; c < chunks; c += kBlockChunks) {
      const std::int64_t end = smaller(c + kBlockChunks, chunks);
      const std::int64_t unit = c * Dot::kUnits, units = smaller(end * Dot::kUnits, x_units) - unit;
      decode_panel(w, n, count, tile_rows, c, end, panel);
      Ahead ahead{nullptr, w.row_bytes(), 64 * w.cols() / larger<std::int64_t>(1, w.row_bytes()) / Dot::kElementsPerUnit};
      if (end < chunks)
        ahead.codes = w.codes_at(n, end);
      else if (more)
        ahead.codes = w.codes_at(n + tile_rows, 0);
      for (std::int64_t s = first; s < last; ++s) {
        const int width = strips.width(s);
        strip(width, x + (strips.first(s) * x_units + unit * width) * kLanes, panel, tile_rows, units,
              sums + (strips.first(s) - strips.first(first)) * tile_rows * kLanes, accumulate || c != 0, ahead);
        ahead.codes = nullptr;
      }
    }
  }

  // The sums of one strip, times `scale`, plus bias, to rows m ... and columns n ... of `out`.
  static void write(const float* sums, int width, std::int64_t tile_rows, float scale, const void* bias, Matrix out,
                    std::int64_t m, std::int64_t n) {
    constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));
    for (std::int64_t j = 0; j < tile_rows && n + j < out.cols; j += kLanes) {
      const int columns = static_cast<int>(smaller<std::int64_t>(kLanes, out.cols - (n + j)));
      F32 added = zero();
      if (bias != nullptr) {
        char copy[kLanes * kSize] = {};
        __builtin_memcpy(copy, static_cast<const char*>(bias) + (n + j) * kSize, static_cast<std::size_t>(columns * kSize));
        added = load_as_f32<Dot::kActivation>(copy);
      }
      for (int vector = 0; vector < width; ++vector) {
        F32 block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = j + i < tile_rows ? load(sums + ((j + i) * width + vector) * kLanes) : zero();
        transpose(block);
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t row = m + vector * kLanes + lane;
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
