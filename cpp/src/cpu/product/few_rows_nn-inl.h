// dX = dY . W of few rows by vectors. A weight is decoded where it is multiplied, and what is decoded never leaves the
// registers:
//
//   group    64 units of the rows of W, whose scales are decoded at once
//   chunk    64 columns of a group, which one strip of dY after the other is multiplied by
//
// The accumulators of a chunk are in registers while its group is multiplied: all of its columns, or a part of them
// where there are many rows for the registers.
#pragma once

#include "cpu/product/prefetch-inl.h"
#include "cpu/product/product_nn_layout-inl.h"
#include "cpu/quantize/quantized_rows-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot, class Rows>
class FewRowsNn {
  using Layout = LayoutNn<Dot>;
  using Packed = typename Layout::Packed;
  using Part = typename Layout::Part;
  using Scales = typename Rows::Scales;
  static constexpr int kUnitRows = Dot::kElementsPerUnit;  // rows of W in a unit
  static constexpr std::int64_t kUnits = 64;               // of a group
  static constexpr std::int64_t kScaledChunks = 32;        // of a group, whose scales are decoded at once
  static constexpr std::int64_t kScaleFloats = kUnits * kUnitRows * (kScaledChunks * Rows::kChunkScales + kLanes);
  static_assert((Scales::kHasMinimum ? 2 : 1) * kScaleFloats <= Layout::kPanels * Layout::kPanelFloats);

 public:
  static constexpr int kMaxRows = Layout::max_few_rows(Rows::kByTable);

  // Adds x . w to the accumulators of a part, or sets them to it. w is aligned.
  static void multiply(const Rows& w, const Packed& x, const Part& part, bool accumulate) {
    for (std::int64_t c = part.chunks.begin; c < part.chunks.end; c += kScaledChunks)
      FewRowsNn(w, x, part, {c, smaller(c + kScaledChunks, part.chunks.end)}).multiply_columns(accumulate);
  }

 private:
  FewRowsNn(const Rows& w, const Packed& x, const Part& part, Range chunks)
      : w_(w),
        x_(x),
        part_(part),
        chunks_(chunks),
        scale_row_(ChunkScales::stride_of(chunks.count() * Rows::kChunkScales)),
        ahead_{w.codes_at(x.units.begin * kUnitRows, chunks.begin), w.row_bytes(),
               ceil_div(chunks.count() * Rows::kChunkBytes, 64)} {}

  void multiply_columns(bool accumulate) {
    ahead_.prefetch(smaller(kUnits * kUnitRows, w_.rows()) * ahead_.lines);  // the first group
    for (std::int64_t unit = x_.units.begin; unit < x_.units.end; unit += kUnits)
      multiply_group({unit, smaller(unit + kUnits, x_.units.end)}, accumulate || unit != x_.units.begin);
  }
  void multiply_group(Range units, bool accumulate) {
    const Range rows{units.begin * kUnitRows, smaller(units.end * kUnitRows, w_.rows())};
    float* minima = Scales::kHasMinimum ? part_.panels + kScaleFloats : nullptr;
    w_.chunk_scales().decode(rows, chunks_, part_.panels, minima, scale_row_);
    w_.chunk_scales().prefetch({rows.end, smaller(rows.end + kUnits * kUnitRows, w_.rows())}, chunks_);
    if (rows.end == w_.rows()) ahead_.row_bytes = 0;  // after the last group it stays where it is
    for (std::int64_t c = chunks_.begin; c < chunks_.end; ++c) {
      Operands operands{.codes = w_.codes_at(rows.begin, c),
                        .scales = Scales{part_.panels, minima} + (c - chunks_.begin) * Rows::kChunkScales,
                        .rows = rows.count(),
                        .accumulate = accumulate};
      for (std::int64_t s = part_.strips.begin; s < part_.strips.end; ++s) {
        operands.dy = x_.row(part_.all_strips.first(s)) + units.begin - x_.units.begin;
        operands.accumulators = part_.accumulators_of(s, c);
        operands.is_first = s == part_.strips.begin;
        with_constant<smaller(kMaxStripRows, kMaxRows)>(part_.all_strips.size(s), [&](auto rows_of_dy) {
          // All columns, or a half of them.
          constexpr bool kHalves = rows_of_dy * Dot::kColumnVectors > Layout::kFewAccumulators;
          constexpr int kVectors = Dot::kColumnVectors / (kHalves ? 2 : 1);
          static_assert(rows_of_dy * kVectors <= Layout::kFewAccumulators);
          multiply_chunk<rows_of_dy, 0, kVectors>(operands);
          if constexpr (kHalves) multiply_chunk<rows_of_dy, kVectors, kVectors>(operands);
        });
      }
    }
  }

  // One chunk of a group, and a strip of dY.
  struct Operands {
    const std::uint8_t* codes;
    Scales scales;
    std::int64_t rows;  // of W
    const float* dy = nullptr;
    float* accumulators = nullptr;
    bool accumulate, is_first = true;  // of the strips
  };
  template <int kRows, int kFirst, int kVectors>
  [[gnu::noinline]] void multiply_chunk(const Operands& operands) {
    F32 accumulator[kRows][kVectors];
    const auto each = [&](const auto& f) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) f(accumulator[i][j], operands.accumulators + Part::place(i, kFirst + j));
    };
    each([&](F32& here, const float* there) { here = operands.accumulate ? load(there) : zero(); });
    // Nothing in the loop writes memory, so that all of these are in registers.
    const typename Rows::ChunkDecoder decoder = w_.chunk_decoder();
    const std::uint8_t* codes = operands.codes;
    const float* dy = operands.dy;
    const std::int64_t row_bytes = w_.row_bytes(), scale_row = scale_row_, stride = x_.stride();
    Scales scales = operands.scales;
    PiecesAhead ahead = ahead_;
    const bool prefetches = kFirst == 0 && operands.is_first;
    const auto decode = [&]() __attribute__((always_inline)) {
      const typename Dot::Chunk chunk = decoder.one(codes, scales);
      codes += row_bytes;
      scales = scales + scale_row;
      return chunk;
    };
    const auto multiply = [&](const typename Dot::Chunk(&chunk)[kUnitRows]) __attribute__((always_inline)) {
      const typename Dot::Columns columns = columns_of(chunk);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto value = Dot::broadcast(dy + i * stride);
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j)
          accumulator[i][j] = Dot::dot(accumulator[i][j], columns.v[kFirst + j], value);
      }
      ++dy;
    };
    for (std::int64_t unit = 0; unit < operands.rows / kUnitRows; ++unit) {
      constexpr std::int64_t kBytes = Rows::kChunkBytes * kUnitRows;
      if (prefetches && (kBytes >= 64 || unit % 2 == 0)) ahead.prefetch(larger<std::int64_t>(kBytes / 64, 1));
      typename Dot::Chunk chunk[kUnitRows];
#pragma GCC unroll 2
      for (int row = 0; row < kUnitRows; ++row) chunk[row] = decode();
      multiply(chunk);
    }
    if (operands.rows % kUnitRows != 0) multiply({decode()});  // with zeros in the place of another row
    ahead_ = ahead;
    each([&](const F32& here, float* there) { store(there, here); });
  }
  static typename Dot::Columns columns_of(const typename Dot::Chunk (&chunk)[kUnitRows]) {
    if constexpr (kUnitRows == 1)
      return Dot::columns(chunk[0]);
    else
      return Dot::columns(chunk[0], chunk[1]);
  }

  const Rows& w_;
  const Packed& x_;
  const Part& part_;
  Range chunks_;
  std::int64_t scale_row_;  // from a row's scales to the next row's
  PiecesAhead ahead_;       // codes of the next group
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
