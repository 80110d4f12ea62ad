// Products by vectors without panels: dX = dY . W, and the gradients of an adapter, whose W is dense. What is decoded
// never leaves the first-level cache:
//
//   group    64 units of the rows of W, whose scales are decoded at once
//   stage    one chunk of the units of a group, [unit][64 columns], which multiplies one strip of dY after the other
//
// Where dY has so few rows that their accumulators leave registers for decoding, not even a stage is stored: a weight
// is decoded where it is multiplied.
#pragma once

#include "cpu/product/prefetch-inl.h"
#include "cpu/product/product_nn_layout-inl.h"
#include "cpu/product/register_tile-inl.h"
#include "cpu/quantize/quantized_rows-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot, class Rows>
class StageNn {
  using Layout = LayoutNn<Dot>;
  using Packed = typename Layout::Packed;
  using Part = typename Layout::Part;
  using Scales = typename Rows::Scales;
  static constexpr int kUnitRows = Dot::kElementsPerUnit;  // rows of W in a unit
  static constexpr std::int64_t kUnits = 64;               // of a group
  static constexpr std::int64_t kScaleFloats =
      kUnits * kUnitRows * (Layout::kMaxTileChunks * Rows::kChunkScales + kLanes);
  static constexpr std::int64_t kAllScales = (Scales::kHasMinimum ? 2 : 1) * kScaleFloats;
  static_assert(kAllScales + kUnits * kChunk <= Layout::kPanels * Layout::kPanelFloats);

 public:
  // Adds x . w to the accumulators of a part, or sets them to it. w is aligned.
  static void multiply(const Rows& w, const Packed& x, const Part& part, bool accumulate) {
    StageNn(w, x, part).multiply_all(accumulate);
  }

 private:
  StageNn(const Rows& w, const Packed& x, const Part& part)
      : w_(w),
        x_(x),
        part_(part),
        scale_row_(ChunkScales::stride_of(part.chunks.count() * Rows::kChunkScales)),
        ahead_(w.codes_at(x.units.begin * kUnitRows, part.chunks.begin), w.row_bytes(),
               part.chunks.count() * Rows::kChunkBytes) {}

  void multiply_all(bool accumulate) {
    const std::int64_t rows = smaller(kUnits * kUnitRows, w_.rows());  // of the first group
    ahead_.prefetch_lines(rows * part_.chunks.count() * Rows::kChunkBytes / 64);
    ahead_.prefetch_ends(rows);
    for (std::int64_t unit = x_.units.begin; unit < x_.units.end; unit += kUnits)
      multiply_group({unit, smaller(unit + kUnits, x_.units.end)}, accumulate || unit != x_.units.begin);
  }
  void multiply_group(Range units, bool accumulate) {
    const Range rows{units.begin * kUnitRows, smaller(units.end * kUnitRows, w_.rows())};
    float* minima = Scales::kHasMinimum ? part_.panels + kScaleFloats : nullptr;
    if constexpr (Rows::kQuantized) {
      w_.chunk_scales().decode(rows, part_.chunks, part_.panels, minima, scale_row_);
      w_.chunk_scales().prefetch({rows.end, smaller(rows.end + kUnits * kUnitRows, w_.rows())}, part_.chunks);
    }
    if (rows.end == w_.rows()) ahead_.stay();  // this is the last group
    for (std::int64_t c = part_.chunks.begin; c < part_.chunks.end; ++c) {
      const std::uint8_t* codes = w_.codes_at(rows.begin, c);
      const Scales scales = Scales{part_.panels, minima} + (c - part_.chunks.begin) * Rows::kChunkScales;
      if constexpr (kUnitRows == 1)
        if (part_.all_strips.rows > Layout::kMaxDirectRows) {
          decode_stage(codes, scales, units.count());
          for (std::int64_t s = part_.strips.begin; s < part_.strips.end; ++s) multiply_strip(units, c, s, accumulate);
          continue;
        }
      if constexpr (Layout::kMaxDirectRows > 0)
        with_constant<Layout::kMaxDirectRows>(part_.all_strips.size(0), [&](auto rows_of_dy) {
          multiply_directly<rows_of_dy>(codes, scales, units, part_.accumulators_of(0, c), accumulate);
        });
    }
    ahead_.prefetch_ends(rows.count());
  }
  // The units of a group in the first row of a strip.
  const float* rows_of_dy(Range units, std::int64_t strip) const {
    return x_.row(part_.all_strips.first(strip)) + units.begin - x_.units.begin;
  }

  float* stage() const { return part_.panels + kAllScales; }
  // Nothing in the loop writes memory but `out`, so that all else is in registers.
  [[gnu::noinline]] void decode_stage(const std::uint8_t* codes, Scales scales, std::int64_t count) {
    const typename Rows::ChunkDecoder decoder = w_.chunk_decoder();
    const std::int64_t row_bytes = w_.row_bytes(), scale_row = scale_row_;
    CodesAhead ahead = ahead_;
    float* out = stage();
    for (std::int64_t unit = 0; unit < count; ++unit) {
      prefetch_codes(ahead, unit);
      const typename Dot::Columns columns = Dot::columns(decoder.one(codes, scales));
      for (int i = 0; i < Dot::kColumnVectors; ++i) store(out + i * kLanes, columns.v[i]);
      codes += row_bytes;
      scales = scales + scale_row;
      out += kChunk;
    }
    ahead_ = ahead;
  }
  // Multiplies the stage by a strip. In fp32 a group is one chain of a sum.
  void multiply_strip(Range units, std::int64_t chunk, std::int64_t strip, bool accumulate) const {
    static_assert(kOneChain<Dot> || kUnits == Dot::kRestart);
    const std::int64_t next = strip + 1 < part_.strips.end ? strip + 1 : part_.strips.begin;
    with_constant<kMaxStripRows>(part_.all_strips.size(strip), [&](auto rows) {
      const auto multiply = [&](int first, auto ahead) {
        NoDecoder none;
        multiply_register_tile<Dot, rows, kColumnStep, kOneChain<Dot>, 1>(
            Strided{rows_of_dy(units, strip), x_.stride()},
            Strided{static_cast<const float*>(stage()) + first * kLanes, FixedStride<kChunk>()}, units.count(),
            Strided{part_.accumulators_of(strip, chunk) + first * kLanes, FixedStride<kChunk>()}, accumulate, ahead,
            none);
      };
      if constexpr (kColumnStep == Dot::kColumnVectors)
        multiply(0, RowsAhead<rows>{rows_of_dy(units, next), x_.stride()});
      else  // each row would be prefetched again for every kColumnStep vectors
        for (int i = 0; i < Dot::kColumnVectors; i += kColumnStep) multiply(i, NothingAhead());
    });
  }

  // Decodes one chunk of a group, and multiplies it by all rows of dY.
  template <int kRows>
  [[gnu::noinline]] void multiply_directly(const std::uint8_t* codes, Scales scales, Range units, float* accumulators,
                                           bool accumulate) {
    constexpr int kVectors = Dot::kColumnVectors;
    F32 accumulator[kRows][kVectors];
    const auto each = [&](const auto& f) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) f(accumulator[i][j], accumulators + Part::place(i, j));
    };
    each([&](F32& here, const float* there) { here = accumulate ? load(there) : zero(); });
    // Nothing in the loop writes memory, so that all of these are in registers.
    const typename Rows::ChunkDecoder decoder = w_.chunk_decoder();
    const float* dy = rows_of_dy(units, 0);
    const std::int64_t row_bytes = w_.row_bytes(), scale_row = scale_row_, stride = x_.stride();
    CodesAhead ahead = ahead_;
    const auto decode = [&]() __attribute__((always_inline)) {
      const typename Dot::Chunk chunk = decoder.one(codes, scales);
      codes += row_bytes;
      scales = scales + scale_row;
      return chunk;
    };
    const auto multiply = [&](const typename Dot::Chunk(&chunk)[kUnitRows]) __attribute__((always_inline)) {
      const typename Dot::Columns columns = Layout::template to_columns<false>(chunk);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto value = Dot::broadcast(dy + i * stride);
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) accumulator[i][j] = Dot::dot(accumulator[i][j], columns.v[j], value);
      }
      ++dy;
    };
    const std::int64_t rows = smaller(units.end * kUnitRows, w_.rows()) - units.begin * kUnitRows;
    for (std::int64_t unit = 0; unit < rows / kUnitRows; ++unit) {
      prefetch_codes(ahead, unit);
      typename Dot::Chunk chunk[kUnitRows];
#pragma GCC unroll 2
      for (int row = 0; row < kUnitRows; ++row) chunk[row] = decode();
      multiply(chunk);
    }
    if (rows % kUnitRows != 0) multiply({decode()});  // with zeros in the place of another row
    ahead_ = ahead;
    each([&](const F32& here, float* there) { store(there, here); });
  }
  // Prefetches as many codes as one chunk of a unit has: a line of two units, if that is half a line.
  [[gnu::always_inline]] static void prefetch_codes(CodesAhead& ahead, std::int64_t unit) {
    constexpr std::int64_t kBytes = Rows::kChunkBytes * kUnitRows;
    if (kBytes >= 64 || unit % 2 == 0) ahead.prefetch_lines(larger<std::int64_t>(kBytes / 64, 1));
  }

  const Rows& w_;
  const Packed& x_;
  const Part& part_;
  std::int64_t scale_row_;  // from a row's scales to the next row's
  CodesAhead ahead_;        // codes of the next group
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
