// Decodes rows to memory, as elements of a dtype in their order.
#pragma once

#include "cpu/quantize/quantized_rows-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

template <DType kType, bool kStream>
[[gnu::always_inline]] inline void store_whole_chunk(const typename DotF32<kType>::Chunk& chunk, char* out) {
  using Dot = DotF32<kType>;
  for (int g = 0; g < Dot::kVectors / 2; ++g)
    store_pairs<kType, kStream>(out + g * Dot::kGroup * static_cast<std::int64_t>(size_of(kType)), chunk.v[2 * g],
                                chunk.v[2 * g + 1]);
}
// Stores `count` elements of a chunk side by side. With kStream by non-temporal stores if the chunk is whole.
template <DType kType, bool kStream = false>
[[gnu::always_inline]] inline void store_chunk(const typename DotF32<kType>::Chunk& chunk, char* out,
                                               std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  if (count == kChunk) return store_whole_chunk<kType, kStream>(chunk, out);
  char copy[kChunk * kSize];
  store_whole_chunk<kType, false>(chunk, copy);
  __builtin_memcpy(out, copy, static_cast<std::size_t>(count * kSize));
}

// Rows of a weight, quantized or dense, and the function that decodes some chunks of row n to `out`, by non-temporal
// stores with `stream`. It is a pointer so that what calls it is compiled once for all kinds of rows.
struct ElementRows {
  const void* rows;
  void (*decode_chunks)(const void* rows, std::int64_t n, Range chunks, char* out, bool stream);

  void decode(std::int64_t n, Range chunks, char* out, bool stream = false) const {
    decode_chunks(rows, n, chunks, out, stream);
  }
};

template <DType kType, class Rows>
inline ElementRows elements_of(const Rows& w) {
  return {&w, [](const void* pointer, std::int64_t n, Range chunks, char* out, bool stream) {
            const Rows& rows = *static_cast<const Rows*>(pointer);
            // Codes so far ahead are prefetched, unless parts of the rows are left out.
            const std::int64_t ahead = rows.rows() == 1 || chunks.count() * kChunk >= rows.cols() ? 4096 : 0;
            rows.template chunks<1>(
                n, 1, chunks,
                [&](std::int64_t c, const typename DotF32<kType>::Chunk(&chunk)[1]) {
                  char* const to = out + (c - chunks.begin) * kChunk * static_cast<std::int64_t>(size_of(kType));
                  const std::int64_t count = smaller<std::int64_t>(kChunk, rows.cols() - c * kChunk);
                  stream ? store_chunk<kType, true>(chunk[0], to, count) : store_chunk<kType>(chunk[0], to, count);
                },
                ahead);
            if (stream) end_stream();
          }};
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
