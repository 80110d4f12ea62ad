// A chunk of a quantized weight on its way into a product: 32 neighbours of a row, as 16 bytes of codes and their scale
// in shared memory.
//
// Where K is a multiple of 32 a chunk begins at a multiple of 32 elements, so it is a 16-byte vector in global memory
// and lies in one block of the weight ("aligned"). Elsewhere its codes are gathered one by one, and a block may end in
// the middle of it; not twice, because a block has 32 elements at least.
#pragma once

#include "common/layout.h"
#include "gemm_config.h"
#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

template <bool kAligned>
struct ChunkScale {
  float value;
  __device__ __forceinline__ float at(int) const { return value; }
  __device__ __forceinline__ ChunkScale divided_by(float divisor) const { return {value / divisor}; }
};
template <>
struct ChunkScale<false> {
  float first, rest;
  int end;  // of the first block's elements
  __device__ __forceinline__ float at(int i) const { return i < end ? first : rest; }
  __device__ __forceinline__ ChunkScale divided_by(float divisor) const {
    return {first / divisor, rest / divisor, end};
  }
};

// Scales by their block, in two halves: what memory has to give, and what is made of it. Between the two the multiply
// of another step hides the wait.
template <bool kAligned>
class ScaleReader {
 public:
  struct Raw {
    float scale;  // or, double-quantized, what multiplies the level
    std::uint32_t level;
  };
  // What all scales of a double-quantized weight need: copied to shared memory once.
  struct Nested {
    float code[256];
    float offset;
    __device__ void fill(const QuantizedWeightView& w) {
      if (w.nested_absmax == nullptr) return;
      for (int i = thread_index(); i < 256; i += block_threads()) code[i] = w.nested_code[i];
      if (thread_index() == 0) offset = *w.offset;
    }
  };
  __device__ ScaleReader(const QuantizedWeightView& w, int block_shift, int nested_shift, const Nested& nested)
      : w_(w), block_shift_(block_shift), nested_shift_(nested_shift), nested_(nested) {}
  __device__ __forceinline__ std::int64_t block_of(std::int64_t element) const { return element >> block_shift_; }
  __device__ __forceinline__ Raw fetch(std::int64_t block) const {
    if (w_.nested_absmax == nullptr) return {static_cast<const float*>(w_.absmax)[block], 0};
    const std::int64_t nested = kAligned ? block >> nested_shift_ : block / w_.nested_blocksize;
    return {w_.nested_absmax[nested], static_cast<const std::uint8_t*>(w_.absmax)[block]};
  }
  __device__ __forceinline__ float finish(const Raw& raw) const {
    return w_.nested_absmax == nullptr ? raw.scale : nested_scale(nested_.code[raw.level], raw.scale, nested_.offset);
  }

 private:
  const QuantizedWeightView& w_;
  int block_shift_, nested_shift_;
  const Nested& nested_;
};

// The scale of a chunk that begins at an element of the weight, on its way. `count`: how many of its elements the
// product has, 32 or more, or less than 1: 32 are taken for all, 0 for none. What it has not has the scale 0, where it
// has none.
template <bool kAligned>
class PendingScale;

template <>
class PendingScale<true> {
 public:
  __device__ __forceinline__ void fetch(const QuantizedWeightView&, const ScaleReader<true>& scales,
                                        std::int64_t element, int count) {
    there_ = count > 0;
    if (there_) raw_ = scales.fetch(scales.block_of(element));
  }
  __device__ __forceinline__ ChunkScale<true> finish(const ScaleReader<true>& scales) const {
    return {there_ ? scales.finish(raw_) : 0.0f};
  }

 private:
  ScaleReader<true>::Raw raw_{};
  bool there_ = false;
};

template <>
class PendingScale<false> {
 public:
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const ScaleReader<false>& scales,
                                        std::int64_t element, int count) {
    scale_ = {0.0f, 0.0f, 0};
    if (count <= 0) return;
    const std::int64_t block = scales.block_of(element), next = (block + 1) * w.blocksize;
    scale_.first = scales.finish(scales.fetch(block));
    scale_.end = next - element < kGemmChunk ? static_cast<int>(next - element) : kGemmChunk;
    if (scale_.end < (count < kGemmChunk ? count : kGemmChunk)) scale_.rest = scales.finish(scales.fetch(block + 1));
  }
  __device__ __forceinline__ ChunkScale<false> finish(const ScaleReader<false>&) const { return scale_; }

 private:
  ChunkScale<false> scale_{};
};

// The codes of a chunk, one by one, as vectors would have loaded them; those that are not there are 0.
constexpr int kCodeWords = 4;
template <int kBits>
__device__ __forceinline__ void gather_codes(const std::uint8_t* codes, std::int64_t element, int count,
                                             Vector<std::uint32_t, kCodeWords> (&to)[kBits / 4]) {
  constexpr int kOfWord = 32 / kBits;
#pragma unroll
  for (int word = 0; word < kGemmChunk / kOfWord; ++word) {
    std::uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < kOfWord && kOfWord * word + i < count; ++i) {
      const std::int64_t at = element + kOfWord * word + i;
      if constexpr (kBits == 4) {
        const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);  // the even one is in the high nibble
        bits |= std::uint32_t{nibble_of_element(codes, at)} << shift;
      } else {
        bits |= std::uint32_t{codes[at]} << (8 * i);
      }
    }
    to[word / kCodeWords].at[word % kCodeWords] = bits;
  }
}

// A chunk of a 4-bit weight on its way to shared memory; `count` as above.
template <bool kAligned>
class WeightChunk {
 public:
  // Begins to copy the codes to `codes`, and to read the scale.
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const ScaleReader<kAligned>& scales,
                                        std::int64_t element, int count, std::uint8_t* codes) {
    if constexpr (kAligned) {
      cp_async<kGemmChunk / 2>(codes, w.codes + (element >> 1), count > 0 ? kGemmChunk / 2 : 0);
    } else {
      Vector<std::uint32_t, kCodeWords> words[1];
      gather_codes<4>(w.codes, element, count, words);
      store_vector<std::uint32_t, kCodeWords>(reinterpret_cast<std::uint32_t*>(codes), words[0]);
    }
    scale_.fetch(w, scales, element, count);
  }
  __device__ __forceinline__ ChunkScale<kAligned> scale(const ScaleReader<kAligned>& scales) const {
    return scale_.finish(scales);
  }

 private:
  PendingScale<kAligned> scale_;
};

// The two values of a byte of codes. A table of all 256 bytes in shared memory answers with one load; lanes take turns
// among its copies, so that fewer of them ask one bank at once: of 16, none.
template <unsigned kCopies>
class PairTable {
 public:
  using Pair = Vector<float, 2>;
  static constexpr unsigned kPairs = 256 * kCopies;

  __device__ static void fill(Pair* pairs, const float* code) {
    for (int i = thread_index(); i < static_cast<int>(kPairs); i += block_threads()) {
      const unsigned byte = static_cast<unsigned>(i) / kCopies;
      pairs[i] = {{code[byte >> 4], code[byte & 15]}};
    }
  }
  __device__ explicit PairTable(const Pair* pairs) : copy_(pairs + static_cast<unsigned>(thread_index()) % kCopies) {}
  __device__ __forceinline__ Pair operator[](std::uint32_t byte) const {
    return load_pair(copy_, byte * (kCopies * static_cast<unsigned>(sizeof(Pair))));
  }

 private:
  SharedPlace copy_;
};

}  // namespace qlora_native::QLN_CUDA
