// The rows of a quantized weight, decoded in chunks of 64 elements in the order of the Dot (dot_f32-inl.h), with zeros
// past the end of a row.
#pragma once

#include <type_traits>

#include "common/layout.h"
#include "cpu/isa/dot_f32-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/quantize/scales-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// A chunk has kScales scales: one where blocks are as large as it or larger; in smaller ones, which only 4-bit codes
// have, one for each block.
template <class Dot, int kBits, int kScales = 1>
class QuantizedRows {
 public:
  static constexpr bool kQuantized = true;
  static constexpr bool kNatural = false;
  static constexpr std::int64_t kChunkScales = kScales;
  // `which` of w.count weights.
  explicit QuantizedRows(const QuantizedWeightView& w, std::int64_t which = 0)
      : w_(w),
        first_row_(which * w.N),
        shift_(__builtin_ctz(static_cast<unsigned>(w.blocksize))),
        aligned_(w.blocksize >= kScaleElements && (w.K % kChunk == 0 || w.N * w.count == 1)),
        scales_(w) {
    if constexpr (kBits == 4) code_ = table16(w.code);
  }

  std::int64_t rows() const { return w_.N; }
  std::int64_t cols() const { return w_.K; }

  // Calls sink(c, chunk) for every c of `chunks`. chunk[i] is chunk c of row n + i, and zero from row n + count on. The
  // codes kAhead bytes further on are prefetched.
  template <int kRows, int kAhead = 0, class Sink>
  void chunks(std::int64_t n, int count, Range chunks, Sink&& sink) const {
    float scales[kRows][kMaxScales];
    for (std::int64_t begin = chunks.begin; begin < chunks.end; begin += kChunksAtOnce) {
      const std::int64_t end = smaller(begin + kChunksAtOnce, chunks.end);
      const std::int64_t elements = smaller(end * kChunk, w_.K) - begin * kChunk;
      const std::int64_t whole = aligned_ && count == kRows ? elements / kChunk : 0;
      if (whole > 0) whole_chunks<kRows, kAhead>(n, begin, whole, scales, sink);
      if (begin + whole == end) continue;
      std::int64_t first_block[kRows] = {};
      for (int i = 0; i < count; ++i) {
        const std::int64_t first = element(n + i, begin);
        first_block[i] = first >> shift_;
        scales_.decode(first_block[i], ((first + elements - 1) >> shift_) + 1 - first_block[i], scales[i]);
      }
      for (std::int64_t c = begin + whole; c < end; ++c) {
        typename Dot::Chunk chunk[kRows] = {};
        const std::int64_t count_left = elements - (c - begin) * kChunk;
        for (int i = 0; i < count; ++i)
          chunk[i] = decode_ragged(element(n + i, c), static_cast<int>(smaller<std::int64_t>(kChunk, count_left)),
                                   scales[i], first_block[i]);
        sink(c, chunk);
      }
    }
  }

  // --- Aligned rows can also be decoded a chunk at a time, in any order ---

  // Whether every chunk is whole, has kScales scales and begins in a high nibble.
  bool aligned() const { return aligned_ && w_.K % kChunk == 0; }
  // The scales of some chunks of some rows. `out` has the rows `stride` floats apart.
  void chunk_scales(Range rows, Range chunks, float* out, std::int64_t stride) const {
    const int shift = shift_ - __builtin_ctz(kScaleElements);  // scales that are handed out -> blocks
    const std::int64_t per_row = w_.K / kChunk * kScales;
    const std::int64_t first = (first_row_ + rows.begin) * per_row + chunks.begin * kScales;
    BlocksOfRows blocks{first, chunks.count() * kScales, rows.count(), per_row};
    if (blocks.count == per_row && stride == per_row)  // one long row
      blocks = {first, blocks.count * blocks.rows, 1, 0};
    if (shift == 0) return scales_.decode(blocks, out, stride);
    for (std::int64_t row = 0; row < blocks.rows; ++row, out += stride) {
      const std::int64_t first_scale = first + row * per_row, first_block = first_scale >> shift;
      scales_.decode(first_block, ((first_scale + blocks.count - 1) >> shift) + 1 - first_block, out);
      // From the last on: no scale is overwritten before it is read.
      for (std::int64_t i = blocks.count; i-- > 0;) out[i] = out[((first_scale + i) >> shift) - first_block];
    }
  }
  // Prefetches such scales, as far as the weight has the rows.
  void prefetch_scales(Range rows, Range chunks) const {
    const std::int64_t first = element(rows.begin, chunks.begin) >> shift_;
    const std::int64_t last = (element(rows.begin, chunks.end) - 1) >> shift_;
    scales_.prefetch({first, last - first + 1, smaller(rows.end, w_.N) - rows.begin, w_.K >> shift_});
  }
  static constexpr std::int64_t kChunkBytes = kChunk * kBits / 8;
  using QuantizedStep = std::conditional_t<kBits == 4, typename Dot::template Step4<kScales>, typename Dot::Step8>;
  static constexpr std::int64_t kStepBytes = Dot::kStepChunks * kChunkBytes;
  // Decodes Dot::kStepChunks chunks from `codes` on, with their scales.
  [[gnu::always_inline]] QuantizedStep step(const std::uint8_t* codes, const float* scales) const {
    if constexpr (kBits == 4)
      return Dot::template step4<kScales>(codes, code_, scales);
    else
      return Dot::step8(codes, scales);
  }
  // Decodes the first half of a step of two chunks, which is what an odd number of chunks leaves.
  QuantizedStep half_step(const std::uint8_t* codes, const float* scales) const {
    std::uint8_t copy[kStepBytes] = {};
    __builtin_memcpy(copy, codes, kStepBytes / 2);
    float copy_of_scales[2 * kScales] = {};
    __builtin_memcpy(copy_of_scales, scales, sizeof(copy_of_scales) / 2);
    return step(copy, copy_of_scales);
  }
  [[gnu::always_inline]] typename Dot::Chunk chunk(const std::uint8_t* codes, const float* scales) const {
    if constexpr (kScales > 1)
      return Dot::template decode4_blocks<kScales>(codes, code_, scales);
    else
      return decode<false>(codes, scales[0]);
  }
  // The codes of row n from chunk c on.
  const std::uint8_t* codes_at(std::int64_t n, std::int64_t c) const { return codes_of(element(n, c)); }
  std::int64_t row_bytes() const { return w_.K * kBits / 8; }

 private:
  static_assert(kScales == 1 || (kBits == 4 && (kScales == 2 || kScales == 4)));
  static constexpr int kScaleElements = kChunk / kScales;  // elements that have one scale
  static constexpr std::int64_t kChunksAtOnce = 64;        // chunks whose scales are decoded at once
  static constexpr std::int64_t kMaxScales = kChunksAtOnce * kChunk / 16 + 2;  // of the smallest blocks

  // Decodes `count` chunks of aligned rows, in a loop where nothing varies but pointers.
  template <int kRows, int kAhead, class Sink>
  void whole_chunks(std::int64_t n, std::int64_t begin, std::int64_t count, float (&scales)[kRows][kMaxScales],
                    Sink&& sink) const {
    const std::uint8_t* codes[kRows];
    for (int i = 0; i < kRows; ++i) codes[i] = codes_at(n + i, begin);
    chunk_scales({n, n + kRows}, {begin, begin + count}, scales[0], kMaxScales);
#pragma GCC unroll 2
    for (std::int64_t j = 0; j < count; ++j) {
      typename Dot::Chunk chunks[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const std::uint8_t* p = codes[i] + j * kChunkBytes;
        if (kAhead != 0) __builtin_prefetch(p + kAhead, 0, 2);
        chunks[i] = chunk(p, scales[i] + j * kScales);
      }
      sink(begin + j, chunks);
    }
  }

  // The first element of row n's chunk c.
  std::int64_t element(std::int64_t n, std::int64_t c) const { return (first_row_ + n) * w_.K + c * kChunk; }
  const std::uint8_t* codes_of(std::int64_t element) const { return w_.codes + (element * kBits >> 3); }

  template <bool kOdd>
  [[gnu::always_inline]] typename Dot::Chunk decode(const std::uint8_t* codes, float scale) const {
    if constexpr (kBits == 4)
      return Dot::template decode4<kOdd>(codes, Dot::table(code_, scale));
    else
      return Dot::decode8(codes, scale / 127.0f);
  }

  // Decodes a chunk that may begin in a low nibble, cross blocks, and end after `count` < 64 elements.
  [[gnu::noinline]] typename Dot::Chunk decode_ragged(std::int64_t element, int count, const float* scales,
                                                      std::int64_t first_block) const {
    const std::uint8_t* codes = codes_of(element);
    const bool odd = kBits == 4 && element % 2 != 0;
    std::uint8_t copy[kChunk + 16];
    if (count < kChunk) {
      const std::int64_t bytes = kBits == 8 ? count : (count + (odd ? 2 : 1)) / 2;
      __builtin_memset(copy, 0, sizeof(copy));
      __builtin_memcpy(copy, codes, static_cast<std::size_t>(bytes));
      codes = copy;
    }
    std::int64_t block = element >> shift_;
    const auto part = [&](float scale) { return odd ? decode<true>(codes, scale) : decode<false>(codes, scale); };
    typename Dot::Chunk chunk = part(scales[block - first_block]);
    for (std::int64_t boundary = ((block + 1) << shift_) - element; boundary < count; boundary += w_.blocksize)
      chunk = Dot::blend(chunk, part(scales[++block - first_block]), static_cast<int>(boundary));
    if (count < kChunk) chunk = Dot::blend(chunk, typename Dot::Chunk{}, count);
    return chunk;
  }

  QuantizedWeightView w_;
  std::int64_t first_row_;
  int shift_;
  bool aligned_;  // whether a chunk has kScales scales and begins in a high nibble
  Scales scales_;
  Table16 code_{};
};

// Calls f with the rows of `which` of the weights, as the products of a Dot take them.
template <class Dot, class F>
inline auto with_rows(const QuantizedWeightView& weight, std::int64_t which, F&& f) {
  if (weight.bits == 8) return f(QuantizedRows<Dot, 8>(weight, which));
  if (weight.blocksize >= kChunk) return f(QuantizedRows<Dot, 4>(weight, which));
  if (weight.blocksize == kChunk / 2) return f(QuantizedRows<Dot, 4, 2>(weight, which));
  return f(QuantizedRows<Dot, 4, 4>(weight, which));
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
