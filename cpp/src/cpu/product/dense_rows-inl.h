// The rows of a dense matrix, in the chunks that a quantized weight's rows are decoded to (quantized_rows-inl.h).
#pragma once

#include "cpu/isa/dot_f32-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/product/dropout-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// A dense matrix, times `scale`. With kNaturalOrder its chunks are in natural order, and it has no dropout.
template <class Dot, bool kNaturalOrder>
class DenseRows {
 public:
  static constexpr bool kQuantized = false;
  static constexpr bool kRare = false;
  using Scales = BlockScales<false>;  // of which there are none
  static constexpr std::int64_t kChunkScales = 0;
  static constexpr bool kNatural = kNaturalOrder;
  DenseRows(ConstMatrix matrix, float scale = 1.0f, Dropout dropout = {}, std::int64_t first_row = 0)
      : matrix_(matrix), scale_(scale), dropout_(dropout), first_row_(first_row) {}

  std::int64_t rows() const { return matrix_.rows; }
  std::int64_t cols() const { return matrix_.cols; }

  template <int kRows, class Sink>
  void chunks(std::int64_t n, int count, Range chunks, Sink&& sink, std::int64_t = 0) const {
    with_dtype(matrix_.dtype, [&](auto dtype) {
      for (std::int64_t c = chunks.begin; c < chunks.end; ++c) {
        typename Dot::Chunk chunk[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) chunk[i] = i < count ? one<dtype()>(n + i, c) : typename Dot::Chunk{};
        sink(c, chunk);
      }
    });
  }

  // --- Rows of the Dot's dtype can also be read a chunk at a time, in any order, as the rows of a quantized weight ---

  // Whether every chunk is whole and is what stands in memory.
  bool aligned() const {
    return !kNatural && matrix_.dtype == Dot::kActivation && matrix_.cols % kChunk == 0 && scale_ == 1.0f && !dropout_;
  }
  static constexpr std::int64_t kChunkBytes = kChunk * static_cast<std::int64_t>(size_of(Dot::kActivation));
  struct ChunkDecoder {
    [[gnu::always_inline]] typename Dot::Chunk one(const std::uint8_t* elements, const Scales&) const {
      return Dot::template dense<Dot::kActivation>(elements, 1.0f);
    }
    [[gnu::always_inline]] void two(const std::uint8_t* const (&elements)[2], const Scales (&scales)[2],
                                    typename Dot::Chunk (&chunk)[2]) const {
      for (int i = 0; i < 2; ++i) chunk[i] = one(elements[i], scales[i]);
    }
  };
  ChunkDecoder chunk_decoder() const { return {}; }
  // The elements of row n from chunk c on.
  const std::uint8_t* codes_at(std::int64_t n, std::int64_t c) const {
    return static_cast<const std::uint8_t*>(matrix_.data) + n * row_bytes() + c * kChunkBytes;
  }
  std::int64_t row_bytes() const { return matrix_.stride * static_cast<std::int64_t>(size_of(matrix_.dtype)); }

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
      if (dropout_) Dot::mask(chunk, dropout_.keep_mask(first_row_ + n, c));
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
