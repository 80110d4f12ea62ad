// Y = X . W^T by tiles for one strip of X, up to 64 rows, while W is decoded. With so few rows decoding takes most of
// the time, so everything else runs beside it, and what is decoded never leaves the first-level cache:
//
//   block          16 to 64 rows of W: as many as give four tiles of accumulators, or three, so that as many products
//                  do not wait for each other. They stay in registers for the whole inner dimension
//   stage          one chunk of each row of a block, [step of 16 units][row][unit], so that a tile is 1 KB in one piece
//
//   stage 0   decode   multiply
//   stage 1            decode     multiply
//
// A step of one stage is multiplied after a part of the next one was decoded: the processor begins the tile products of
// the step, and decodes the next part while they run. Two stages, their codes and scales, and the units of X that they
// meet are up to 28 KB.
#pragma once

#include "cpu/product/tiles-inl.h"
#include "cpu/quantize/quantized_rows-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr std::int64_t kMaxStripBlockRows = 4 * kTileRows;
constexpr int kMaxDecodingVectors = 4;  // of 16 rows, in a strip that decodes W

// kWidth is the number of tiles that the strip is wide.
template <class Dot, class Rows, int kWidth>
class StripNt {
  using Tiles = typename Dot::Tiles;
  using Scales = typename Rows::Scales;
  static constexpr int kRowTiles = 4 / kWidth;
  static constexpr int kSteps = Dot::kUnits / kTileUnits;  // of a stage, and the parts in which it is decoded
  static_assert(kSteps == Dot::kVectors);

 public:
  static constexpr std::int64_t kRows = kRowTiles * kTileRows;  // of W in a block

 private:
  static constexpr std::int64_t kStepFloats = kRows * kTileUnits, kStageFloats = kSteps * kStepFloats;
  static constexpr std::int64_t kPartRows = kRows / kSteps;
  static constexpr std::int64_t kScaledChunks = 248;  // whose scales are decoded at once: a row of up to 15872 elements
  static constexpr std::int64_t kScaleFloats = kRows * kScaledChunks * Rows::kChunkScales;
  static std::int64_t scale_stride(std::int64_t chunks) { return ChunkScales::stride_of(chunks * Rows::kChunkScales); }
  static_assert(kScaledChunks * Rows::kChunkScales % 128 >= kLanes);  // so that there is room for it
  // X of the next step is prefetched into the first-level cache: so many lines for each two rows of W.
  static constexpr int kLinesOfX = kWidth * kTileUnits * 2 / static_cast<int>(kPartRows);

 public:
  static constexpr std::int64_t kFloats = 2 * kStageFloats + (Scales::kHasMinimum ? 2 : 1) * kScaleFloats;

  // c = w . x^T for some rows of w, which is aligned. `memory` has kFloats floats.
  static void multiply(Tiles& tiles, const Rows& w, Range rows, TileGrid<const float*> x, TileGrid<float*> c,
                       float* memory) {
    prefetch(w, {rows.begin, smaller(rows.begin + kRows, rows.end)});
    for (std::int64_t row = rows.begin; row < rows.end; row += kRows, c.data += kRows * c.row)
      multiply_block(tiles, w, {row, smaller(row + kRows, rows.end)}, x, c, memory);
  }

 private:
  [[gnu::noinline]] static void multiply_block(Tiles& tiles, const Rows& w, Range rows, TileGrid<const float*> x,
                                               TileGrid<float*> c, float* memory) {
    using Block = TileBlock<kRowTiles, kWidth, Tiles>;
    const std::int64_t chunks = w.cols() / kChunk, row_bytes = w.row_bytes();
    const std::uint8_t* const codes = w.codes_at(rows.begin, 0);
    float* const scales = memory + 2 * kStageFloats;
    Range scaled{0, 0};
    const auto stage = [=](std::int64_t chunk) { return memory + chunk % 2 * kStageFloats; };
    const auto decode = [&](std::int64_t chunk, int part, const float* next_x) __attribute__((always_inline)) {
      if (chunk == scaled.end) {
        scaled = {chunk, smaller(chunk + kScaledChunks, chunks)};
        w.chunk_scales().decode(rows, scaled, scales, Scales::kHasMinimum ? scales + kScaleFloats : nullptr,
                                scale_stride(scaled.count()));
      }
      const std::int64_t first = part * kPartRows, scale_row = scale_stride(scaled.count());
      decode_rows({.decoder = w.chunk_decoder(),
                   .codes = codes + first * row_bytes + chunk * Rows::kChunkBytes,
                   .row_bytes = row_bytes,
                   .next_codes = codes + kRows * row_bytes + (chunk * kRows + first) * Rows::kChunkBytes,
                   .scales = Scales{scales, scales + kScaleFloats} + first * scale_row +
                             (chunk - scaled.begin) * Rows::kChunkScales,
                   .scale_row = scale_row,
                   .count = smaller(kPartRows, rows.count() - first),
                   .next_x = next_x,
                   .out = stage(chunk) + first * kTileUnits});
    };
    Range next{rows.end, rows.end + kRows / 8};
    Block::begin(tiles, c, false);
    for (std::int64_t chunk = -1; chunk < chunks; ++chunk) {
      // The scales of the next block, in parts: so many lines at once would keep the codes waiting.
      if (next.begin < rows.end + kRows) w.chunk_scales().prefetch(next, {0, chunks});
      next = {next.end, next.end + next.count()};
      for (int step = 0; step < kSteps; ++step) {
        if (chunk + 1 < chunks) decode(chunk + 1, step, x.data + x.step);
        if (chunk < 0) continue;
        // Tiles of a block without so many rows hold anything, and give rows that nobody reads.
        Block::template multiply<Streamed::a>(
            tiles, {stage(chunk) + step * kStepFloats, kTileUnits, kTileRows * kTileUnits, 0}, x);
        x.data += x.step;
      }
    }
    Block::end(tiles, c, rows.count());
  }

  // Prefetches codes into the second-level cache: in the first one rows that are a power of two apart would push each
  // other out. The codes of a block lie in one piece, and are prefetched in its order while the block before is
  // multiplied, because the processor goes on by itself where it sees one line after another.
  static void prefetch(const Rows& w, Range rows) {
    const std::uint8_t* const codes = w.codes_at(rows.begin, 0);
    for (std::int64_t i = 0; i < rows.count() * w.row_bytes(); i += 64) __builtin_prefetch(codes + i, 0, 2);
  }

  // One chunk of each of some rows, and where it goes.
  struct Part {
    typename Rows::ChunkDecoder decoder;
    const std::uint8_t* codes;
    std::int64_t row_bytes;
    const std::uint8_t* next_codes;  // of the next block
    Scales scales;
    std::int64_t scale_row, count;
    const float* next_x;
    float* out;
  };
  // Nothing in these loops writes memory but `out`, so that all else is in registers. Two rows are decoded together.
  [[gnu::always_inline]] static void decode_rows(Part part) {
    for (; part.count >= 2; part.count -= 2) {
      for (int i = 0; i < kLinesOfX; ++i) __builtin_prefetch(part.next_x + i * kTileUnits, 0, 3);
      for (int i = 0; i < static_cast<int>(Rows::kChunkBytes / 32); ++i)
        __builtin_prefetch(part.next_codes + i * 64, 0, 2);
      typename Dot::Chunk chunk[2];
      part.decoder.two({part.codes, part.codes + part.row_bytes}, {part.scales, part.scales + part.scale_row}, chunk);
      for (int i = 0; i < 2; ++i) write(chunk[i], part.out + i * kTileUnits);
      part.codes += 2 * part.row_bytes;
      part.next_codes += 2 * Rows::kChunkBytes;
      part.scales = part.scales + 2 * part.scale_row;
      part.next_x += kLinesOfX * kTileUnits;
      part.out += 2 * kTileUnits;
    }
    if (part.count == 1) write(part.decoder.one(part.codes, part.scales), part.out);
  }
  [[gnu::always_inline]] static void write(const typename Dot::Chunk& chunk, float* out) {
    for (int step = 0; step < kSteps; ++step) store(out + step * kStepFloats, chunk.v[step]);
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
