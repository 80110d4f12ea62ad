// Products by tiles of few strips, while W is decoded: dX = dY . W of few rows, and the gradients of an adapter, whose
// W is dense. Decoding takes most of the time, so everything else runs beside it, and what is decoded never leaves the
// first-level cache:
//
//   group    128 rows of W, which are four steps of 16 units
//   stage    one chunk of the rows of a group, [unit][64 columns]
//
//   stage 0   decode   multiply
//   stage 1            decode     multiply
//
// A group's stages follow one another along its rows, and then comes the next group. Before each step of a stage is
// multiplied, a part of the next stage is decoded: the processor decodes it while the tile products before it run. To
// decode a whole stage and multiply it then takes longer for another reason too: tiles that have not been used for some
// 0.5 us need 0.25 us to begin again (Intel Xeon, Emerald Rapids).
#pragma once

#include "cpu/product/prefetch-inl.h"
#include "cpu/product/product_nn_layout-inl.h"
#include "cpu/quantize/quantized_rows-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot, class Rows>
class StripNn {
  using Layout = LayoutNn<Dot>;
  using Packed = typename Layout::Packed;
  using Part = typename Layout::Part;
  using Tiles = typename Dot::Tiles;
  using Scales = typename Rows::Scales;
  static constexpr std::int64_t kUnits = 4 * kTileUnits, kRows = kUnits * Dot::kElementsPerUnit;
  static constexpr std::int64_t kStageFloats = kUnits * kChunk;
  static constexpr std::int64_t kScaleFloats = kRows * (Layout::kMaxTileChunks * Rows::kChunkScales + kLanes);
  static_assert(Dot::kElementsPerUnit == 2);
  static_assert(2 * kStageFloats + (Scales::kHasMinimum ? 2 : 1) * kScaleFloats <=
                Layout::kPanels * Layout::kPanelFloats);

 public:
  // Adds x . w to the accumulators of a part, or sets them to it. w is aligned.
  static void multiply(Tiles& tiles, const Rows& w, const Packed& x, const Part& part, bool accumulate) {
    StripNn(tiles, w, x, part).multiply_all(accumulate);
  }

 private:
  StripNn(Tiles& tiles, const Rows& w, const Packed& x, const Part& part)
      : tiles_(tiles),
        w_(w),
        x_(x),
        part_(part),
        scale_row_(ChunkScales::stride_of(part.chunks.count() * Rows::kChunkScales)),
        ahead_(w.codes_at(2 * x.units.begin, part.chunks.begin), w.row_bytes(),
               part.chunks.count() * Rows::kChunkBytes) {}

  static constexpr std::int64_t kLinesOfUnit = 2 * Rows::kChunkBytes / 64;  // of a chunk

  // One chunk of the rows of a group, and how far it is decoded.
  struct Stage {
    std::int64_t unit, chunk, units;  // the group's first unit of w, and how many it has
    float* data;
    std::int64_t left;  // units that are not decoded
    const std::uint8_t* codes;
    Scales scales;
    float* out;
  };
  Stage stage_of(std::int64_t i) const {
    const std::int64_t unit = x_.units.begin + i / part_.chunks.count() * kUnits;
    const std::int64_t chunk = part_.chunks.begin + i % part_.chunks.count();
    const std::int64_t units = smaller(kUnits, x_.units.end - unit);
    float* data = part_.panels + i % 2 * kStageFloats;
    return {.unit = unit,
            .chunk = chunk,
            .units = units,
            .data = data,
            .left = units,
            .codes = w_.codes_at(2 * unit, chunk),
            .scales = Scales{scales(), scales() + kScaleFloats} + (chunk - part_.chunks.begin) * Rows::kChunkScales,
            .out = data};
  }

  // Decodes so many more units of a stage.
  [[gnu::always_inline]] void decode_some(Stage& stage, std::int64_t count) {
    if (stage.left == 0) return;
    if constexpr (Rows::kQuantized)
      if (stage.left == stage.units && stage.chunk == part_.chunks.begin) {
        if (stage.unit != x_.units.begin) ahead_.prefetch_ends(kRows);  // of the group that has been decoded
        decode_scales(stage);
      }
    count = smaller(count, stage.left);
    stage.left -= count;
    const bool odd = stage.left == 0 && w_.rows() < 2 * (stage.unit + stage.units);  // then the last unit has one row
    decode(stage, odd ? count - 1 : count);
    if (odd) write({w_.chunk_decoder().one(stage.codes, stage.scales), {}}, stage.out);
    if (stage.left == 0)  // and zeros up to a whole step
      for (std::int64_t unit = stage.units; unit < Layout::whole_steps(stage.units); ++unit)
        for (int i = 0; i < Dot::kColumnVectors; ++i) store(stage.data + unit * kChunk + i * kLanes, zero());
  }
  // Nothing in the loop writes memory but `out`, so that all else is in registers.
  [[gnu::noinline]] void decode(Stage& stage, std::int64_t count) {
    const typename Rows::ChunkDecoder decoder = w_.chunk_decoder();
    const std::uint8_t* codes = stage.codes;
    const std::int64_t row_bytes = w_.row_bytes(), scale_row = scale_row_;
    Scales scales = stage.scales;
    float* out = stage.out;
    CodesAhead ahead = ahead_;
    if (stage.unit + stage.units == x_.units.end) ahead.stay();  // this is the last group
    for (; count > 0; --count) {
      typename Dot::Chunk chunk[2];
      decoder.two({codes, codes + row_bytes}, {scales, scales + scale_row}, chunk);
      write(chunk, out);
      codes += 2 * row_bytes;
      scales = scales + 2 * scale_row;
      out += kChunk;
      ahead.prefetch_lines(kLinesOfUnit);
    }
    ahead_ = ahead;
    stage.codes = codes;
    stage.scales = scales;
    stage.out = out;
  }
  [[gnu::always_inline]] static void write(const typename Dot::Chunk (&chunk)[2], float* out) {
    const typename Dot::Columns columns = Dot::columns(chunk[0], chunk[1]);
    for (int i = 0; i < Dot::kColumnVectors; ++i) store(out + i * kLanes, columns.v[i]);
  }

  // The scales of a group, before its first chunk is decoded.
  void decode_scales(const Stage& stage) {
    const Range rows{2 * stage.unit, smaller(2 * (stage.unit + stage.units), w_.rows())};
    w_.chunk_scales().decode(rows, part_.chunks, scales(), Scales::kHasMinimum ? scales() + kScaleFloats : nullptr,
                             scale_row_);
    w_.chunk_scales().prefetch({rows.end, smaller(rows.end + kRows, w_.rows())}, part_.chunks);
  }
  float* scales() const { return part_.panels + 2 * kStageFloats; }

  void multiply_all(bool accumulate) {
    const std::int64_t units = x_.units.count(), stages = ceil_div(units, kUnits) * part_.chunks.count();
    for (std::int64_t i = 0; i < smaller(kUnits, units) * part_.chunks.count(); ++i)
      ahead_.prefetch_lines(kLinesOfUnit);  // the first group
    ahead_.prefetch_ends(2 * smaller(kUnits, units));
    Stage stage = stage_of(0);
    decode_some(stage, stage.units);
    for (std::int64_t i = 0; i < stages; ++i) {
      Stage next{};
      if (i + 1 < stages) next = stage_of(i + 1);
      multiply_stage(stage, next, accumulate || stage.unit != x_.units.begin);
      decode_some(next, next.units);
      stage = next;
    }
  }

  // Multiplies by a stage, and decodes the next one meanwhile.
  [[gnu::noinline]] void multiply_stage(const Stage& stage, Stage& next, bool accumulate) {
    const std::int64_t steps = ceil_div(stage.units, kTileUnits);
    const std::int64_t share = ceil_div(next.units, part_.strips.count() * 2 * steps);
    for (std::int64_t s = part_.strips.begin; s < part_.strips.end; ++s)
      with_constant<2>(part_.all_strips.size(s) > kTileRows ? 2 : 1, [&](auto row_tiles) {
        using Block = TileBlock<row_tiles, 2, Tiles>;
        for (int half = 0; half < 2; ++half) {
          TileGrid<const float*> a = Layout::tiles_of(x_, part_.all_strips, s, stage.unit);
          TileGrid<const float*> b{stage.data + half * 2 * kLanes, kChunk, kLanes, kTileUnits * kChunk};
          const TileGrid<float*> c{part_.accumulators_of(s, stage.chunk) + Part::place(0, 2 * half), Part::kRowStride,
                                   kTileRows * Part::kRowStride, kLanes};
          Block::begin(tiles_, c, accumulate);
          for (std::int64_t step = 0; step < steps; ++step) {
            decode_some(next, share);
            Block::template multiply<Streamed::a>(tiles_, a, b);
            a.data += a.step;
            b.data += b.step;
          }
          Block::end(tiles_, c);
        }
      });
  }

  Tiles& tiles_;
  const Rows& w_;
  const Packed& x_;
  const Part& part_;
  std::int64_t scale_row_;  // from a row's scales to the next row's
  CodesAhead ahead_;        // codes of the next group
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
