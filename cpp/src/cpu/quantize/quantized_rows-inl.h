// The rows of a quantized weight, decoded in chunks of 64 elements in the order of the Dot (dot_f32-inl.h), with zeros
// past the end of a row.
#pragma once

#include <type_traits>

#include "common/layout.h"
#include "cpu/isa/dot_f32-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/quantize/chunk_scales-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// A chunk has kScales scales, one for each block of 64 / kScales elements. Larger blocks have theirs several times.
template <class Dot, CodeKind kCodes, int kScales, bool kMinimum>
class QuantizedRows {
  static constexpr int kBits = bits_of(kCodes);

 public:
  using Scales = BlockScales<kMinimum>;
  static constexpr bool kQuantized = true;
  static constexpr bool kNatural = false;
  static constexpr std::int64_t kChunkScales = kScales;
  // Products have fewer kernels for a rare format: not each number of rows of x has its own, and no panel is decoded
  // while another one is multiplied. Each class is compiled for each product.
  static constexpr bool kRare = kScales == 4 && kMinimum;
  // `which` of w.count weights.
  explicit QuantizedRows(const QuantizedWeightView& w, std::int64_t which = 0)
      : w_(w),
        first_row_(which * w.N),
        shift_(__builtin_ctz(static_cast<unsigned>(w.blocksize))),
        aligned_(w.blocksize >= kScaleElements && (w.K % kChunk == 0 || w.N * w.count == 1)),
        scales_(w, first_row_, kScales) {
    if constexpr (kBits == 4) code_ = table16(w.code);
  }

  std::int64_t rows() const { return w_.N; }
  std::int64_t cols() const { return w_.K; }

  // Calls sink(c, chunk) for every c of `chunks`. chunk[i] is chunk c of row n + i, and zero from row n + count on. The
  // codes `ahead` bytes further on are prefetched.
  template <int kRows, class Sink>
  void chunks(std::int64_t n, int count, Range chunks, Sink&& sink, std::int64_t ahead = 0) const {
    float scales[kRows][kMaxScales], minima[kMinimum ? kRows : 1][kMaxScales];
    const auto minima_of = [&](int row) { return kMinimum ? minima[row] : nullptr; };
    for (std::int64_t begin = chunks.begin; begin < chunks.end; begin += kChunksAtOnce) {
      const std::int64_t end = smaller(begin + kChunksAtOnce, chunks.end);
      const std::int64_t elements = smaller(end * kChunk, w_.K) - begin * kChunk;
      const std::int64_t whole = aligned_ && count == kRows ? elements / kChunk : 0;
      if (whole > 0) whole_chunks<kRows>(n, begin, whole, scales, minima_of(0), ahead, sink);
      if (begin + whole == end) continue;
      std::int64_t first_block[kRows] = {};
      for (int i = 0; i < count; ++i) {
        const std::int64_t first = element(n + i, begin);
        first_block[i] = first >> shift_;
        const std::int64_t blocks = ((first + elements - 1) >> shift_) + 1 - first_block[i];
        scales_.decode_blocks(first_block[i], blocks, scales[i], minima_of(i));
      }
      for (std::int64_t c = begin + whole; c < end; ++c) {
        typename Dot::Chunk chunk[kRows] = {};
        const std::int64_t count_left = elements - (c - begin) * kChunk;
        for (int i = 0; i < count; ++i)
          chunk[i] = decode_ragged(element(n + i, c), static_cast<int>(smaller<std::int64_t>(kChunk, count_left)),
                                   {scales[i], minima_of(i)}, first_block[i]);
        sink(c, chunk);
      }
    }
  }

  // --- Aligned rows can also be decoded a chunk at a time, in any order ---

  // Whether every chunk is whole, has kScales scales and begins in a high nibble.
  bool aligned() const { return aligned_ && w_.K % kChunk == 0; }
  // Its functions count rows as this class does.
  const ChunkScales& chunk_scales() const { return scales_; }
  static constexpr std::int64_t kChunkBytes = kChunk * kBits / 8;
  using QuantizedStep = std::conditional_t<kBits == 4, typename Dot::template Step4<kScales, Scales>,
                                           typename Dot::template Step8<kCodes, kScales, Scales>>;
  static constexpr std::int64_t kStepBytes = Dot::kStepChunks * kChunkBytes;
  // Decodes Dot::kStepChunks chunks from `codes` on, with their scales.
  [[gnu::always_inline]] QuantizedStep step(const std::uint8_t* codes, const Scales& scales) const {
    if constexpr (kBits == 4)
      return Dot::template step4<kScales>(codes, code_, scales);
    else
      return Dot::template step8<kCodes, kScales>(codes, scales);
  }
  // Decodes the first half of a step of two chunks, which is what an odd number of chunks leaves. The other half is
  // zero, or nobody reads it, and the scales after those of the first half are anything.
  [[gnu::always_inline]] QuantizedStep half_step(const std::uint8_t* codes, const Scales& scales) const {
    if constexpr (Dot::kHalfStepVectors < Dot::kStepVectors) return step(codes, scales);
    std::uint8_t copy[kStepBytes] = {};
    __builtin_memcpy(copy, codes, kStepBytes / 2);
    float copy_of_scales[2 * kScales] = {}, copy_of_minima[2 * kScales] = {};
    __builtin_memcpy(copy_of_scales, scales.scale, sizeof(copy_of_scales) / 2);
    if constexpr (kMinimum) __builtin_memcpy(copy_of_minima, scales.minimum, sizeof(copy_of_minima) / 2);
    return step(copy, {copy_of_scales, copy_of_minima});
  }
  // Decodes chunks, without what else the rows are: a loop keeps it in registers.
  struct ChunkDecoder {
    Table16 code;

    [[gnu::always_inline]] typename Dot::Chunk one(const std::uint8_t* codes, const Scales& scales) const {
      if constexpr (kBits == 8)
        return Dot::template decode8<kCodes, kScales>(codes, scales);
      else if constexpr (kScales > 1)
        return Dot::template decode4_blocks<kScales>(codes, code, scales);
      else
        return Dot::template decode4<false>(codes, Dot::table(code, scales));
    }
    // Two chunks of any rows, of a Dot that decodes two at once.
    [[gnu::always_inline]] void two(const std::uint8_t* const (&codes)[2], const Scales (&scales)[2],
                                    typename Dot::Chunk (&chunk)[2]) const {
      if constexpr (kBits == 4 && kScales == 1)
        Dot::decode4_two(codes, code, scales, chunk);
      else
        for (int i = 0; i < 2; ++i) chunk[i] = one(codes[i], scales[i]);
    }
  };
  ChunkDecoder chunk_decoder() const { return {code_}; }
  // The codes of row n from chunk c on.
  const std::uint8_t* codes_at(std::int64_t n, std::int64_t c) const { return codes_of(element(n, c)); }
  std::int64_t row_bytes() const { return w_.K * kBits / 8; }

 private:
  static_assert(kScales == 1 || kScales == 2 || kScales == 4);
  static constexpr int kScaleElements = kChunk / kScales;  // elements that have one scale
  static constexpr std::int64_t kChunksAtOnce = 64;        // chunks whose scales are decoded at once
  static constexpr std::int64_t kMaxScales = kChunksAtOnce * kChunk / 16 + 2;  // of the smallest blocks

  // Decodes `count` chunks of aligned rows, in a loop where nothing varies but pointers.
  template <int kRows, class Sink>
  [[gnu::always_inline]] void whole_chunks(std::int64_t n, std::int64_t begin, std::int64_t count,
                                           float (&scales)[kRows][kMaxScales], float* minima, std::int64_t ahead,
                                           Sink&& sink) const {
    const ChunkDecoder decoder = chunk_decoder();
    const std::uint8_t* codes[kRows];
    for (int i = 0; i < kRows; ++i) codes[i] = codes_at(n + i, begin);
    scales_.decode({n, n + kRows}, {begin, begin + count}, scales[0], minima, kMaxScales);
#pragma GCC unroll 2
    for (std::int64_t j = 0; j < count; ++j) {
      typename Dot::Chunk chunks[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const std::uint8_t* p = codes[i] + j * kChunkBytes;
        if (ahead != 0) __builtin_prefetch(p + ahead, 0, 2);
        chunks[i] = decoder.one(p, Scales{scales[i], kMinimum ? minima + i * kMaxScales : nullptr} + j * kScales);
      }
      sink(begin + j, chunks);
    }
  }

  // The first element of row n's chunk c.
  std::int64_t element(std::int64_t n, std::int64_t c) const { return (first_row_ + n) * w_.K + c * kChunk; }
  const std::uint8_t* codes_of(std::int64_t element) const { return w_.codes + (element * kBits >> 3); }

  // Decodes a chunk of one block.
  template <bool kOdd>
  [[gnu::always_inline]] typename Dot::Chunk decode(const std::uint8_t* codes, const Scales& scales) const {
    if constexpr (kBits == 4)
      return Dot::template decode4<kOdd>(codes, Dot::table(code_, scales));
    else
      return Dot::template decode8<kCodes, 1>(codes, scales);
  }

  // Decodes a chunk that may begin in a low nibble, cross blocks, and end after `count` < 64 elements.
  [[gnu::noinline]] typename Dot::Chunk decode_ragged(std::int64_t element, int count, const Scales& scales,
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
    const auto part = [&](const Scales& of_block) {
      return odd ? decode<true>(codes, of_block) : decode<false>(codes, of_block);
    };
    typename Dot::Chunk chunk = part(scales + (block - first_block));
    for (std::int64_t boundary = ((block + 1) << shift_) - element; boundary < count; boundary += w_.blocksize)
      chunk = Dot::blend(chunk, part(scales + (++block - first_block)), static_cast<int>(boundary));
    if (count < kChunk) chunk = Dot::blend(chunk, typename Dot::Chunk{}, count);
    return chunk;
  }

  QuantizedWeightView w_;
  std::int64_t first_row_;
  int shift_;
  bool aligned_;  // whether a chunk has kScales scales and begins in a high nibble
  ChunkScales scales_;
  Table16 code_{};
};

// Calls f with the rows of `which` of the weights, as the products of a Dot take them. Bytes with minima, and E4M3,
// have no class for blocks of a whole chunk, and take that of halves.
template <class Dot, class F>
inline auto with_rows(const QuantizedWeightView& weight, std::int64_t which, F&& f) {
  const bool whole = weight.blocksize >= kChunk, halves = weight.blocksize >= kChunk / 2;
  const auto call = [&]<CodeKind kCodes, int kScales, bool kMinimum>() {
    return f(QuantizedRows<Dot, kCodes, kScales, kMinimum>(weight, which));
  };
  const auto by_blocks = [&]<CodeKind kCodes, bool kMinimum>() {
    if constexpr (kCodes == CodeKind::nibbles || !kMinimum)
      if (whole) return call.template operator()<kCodes, 1, kMinimum>();
    if (halves) return call.template operator()<kCodes, 2, kMinimum>();
    return call.template operator()<kCodes, 4, kMinimum>();
  };
  using enum CodeKind;
  if (weight.byte_format == ByteFormat::e4m3 && weight.bits == 8) return call.template operator()<e4m3, 2, false>();
  if (weight.bits == 8)
    return weight.has_minimum() ? by_blocks.template operator()<int8, true>()
                                : by_blocks.template operator()<int8, false>();
  return weight.has_minimum() ? by_blocks.template operator()<nibbles, true>()
                              : by_blocks.template operator()<nibbles, false>();
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
