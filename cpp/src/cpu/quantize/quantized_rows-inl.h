// The rows of an inner product come from a quantized weight or from a dense matrix. Both hand out chunks of 64 elements
// in the order of the Dot (dot_f32-inl.h), with zeros past the end of a row.
#pragma once

#include <type_traits>
#include <utility>

#include "common/layout.h"
#include "cpu/isa/dot_f32-inl.h"
#include "cpu/product/dropout-inl.h"
#include "cpu/quantize/scales-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

// The numbers begin ... end-1.
struct Range {
  std::int64_t begin = 0, end = 0;
  std::int64_t count() const { return end - begin; }
};

// Calls f with the element type as a compile-time constant.
template <class F>
inline auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(std::integral_constant<DType, DType::bf16>{});
    case DType::f16:
      return f(std::integral_constant<DType, DType::f16>{});
    default:
      return f(std::integral_constant<DType, DType::f32>{});
  }
}

// Calls f with n, which is 1 ... kMost, as a compile-time constant.
template <int kMost, class F>
inline void with_constant(int n, F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((n == i + 1 ? f(std::integral_constant<int, i + 1>()) : void()), ...);
  }(std::make_integer_sequence<int, kMost>());
}

template <DType kType, bool kStream>
[[gnu::always_inline]] inline void store_whole_chunk(const typename DotF32<kType>::Chunk& chunk, char* out) {
  using Dot = DotF32<kType>;
  for (int g = 0; g < Dot::kVectors / 2; ++g)
    store_pairs<kType, kStream>(out + g * Dot::kGroup * static_cast<std::int64_t>(size_of(kType)), chunk.v[2 * g],
                                chunk.v[2 * g + 1]);
}
// Stores `count` elements of a chunk side by side. With kStream a whole chunk goes past the caches.
template <DType kType, bool kStream = false>
[[gnu::always_inline]] inline void store_chunk(const typename DotF32<kType>::Chunk& chunk, char* out,
                                               std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  if (count == kChunk) return store_whole_chunk<kType, kStream>(chunk, out);
  char copy[kChunk * kSize];
  store_whole_chunk<kType, false>(chunk, copy);
  __builtin_memcpy(out, copy, static_cast<std::size_t>(count * kSize));
}

// Elements that a product with few rows of x decodes at once.
template <class Dot>
constexpr std::int64_t kStepElements = Dot::kStepChunks * kChunk;

// Calls sink(s, steps) for all steps of rows n ... n+count-1 of any `rows`, put together from chunks.
template <class Dot, int kRows, class Rows, class Sink>
inline void steps_of_chunks(const Rows& rows, std::int64_t n, int count, Sink&& sink) {
  const std::int64_t chunks = ceil_div(rows.cols(), kChunk);
  typename Dot::Chunk held[kRows][Dot::kStepChunks] = {};
  rows.template chunks<kRows>(n, count, {0, chunks}, [&](std::int64_t c, const typename Dot::Chunk(&chunk)[kRows]) {
    const std::int64_t place = c % Dot::kStepChunks;
    for (int i = 0; i < kRows; ++i) held[i][place] = chunk[i];
    if (place != Dot::kStepChunks - 1 && c != chunks - 1) return;
    typename Dot::Step step[kRows];
    for (int i = 0; i < kRows; ++i) {
      for (std::int64_t after = place + 1; after < Dot::kStepChunks; ++after) held[i][after] = {};
      step[i] = Dot::join(held[i]);
    }
    sink(c / Dot::kStepChunks, step);
  });
}

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
    float scales[kRows][kMostScales];
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
        const std::int64_t left = elements - (c - begin) * kChunk;
        for (int i = 0; i < count; ++i)
          chunk[i] = decode_ragged(element(n + i, c), static_cast<int>(smaller<std::int64_t>(kChunk, left)), scales[i],
                                   first_block[i]);
        sink(c, chunk);
      }
    }
  }

  template <int kRows, class Sink>
  void steps(std::int64_t n, int count, Sink&& sink) const {
    steps_of_chunks<Dot, kRows>(*this, n, count, sink);
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
      const std::int64_t of_row = first + row * per_row, first_block = of_row >> shift;
      scales_.decode(first_block, ((of_row + blocks.count - 1) >> shift) + 1 - first_block, out);
      // From the last on: no scale is overwritten before it is read.
      for (std::int64_t i = blocks.count; i-- > 0;) out[i] = out[((of_row + i) >> shift) - first_block];
    }
  }
  // Prefetches such scales, as far as the weight has the rows.
  void prefetch_scales(Range rows, Range chunks) const {
    const std::int64_t first = element(rows.begin, chunks.begin) >> shift_;
    const std::int64_t last = (element(rows.begin, chunks.end) - 1) >> shift_;
    scales_.prefetch({first, last - first + 1, smaller(rows.end, w_.N) - rows.begin, w_.K >> shift_});
  }
  using QuantizedStep = std::conditional_t<kBits == 4, typename Dot::template Step4<kScales>, typename Dot::Step8>;
  static constexpr std::int64_t kStepBytes = kStepElements<Dot> * kBits / 8;
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
  static constexpr std::int64_t kChunkBytes = kChunk * kBits / 8;
  // The codes of row n from chunk c on.
  const std::uint8_t* codes_at(std::int64_t n, std::int64_t c) const { return codes_of(element(n, c)); }
  std::int64_t row_bytes() const { return w_.K * kBits / 8; }

 private:
  static_assert(kScales == 1 || (kBits == 4 && (kScales == 2 || kScales == 4)));
  static constexpr int kScaleElements = kChunk / kScales;  // elements that have one scale
  static constexpr std::int64_t kChunksAtOnce = 64;        // chunks whose scales are decoded at once
  static constexpr std::int64_t kMostScales = kChunksAtOnce * kChunk / 16 + 2;  // of the smallest blocks

  // Decodes `count` chunks of aligned rows, in a loop where nothing varies but pointers.
  template <int kRows, int kAhead, class Sink>
  void whole_chunks(std::int64_t n, std::int64_t begin, std::int64_t count, float (&scales)[kRows][kMostScales],
                    Sink&& sink) const {
    const std::uint8_t* codes[kRows];
    for (int i = 0; i < kRows; ++i) codes[i] = codes_at(n + i, begin);
    chunk_scales({n, n + kRows}, {begin, begin + count}, scales[0], kMostScales);
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

// A dense matrix, times `scale`. With kNaturalOrder its chunks are in natural order, and it has no dropout.
template <class Dot, bool kNaturalOrder>
class DenseRows {
 public:
  static constexpr bool kQuantized = false;
  static constexpr std::int64_t kChunkScales = 0;
  static constexpr bool kNatural = kNaturalOrder;
  DenseRows(ConstMatrix matrix, float scale = 1.0f, Dropout dropout = {}, std::int64_t first_row = 0)
      : matrix_(matrix), scale_(scale), dropout_(dropout), first_row_(first_row) {}

  std::int64_t rows() const { return matrix_.rows; }
  std::int64_t cols() const { return matrix_.cols; }

  template <int kRows, int kAhead = 0, class Sink>
  void chunks(std::int64_t n, int count, Range chunks, Sink&& sink) const {
    with_dtype(matrix_.dtype, [&](auto dtype) {
      for (std::int64_t c = chunks.begin; c < chunks.end; ++c) {
        typename Dot::Chunk chunk[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) chunk[i] = i < count ? one<dtype()>(n + i, c) : typename Dot::Chunk{};
        sink(c, chunk);
      }
    });
  }

  template <int kRows, class Sink>
  void steps(std::int64_t n, int count, Sink&& sink) const {
    steps_of_chunks<Dot, kRows>(*this, n, count, sink);
  }

  bool aligned() const { return false; }

 private:
  template <DType kFrom>
  typename Dot::Chunk one(std::int64_t n, std::int64_t c) const {
    constexpr auto kSize = static_cast<std::int64_t>(size_of(kFrom));
    const char* p = static_cast<const char*>(matrix_.data) + (n * matrix_.stride + c * kChunk) * kSize;
    const std::int64_t count = smaller<std::int64_t>(kChunk, matrix_.cols - c * kChunk);
    if constexpr (kNatural) {
      return Dot::template dense_natural<kFrom>(p, scale_, static_cast<int>(count));
    } else {
      char copy[kChunk * kSize];
      if (count < kChunk) {
        __builtin_memset(copy, 0, sizeof(copy));
        __builtin_memcpy(copy, p, static_cast<std::size_t>(count * kSize));
        p = copy;
      }
      typename Dot::Chunk chunk = Dot::template dense<kFrom>(p, scale_);
      if (dropout_) Dot::keep(chunk, dropout_.keep_bits(first_row_ + n, c));
      return chunk;
    }
  }

  ConstMatrix matrix_;
  float scale_;
  Dropout dropout_;
  std::int64_t first_row_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
