// How a product multiplies: fp32 multiply-add over any element type of x.
//
// A product sees the inner dimension in chunks of 64 elements, and a chunk as units of 32 bits: here a unit is one
// float. Decoding yields the even and the odd elements apart, and no sum cares for its order, so that this *is* the
// order inside a chunk: vector 2g holds the even ones, vector 2g+1 the odd ones, of elements 2L*g ... 2L*(g+1)-1
// (L lanes). Activations are put in the same order when they are packed.
#pragma once

#include <type_traits>

#include "cpu/generic/primitives-inl.h"
#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kChunk = 64;  // elements of the inner dimension that are decoded together

// Vector i of `count` elements of a dense row, times `scale`; zeros after them.
template <DType kFrom>
inline F32 dense_vector(const void* p, float scale, int i, int count) {
  const int first = i * kLanes, left = count - first;
  if (left <= 0) return zero();
  const char* elements = static_cast<const char*>(p) + first * static_cast<int>(size_of(kFrom));
  return mul(load_as_f32<kFrom>(elements, left < kLanes ? left : kLanes), set1(scale));
}

template <DType kType>
struct DotF32 {
  static constexpr DType kActivation = kType;  // of x; weights and adapters are rounded to it
  static constexpr int kElementsPerUnit = 1;
  static constexpr int kUnits = kChunk / kElementsPerUnit;  // of a chunk
  static constexpr int kVectors = kUnits / kLanes;
  static constexpr int kGroup = 2 * kLanes;  // elements that share an even and an odd vector
  // Sums start afresh after so many elements: a long chain of fp32 additions loses what the short ones of a dense
  // product keep.
  static constexpr std::int64_t kRestart = 64;
  static constexpr std::int64_t kBlock = 256;  // elements of the inner dimension that are decoded at once

  struct Chunk {
    F32 v[kVectors];
  };
  using Table = LevelTable;

  static F32 dot(F32 sum, F32 x, F32 w) { return fma(x, w, sum); }

  // One unit, in memory, for all lanes, as dot() takes it.
  static F32 broadcast(const float* unit) { return set1(*unit); }
  static F32 dot_broadcast(F32 sum, F32 x, const float* unit) { return dot(sum, x, set1(*unit)); }

  // One block's 16 levels as the product uses them.
  [[gnu::always_inline]] static Table table(const Table16& code, float scale) {
    return level_table<kType>(map_table(code, mul, set1(scale)));
  }

  // 64 weights from 32 bytes of codes. `kOdd`: the first weight sits in the low nibble of bytes[0] (33 bytes then).
  template <bool kOdd>
  [[gnu::always_inline]] static Chunk decode4(const std::uint8_t* bytes, Table table) {
    Chunk chunk;
    for (int g = 0; g < kVectors / 2; g += kNibbleVectors) {
      const std::uint8_t* p = bytes + g * kLanes;
      F32 even[kNibbleVectors], odd[kNibbleVectors];
      lookup_nibbles<kType>(table, kOdd ? low_nibbles(p) : high_nibbles(p), even);
      lookup_nibbles<kType>(table, kOdd ? high_nibbles(p + 1) : low_nibbles(p), odd);
      for (int i = 0; i < kNibbleVectors; ++i) {
        chunk.v[2 * (g + i)] = even[i];
        chunk.v[2 * (g + i) + 1] = odd[i];
      }
    }
    return chunk;
  }

  // 64 weights of kScales blocks, 2 or 4, which `scales` has in order.
  template <int kScales>
  [[gnu::always_inline]] static Chunk decode4_blocks(const std::uint8_t* bytes, const Table16& code,
                                                     const float* scales) {
    Chunk chunk;
    for (int g = 0; g < kVectors / 2; g += kNibbleVectors) {
      const std::uint8_t* p = bytes + g * kLanes;
      F32 even[kNibbleVectors], odd[kNibbleVectors];
      lookup_in_blocks<kScales>(code, scales, g, high_nibbles(p), even);
      lookup_in_blocks<kScales>(code, scales, g, low_nibbles(p), odd);
      for (int i = 0; i < kNibbleVectors; ++i) {
        chunk.v[2 * (g + i)] = even[i];
        chunk.v[2 * (g + i) + 1] = odd[i];
      }
    }
    return chunk;
  }

  // 64 weights from 64 signed bytes; `step` is what a byte of 1 stands for.
  static Chunk decode8(const std::uint8_t* bytes, float step) {
    Chunk chunk;
    for (int g = 0; g < kVectors / 2; ++g) {
      load_signed_byte_pairs(bytes + g * kGroup, chunk.v[2 * g], chunk.v[2 * g + 1]);
      for (int i = 2 * g; i < 2 * g + 2; ++i) chunk.v[i] = round_to<kType>(mul(chunk.v[i], set1(step)));
    }
    return chunk;
  }

  // What few rows of x multiply at once is a chunk, each vector decoded when it is wanted; kNibbleVectors of even
  // elements and as many of odd ones in turn, for so many are looked up at once.
  static constexpr int kStepChunks = 1;
  static constexpr int kStepVectors = kVectors;
  struct Step {
    Chunk chunk;
    F32 vector(int k) const {
      const int pair = k % (2 * kNibbleVectors), odd = pair / kNibbleVectors;
      return chunk.v[k - pair + 2 * (pair % kNibbleVectors) + odd];
    }
  };
  static Step join(const Chunk (&chunk)[kStepChunks]) { return {chunk[0]}; }
  struct StepOfOneBlock {
    const std::uint8_t* bytes;
    Table table;
    F32 vector(int k) const {
      const int turn = k / kNibbleVectors;
      const std::uint8_t* p = bytes + turn / 2 * kNibbleVectors * kLanes;
      F32 values[kNibbleVectors];
      lookup_nibbles<kType>(table, turn % 2 == 0 ? high_nibbles(p) : low_nibbles(p), values);
      return values[k % kNibbleVectors];
    }
  };
  template <int kScales>
  struct StepOfBlocks {
    const std::uint8_t* bytes;
    Table16 code;
    const float* scales;
    [[gnu::always_inline]] F32 vector(int k) const {
      const int turn = k / kNibbleVectors, g = turn / 2 * kNibbleVectors;
      const std::uint8_t* p = bytes + g * kLanes;
      F32 values[kNibbleVectors];
      lookup_in_blocks<kScales>(code, scales, g, turn % 2 == 0 ? high_nibbles(p) : low_nibbles(p), values);
      return values[k % kNibbleVectors];
    }
  };
  template <int kScales>
  using Step4 = std::conditional_t<kScales == 1, StepOfOneBlock, StepOfBlocks<kScales>>;
  template <int kScales>
  [[gnu::always_inline]] static Step4<kScales> step4(const std::uint8_t* codes, const Table16& code,
                                                     const float* scales) {
    if constexpr (kScales == 1)
      return {codes, table(code, scales[0])};
    else
      return {codes, code, scales};
  }
  using Step8 = Step;
  static Step8 step8(const std::uint8_t* codes, const float* scales) { return {decode8(codes, scales[0] / 127.0f)}; }

  // 64 elements of a dense row, times `scale`, rounded.
  template <DType kFrom>
  static Chunk dense(const void* p, float scale) {
    Chunk chunk;
    for (int g = 0; g < kVectors / 2; ++g) {
      const char* group = static_cast<const char*>(p) + g * kGroup * size_of(kFrom);
      load_pairs<kFrom>(group, chunk.v[2 * g], chunk.v[2 * g + 1]);
      for (int i = 2 * g; i < 2 * g + 2; ++i) chunk.v[i] = round_to<kType>(mul(chunk.v[i], set1(scale)));
    }
    return chunk;
  }
  // `count` of them in natural order, zeros after them.
  template <DType kFrom>
  static Chunk dense_natural(const void* p, float scale, int count) {
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i)
      chunk.v[i] = i * kLanes < count ? round_to<kType>(dense_vector<kFrom>(p, scale, i, count)) : zero();
    return chunk;
  }

  // Elements below `boundary` from a, the others from b.
  static Chunk blend(const Chunk& a, const Chunk& b, int boundary) {
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i) {
      alignas(64) std::uint8_t element[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        element[lane] = static_cast<std::uint8_t>((i / 2) * kGroup + 2 * lane + i % 2);
      chunk.v[i] = blend_from(a.v[i], b.v[i], element, boundary);
    }
    return chunk;
  }

  // Clears the elements whose bit is not set.
  static void keep(Chunk& chunk, std::uint64_t bits) {
    for (int i = 0; i < kVectors; ++i) chunk.v[i] = keep_lanes(chunk.v[i], vector_bits(bits, i));
  }

  // --- A unit of the other product, dX = dY . W, lies across W's rows: here one row a unit. ---

  static constexpr int kColumnVectors = kChunk / kLanes;  // accumulators that hold 64 columns
  struct Columns {
    F32 v[kColumnVectors];
  };
  static Columns columns(const Chunk& row) {
    Columns result;
    for (int i = 0; i < kColumnVectors; ++i) result.v[i] = row.v[i];
    return result;
  }
  static Columns columns_natural(const Chunk& row) { return columns(row); }
  // 64 accumulators of decoded columns -> natural order.
  static void to_natural(F32 (&sums)[kColumnVectors]) {
    for (int i = 0; i < kColumnVectors; i += 2) {
      F32 a, b;
      interleave(sums[i], sums[i + 1], a, b);
      sums[i] = a;
      sums[i + 1] = b;
    }
  }
  // Clears the accumulators whose column's bit is not set.
  static F32 keep_columns(F32 sums, int vector, std::uint64_t bits) {
    return keep_lanes(sums, vector_bits(bits, vector));
  }

 private:
  // What nibbles stand for, the even or the odd ones of groups g ... g+kNibbleVectors-1, in a chunk of kScales blocks.
  template <int kScales, class Nibbles>
  [[gnu::always_inline]] static void lookup_in_blocks(const Table16& code, const float* scales, int g, Nibbles nibbles,
                                                      F32 (&values)[kNibbleVectors]) {
    static_assert(kGroup * kNibbleVectors <= 32);
    if constexpr (kScales == 2) {  // a lookup is in one block
      lookup_nibbles<kType>(table(code, scales[g * kGroup / 32]), nibbles, values);
    } else {  // as many multiplications as for four tables, or fewer
      static_assert(kScales == 4);
      lookup_nibbles<DType::f32>(level_table<DType::f32>(code), nibbles, values);
      for (int i = 0; i < kNibbleVectors; ++i)
        values[i] = round_to<kType>(mul(values[i], scales_of_16(scales + (g + i) * kGroup / 16)));
    }
  }
  // The bits of vector i's elements, lane by lane.
  static std::uint32_t vector_bits(std::uint64_t bits, int i) {
    return every_second_bit(bits >> ((i / 2) * kGroup), i % 2);
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
