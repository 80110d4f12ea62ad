// A chunk of a quantized weight, which a product loads: 32 contiguous elements of a row, as codes (16 bytes where they
// have 4 bits) and their scale.
//
// Where K is a multiple of 32 ("aligned"), a chunk begins at a multiple of 32 elements, so its codes are 16-byte
// vectors in global memory, and it lies in one block of the weight. Elsewhere its codes are gathered one by one, and a
// block may end in the middle of the chunk. Two blocks cannot end there, because a block has at least 32 elements:
// products with smaller blocks have another kernel (config.cpp).
#pragma once

#include "common/layout.h"
#include "device/elements.cuh"
#include "device/simt.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kChunk = 32;

// Where a kernel finds the scale of a position of a weight. The two pointers are for plain scales (below).
struct WeightScales {
  const float* absmax;         // absmax of each block; double-quantized: nested_absmax, of several blocks each
  const std::uint8_t* levels;  // the level of each block; not double-quantized: any bytes, as every level is 1
  bool nested;                 // double-quantized
  // Shifts, log2 of a number: of the elements of a block, of the chunks of a block, and of the blocks that share an
  // entry of `absmax`. `absmax_shift` is -1 where its number is no power of two.
  int block_shift, chunk_shift, absmax_shift;
};

inline bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }
inline int log2_of(int n) {
  int log2 = 0;
  while ((1 << log2) < n) ++log2;
  return log2;
}
inline WeightScales scales_of(const QuantizedWeightView& w) {
  const bool nested = w.nested_absmax != nullptr;
  const int block = log2_of(w.blocksize), chunk = block - log2_of(kChunk);
  if (!nested) return {static_cast<const float*>(w.absmax), w.codes, false, block, chunk, 0};
  return {w.nested_absmax,
          static_cast<const std::uint8_t*>(w.absmax),
          true,
          block,
          chunk,
          is_power_of_two(w.nested_blocksize) ? log2_of(w.nested_blocksize) : -1};
}
inline std::int64_t chunks_of(const QuantizedWeightView& w) { return w.elements() / kChunk; }
inline std::uint32_t last_chunk_of(const QuantizedWeightView& w) {
  return static_cast<std::uint32_t>(chunks_of(w) - 1);
}
// Whether scales are in fp32 or double-quantized, without a minimum, and codes of 8 bits count 127ths of their scale.
// So are all formats stored that `quantize` makes. Most kernels know these alone; BlockReader (weight_block.cuh) reads
// any.
inline bool has_plain_scales(const QuantizedWeightView& w) {
  return !w.has_minimum() && (w.nested_absmax != nullptr || w.scale_dtype == DType::f32) &&
         (w.bits == 4 || w.byte_format == ByteFormat::absmax_int8);
}
// Whether the weight consists of whole chunks that lie at multiples of 16 bytes, whose number fits 32 bits, and whose
// scales are found by shifts.
inline bool is_aligned(const QuantizedWeightView& w) {
  return w.K % kChunk == 0 && is_aligned(w.codes, kVectorBytes) && chunks_of(w) <= 0xFFFFFFFF &&
         (w.nested_absmax == nullptr || is_power_of_two(w.nested_blocksize));
}

template <bool kAligned>
struct ChunkScale {
  float scale;
  __device__ __forceinline__ float at(int) const { return scale; }
  __device__ __forceinline__ float value(float level, int) const { return level * scale; }
  __device__ __forceinline__ ChunkScale divided_by(float divisor) const { return {scale / divisor}; }
};
template <>
struct alignas(16) ChunkScale<false> {
  float first, rest;
  int end;  // where the first block's elements end in the chunk
  __device__ __forceinline__ float at(int i) const { return i < end ? first : rest; }
  // What a level stands for that element i of the chunk has.
  __device__ __forceinline__ float value(float level, int i) const { return level * at(i); }
  __device__ __forceinline__ ChunkScale divided_by(float divisor) const {
    return {first / divisor, rest / divisor, end};
  }
};

// A position in an aligned weight counts chunks, in 32 bits; in any other weight it counts elements.
template <bool kAligned>
using Position = std::conditional_t<kAligned, std::uint32_t, std::int64_t>;

// Reads the scale of a block in two halves: fetch() loads from memory, and finish() computes the scale. In between, the
// multiply of another step hides the wait. If the weight is not double-quantized, every level is 1 and the offset is
// -0, which changes no bit.
template <bool kAligned>
class ScaleReader {
 public:
  struct Raw {
    float scale = 0.0f;
    std::uint32_t level = 0;
  };
  // The values of the levels, in shared memory.
  struct Levels {
    float code[256];
    __device__ void fill(const QuantizedWeightView& w) { fill(w, block_threads()); }
    // The first `threads` threads of the block call this.
    __device__ void fill(const QuantizedWeightView& w, int threads) {
      for (int i = thread_index(); i < 256; i += threads) {
        code[i] = w.nested_absmax == nullptr ? 1.0f : w.nested_code[i];
      }
    }
  };
  __device__ static float offset_of(const QuantizedWeightView& w) {
    return w.nested_absmax == nullptr ? -0.0f : *w.offset;
  }
  struct Nested {
    Levels levels;
    float offset;
    __device__ void fill(const QuantizedWeightView& w) {
      if (thread_index() == 0) offset = offset_of(w);
      levels.fill(w);
    }
  };
  __device__ ScaleReader(const QuantizedWeightView& w, const WeightScales& from, const Nested& nested)
      : ScaleReader(w, from, nested.levels) {}
  // A reader that is given levels alone takes the offset as an argument of finish().
  __device__ ScaleReader(const QuantizedWeightView& w, const WeightScales& from, const Levels& levels)
      : w_(w), from_(from), code_(SharedAddress(levels.code).in_register()) {}
  __device__ __forceinline__ Position<kAligned> block_of(Position<kAligned> position) const {
    return position >> (kAligned ? from_.chunk_shift : from_.block_shift);
  }
  __device__ __forceinline__ void fetch(Raw& raw, Position<kAligned> block) const {
    raw.scale =
        from_.absmax[kAligned || from_.absmax_shift >= 0 ? block >> from_.absmax_shift : block / w_.nested_blocksize];
    raw.level = from_.levels[block];
  }
  __device__ __forceinline__ float finish(const Raw& raw, float offset) const {
    return nested_scale(load_shared<float>(code_.at(raw.level * sizeof(float))), raw.scale, offset);
  }
  __device__ __forceinline__ float finish(const Raw& raw) const {
    return finish(raw, load_shared<float>(code_.at(offsetof(Nested, offset))));
  }

 private:
  const QuantizedWeightView& w_;
  const WeightScales& from_;
  const SharedAddress code_;
};

// The scale of a chunk while it is being loaded.
template <bool kAligned>
class PendingScale;

template <>
class PendingScale<true> {
 public:
  __device__ __forceinline__ void fetch(const ScaleReader<true>& scales, std::uint32_t chunk) {
    scales.fetch(raw_, scales.block_of(chunk));
  }
  __device__ __forceinline__ ChunkScale<true> finish(const ScaleReader<true>& scales) const {
    return {scales.finish(raw_)};
  }

 private:
  ScaleReader<true>::Raw raw_;
};

template <>
class PendingScale<false> {
 public:
  // `count`: how many of the chunk's elements the product has; 32 or more means all. A block that has none of them is
  // not read, and its scale is 0.
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const ScaleReader<false>& scales,
                                        std::int64_t element, int count) {
    scale_ = {0.0f, 0.0f, 0};
    if (count <= 0) return;
    const std::int64_t block = scales.block_of(element), next = (block + 1) * w.blocksize;
    scale_.first = scale_of(scales, block);
    scale_.end = next - element < kChunk ? static_cast<int>(next - element) : kChunk;
    if (scale_.end < (count < kChunk ? count : kChunk)) scale_.rest = scale_of(scales, block + 1);
  }
  __device__ __forceinline__ ChunkScale<false> finish(const ScaleReader<false>&) const { return scale_; }

 private:
  __device__ __forceinline__ static float scale_of(const ScaleReader<false>& scales, std::int64_t block) {
    ScaleReader<false>::Raw raw;
    scales.fetch(raw, block);
    return scales.finish(raw);
  }
  ChunkScale<false> scale_{};
};

// Gathers the codes of a chunk one by one into the words that vector loads would have given; missing codes are 0.
constexpr int kCodeWords = 4;
template <int kBits>
__device__ __forceinline__ void gather_codes(const std::uint8_t* codes, std::int64_t element, int count,
                                             Vector<std::uint32_t, kCodeWords> (&to)[kBits / 4]) {
  constexpr int kWordCodes = 32 / kBits;
#pragma unroll
  for (int word = 0; word < kChunk / kWordCodes; ++word) {
    std::uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < kWordCodes && kWordCodes * word + i < count; ++i) {
      const std::int64_t at = element + kWordCodes * word + i;
      if constexpr (kBits == 4) {
        const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);  // the element with the even index is in the high nibble
        bits |= std::uint32_t{nibble_of_element(codes, at)} << shift;
      } else {
        bits |= std::uint32_t{codes[at]} << (8 * i);
      }
    }
    to[word / kCodeWords].at[word % kCodeWords] = bits;
  }
}

// The two values that a byte of codes stands for. A table of all 256 bytes in shared memory gives them with one load.
// It has kCopies copies, of which lane i reads copy i % kCopies, so that bank conflicts are fewer; with 16 copies there
// are none. The pairs of a byte begin kStride pairs behind those of the byte before. Where that distance is 256 bytes
// and the table begins at kRowsBegin (SharedAddress), one instruction makes an address from a byte.
template <int kCopies, int kStride = kCopies>
class PairTable {
 public:
  using Pair = Vector<float, 2>;
  static constexpr int kPairs = 256 * kStride;
  static constexpr bool kInRows = kStride * sizeof(Pair) == kRowBytes;

  __device__ static void fill(Pair* pairs, const float* code) { fill(pairs, code, block_threads()); }
  // The first `threads` threads of the block call this.
  __device__ static void fill(Pair* pairs, const float* code, int threads) {
    for (int i = thread_index(); i < 256 * kCopies; i += threads) {
      const int byte = i / kCopies;
      pairs[i + byte * (kStride - kCopies)] = {{code[byte >> 4], code[byte & 15]}};
    }
  }
  __device__ explicit PairTable(const Pair* pairs)
      : copy_(SharedAddress(pairs + thread_index() % kCopies).in_register()) {}
  // The pair of byte `i` of a word; byte 0 is the lowest.
  __device__ __forceinline__ Pair pair_of_byte(std::uint32_t word, std::uint32_t i) const {
    if constexpr (kInRows) return load_shared<Pair>(copy_.row_of_byte(word, i));
    return load_shared<Pair>(copy_.at(byte_of(word, i) * static_cast<std::uint32_t>(kStride * sizeof(Pair))));
  }

 private:
  SharedAddress copy_;
};

}  // namespace qlora_native::QLN_CUDA
