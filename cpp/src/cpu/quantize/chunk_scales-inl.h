// Scales as products take them: so many for each chunk of 64 elements. A block that is larger than its part of a chunk
// has its scale several times.
#pragma once

#include "cpu/isa/dot_f32-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/quantize/scales-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// Every kernel calls the functions of this one class: where they were templates and inlined, they were most of the
// code.
class ChunkScales {
 public:
  // Rows are counted from row `first_row` of all weights on.
  ChunkScales(const QuantizedWeightView& w, std::int64_t first_row, int per_chunk)
      : decoder_(w),
        first_row_(first_row),
        rows_(w.N),
        per_chunk_(per_chunk),
        per_row_(w.K / kChunk * per_chunk),
        blocks_per_row_(w.K / w.blocksize),
        shift_(__builtin_ctz(static_cast<unsigned>(w.blocksize)) -
               __builtin_ctz(static_cast<unsigned>(kChunk / per_chunk))) {}

  // The scales of some chunks of some rows, whose blocks are at least as large as their part of a chunk. `out` has the
  // rows `stride` floats apart, and so has `minima`, which is null for a weight without minima.
  [[gnu::noinline]] void decode(Range rows, Range chunks, float* out, float* minima, std::int64_t stride) const {
    BlocksOfRows blocks{first(rows.begin, chunks.begin), chunks.count() * per_chunk_, rows.count(), per_row_};
    if (blocks.count == per_row_ && stride == per_row_)  // one long row
      blocks = {blocks.first, blocks.count * blocks.rows, 1, 0};
    if (shift_ == 0) return decoder_.decode(blocks, out, minima, stride);
    const std::int64_t times = std::int64_t{1} << shift_, skipped = blocks.first & (times - 1);
    if (per_row_ % times == 0 || blocks.rows == 1) {  // no block straddles rows
      const std::int64_t count = ceil_div(skipped + blocks.count, times);
      const bool side_by_side = stride == blocks.count && stride == count * times;
      decoder_.decode({blocks.first >> shift_, count, blocks.rows, per_row_ >> shift_}, out, minima,
                      side_by_side ? count : stride);
      if (side_by_side) blocks = {blocks.first, blocks.count * blocks.rows, 1, 0};
      for (std::int64_t row = 0; row < blocks.rows; ++row) {
        repeat(out + row * stride, blocks.count, skipped);
        if (minima != nullptr) repeat(minima + row * stride, blocks.count, skipped);
      }
      return;
    }
    for (std::int64_t row = 0; row < rows.count(); ++row)
      decode({rows.begin + row, rows.begin + row + 1}, chunks, out + row * stride,
             minima == nullptr ? nullptr : minima + row * stride, blocks.count);
  }
  // The stride for a kernel that takes a chunk of many rows, one row after another, where each row has `scales` scales.
  // Rows 512 bytes or a multiple of it apart would share few sets of the first-level cache, and push each other out
  // before the next chunk reads the same lines.
  static std::int64_t stride_of(std::int64_t scales) { return scales % 128 == 0 ? scales + kLanes : scales; }
  // Prefetches such scales, as far as the weight has the rows.
  [[gnu::noinline]] void prefetch(Range rows, Range chunks) const {
    const std::int64_t begin = first(rows.begin, chunks.begin) >> shift_;
    const std::int64_t last = (first(rows.begin, chunks.end) - 1) >> shift_;
    decoder_.prefetch({begin, last - begin + 1, smaller(rows.end, rows_) - rows.begin, blocks_per_row_});
  }
  // The scales of blocks, each once.
  [[gnu::noinline]] void decode_blocks(std::int64_t first_block, std::int64_t count, float* out, float* minima) const {
    decoder_.decode({first_block, count, 1, 0}, out, minima, 0);
  }

 private:
  std::int64_t first(std::int64_t row, std::int64_t chunk) const {
    return (first_row_ + row) * per_row_ + chunk * per_chunk_;
  }
  // Lets each scale stand 2^shift_ times, in place, the first one `skipped` times fewer: `count` scales in all.
  void repeat(float* scales, std::int64_t count, std::int64_t skipped) const {
    const std::int64_t times = std::int64_t{1} << shift_;
    if (skipped == 0 && count % times == 0) {
      for (std::int64_t have = count / times; have < count; have *= 2) repeat_twice(scales, have);
      return;
    }
    // From the last on: no scale is overwritten before it is read.
    for (std::int64_t i = count; i-- > 0;) scales[i] = scales[(i + skipped) >> shift_];
  }
  static void repeat_twice(float* scales, std::int64_t count) {
    for (std::int64_t i = (count - 1) / kLanes * kLanes; i >= 0; i -= kLanes) {
      const int lanes = static_cast<int>(smaller<std::int64_t>(kLanes, count - i));
      const F32 once = load_as_f32<DType::f32>(scales + i, lanes);
      F32 first, second;
      interleave(once, once, first, second);
      store_from_f32<DType::f32>(scales + 2 * i, first, smaller(kLanes, 2 * lanes));
      if (2 * lanes > kLanes) store_from_f32<DType::f32>(scales + 2 * i + kLanes, second, 2 * lanes - kLanes);
    }
  }

  ScaleDecoder decoder_;
  std::int64_t first_row_, rows_;
  std::int64_t per_chunk_, per_row_, blocks_per_row_;
  int shift_;  // from scales that are handed out to blocks
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
