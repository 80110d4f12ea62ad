// A Dot says how a product multiplies; this one multiplies and adds in fp32, for any element type of x.
//
// A product sees the inner dimension in chunks of 64 elements, and a chunk as units of 32 bits: here a unit is one
// float. Decoding yields the even and the odd elements apart, and a sum does not depend on the order of its terms, so
// a chunk keeps that order. With L lanes
//
//   vector 2g     has the even ones of elements 2L*g ... 2L*(g+1)-1
//   vector 2g+1   has the odd ones
//
// Activations are put in the same order when they are packed.
//
// Every Dot says kActivation, kElementsPerUnit, kUnits, kVectors, kRestart, kBlock, Chunk and Table, and has for
//
//   decoding W         table, decode4, decode4_blocks, decode8
//   dense rows         dense, dense_natural, natural
//   ragged rows        blend, mask
//   dX                 kColumnVectors, Columns, columns, columns_natural, to_natural, mask_columns
//   vectors            dot, broadcast, dot_broadcast
//   small_m            kStepChunks ... kFewRows, Step, join, Step4, step4, Step8, step8
//   steps of 2 chunks  kHalfStepVectors
//   pairs of bf16      decode4_two; columns and columns_natural take the two rows of a unit
#pragma once

#include <type_traits>

#include "cpu/isa/block_scales-inl.h"
#include "cpu/isa/primitives-inl.h"
#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kChunk = 64;  // elements of the inner dimension that are decoded together

// Loads vector i of `count` elements of a dense row, times `scale`, with zeros after them.
template <DType kFrom>
inline F32 dense_vector(const void* p, float scale, int i, int count) {
  const int first = i * kLanes, rest = count - first;
  if (rest <= 0) return zero();
  const char* elements = static_cast<const char*>(p) + first * static_cast<int>(size_of(kFrom));
  return mul(load_as_f32<kFrom>(elements, rest < kLanes ? rest : kLanes), set1(scale));
}

template <DType kType>
struct DotF32 {
  static constexpr DType kActivation = kType;  // of x; weights and adapters are rounded to it
  static constexpr int kElementsPerUnit = 1;
  static constexpr int kUnits = kChunk / kElementsPerUnit;  // of a chunk
  static constexpr int kVectors = kUnits / kLanes;
  static constexpr int kGroup = 2 * kLanes;  // elements that share an even and an odd vector
  // Accumulators start from zero after so many elements: a long chain of fp32 additions loses what the short ones of a
  // dense product keep.
  static constexpr std::int64_t kRestart = 64;
  static constexpr std::int64_t kBlock = 256;  // elements of the inner dimension that are decoded at once

  struct Chunk {
    F32 v[kVectors];
  };
  using Table = LevelTable;

  static F32 dot(F32 accumulator, F32 x, F32 w) { return fma(x, w, accumulator); }

  // Broadcasts a unit in memory to all lanes.
  static F32 broadcast(const float* unit) { return set1(*unit); }
  static F32 dot_broadcast(F32 accumulator, F32 x, const float* unit) { return dot(accumulator, x, set1(*unit)); }

  // The 16 values of one block, rounded.
  template <class Scales>
  [[gnu::always_inline]] static Table table(const Table16& code, const Scales& scales, int block = 0) {
    return level_table<kType>(values_of(code, scales, block));
  }

  // Decodes 64 weights from 32 bytes of codes; with kOdd from 33 bytes, of which the first weight has the low nibble.
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

  // Decodes 64 weights of kScales blocks, 2 or 4, which `scales` has in order.
  template <int kScales, class Scales>
  [[gnu::always_inline]] static Chunk decode4_blocks(const std::uint8_t* bytes, const Table16& code,
                                                     const Scales& scales) {
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

  // Decodes 64 weights of kScales blocks, 1, 2 or 4, from 64 bytes.
  template <CodeKind kCodes, int kScales, class Scales>
  [[gnu::always_inline]] static Chunk decode8(const std::uint8_t* bytes, const Scales& scales) {
    Chunk chunk;
    for (int g = 0; g < kVectors / 2; ++g) {
      load_levels<kCodes>(bytes + g * kGroup, chunk.v[2 * g], chunk.v[2 * g + 1]);
      for (int i = 2 * g; i < 2 * g + 2; ++i) chunk.v[i] = round_value<kType>(values<kScales>(scales, chunk.v[i], g));
    }
    return chunk;
  }

  // The small_m kernel multiplies a chunk at a time, and each vector is decoded when it is used. Vectors of even
  // elements and of odd ones alternate, kNibbleVectors each, because so many are looked up at once.
  static constexpr int kStepChunks = 1;
  static constexpr int kStepVectors = kVectors;
  // Rows of W that are multiplied together, by up to 4 rows of x and by more of them, as registers allow.
  static constexpr int kStepRows = kVectors <= 4 ? 4 : 2, kStepRowsOfMany = kVectors <= 4 ? 3 : 2;
  // Rows of x that are one piece although the first-level cache does not hold them.
  static constexpr int kMaxDirectRows = 8;
  static constexpr bool kFewRows = false;  // whether products of more than two rows of x have another Dot
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
      const int round = k / kNibbleVectors;
      const std::uint8_t* p = bytes + round / 2 * kNibbleVectors * kLanes;
      F32 values[kNibbleVectors];
      lookup_nibbles<kType>(table, round % 2 == 0 ? high_nibbles(p) : low_nibbles(p), values);
      return values[k % kNibbleVectors];
    }
  };
  template <int kScales, class Scales>
  struct StepOfBlocks {
    const std::uint8_t* bytes;
    Table16 code;
    Scales scales;
    [[gnu::always_inline]] F32 vector(int k) const {
      const int round = k / kNibbleVectors, g = round / 2 * kNibbleVectors;
      const std::uint8_t* p = bytes + g * kLanes;
      F32 values[kNibbleVectors];
      lookup_in_blocks<kScales>(code, scales, g, round % 2 == 0 ? high_nibbles(p) : low_nibbles(p), values);
      return values[k % kNibbleVectors];
    }
  };
  template <int kScales, class Scales>
  using Step4 = std::conditional_t<kScales == 1, StepOfOneBlock, StepOfBlocks<kScales, Scales>>;
  template <int kScales, class Scales>
  [[gnu::always_inline]] static Step4<kScales, Scales> step4(const std::uint8_t* codes, const Table16& code,
                                                             const Scales& scales) {
    if constexpr (kScales == 1)
      return {codes, table(code, scales)};
    else
      return {codes, code, scales};
  }
  template <CodeKind, int, class>
  using Step8 = Step;
  template <CodeKind kCodes, int kScales, class Scales>
  [[gnu::always_inline]] static Step step8(const std::uint8_t* codes, const Scales& scales) {
    return {decode8<kCodes, kScales>(codes, scales)};
  }

  // Loads 64 elements of a dense row, times `scale`, rounded.
  template <DType kFrom>
  static Chunk dense(const void* p, float scale) {
    Chunk chunk;
    for (int g = 0; g < kVectors / 2; ++g) {
      const char* group = static_cast<const char*>(p) + g * kGroup * size_of(kFrom);
      load_pairs<kFrom>(group, chunk.v[2 * g], chunk.v[2 * g + 1]);
    }
    if (kFrom == kType && scale == 1.0f) return chunk;
    for (F32& v : chunk.v) v = round_to<kType>(mul(v, set1(scale)));
    return chunk;
  }
  // Loads `count` of them in natural order, with zeros after them.
  template <DType kFrom>
  static Chunk dense_natural(const void* p, float scale, int count) {
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i) chunk.v[i] = dense_vector<kFrom>(p, scale, i, count);
    if (kFrom == kType && scale == 1.0f) return chunk;
    for (F32& v : chunk.v) v = round_to<kType>(v);
    return chunk;
  }

  // Rounds values of fp32 to a chunk in natural order.
  static Chunk natural(const F32 (&values)[kChunk / kLanes]) {
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i) chunk.v[i] = round_to<kType>(values[i]);
    return chunk;
  }

  // Takes the elements below `boundary` from a, and the others from b.
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
  static void mask(Chunk& chunk, std::uint64_t bits) {
    for (int i = 0; i < kVectors; ++i) chunk.v[i] = mask_lanes(chunk.v[i], vector_bits(bits, i));
  }

  // --- In dX = dY . W a unit lies across the rows of W: here it is one row. ---

  static constexpr int kColumnVectors = kChunk / kLanes;  // vectors of accumulators of 64 columns
  struct Columns {
    F32 v[kColumnVectors];
  };
  static Columns columns(const Chunk& row) {
    Columns result;
    for (int i = 0; i < kColumnVectors; ++i) result.v[i] = row.v[i];
    return result;
  }
  static Columns columns_natural(const Chunk& row) { return columns(row); }
  // Puts the accumulators of 64 decoded columns in natural order.
  static void to_natural(F32 (&accumulators)[kColumnVectors]) {
    for (int i = 0; i < kColumnVectors; i += 2) {
      F32 a, b;
      interleave(accumulators[i], accumulators[i + 1], a, b);
      accumulators[i] = a;
      accumulators[i + 1] = b;
    }
  }
  // Clears the accumulators whose column's bit is not set.
  static F32 mask_columns(F32 accumulators, int vector, std::uint64_t bits) {
    return mask_lanes(accumulators, vector_bits(bits, vector));
  }

 private:
  // The values of the even or the odd levels of group g in a chunk of kScales blocks.
  template <int kScales, class Scales>
  [[gnu::always_inline]] static F32 values(const Scales& scales, F32 levels, int g) {
    static_assert(kGroup <= 32);
    if constexpr (kScales == 4) return scales.of_blocks_of_16(levels, g * kGroup / 16);
    return scales.of_block(levels, g * kGroup * kScales / kChunk);
  }
  // Looks up the even or the odd nibbles of groups g ... g+kNibbleVectors-1 in a chunk of kScales blocks.
  template <int kScales, class Nibbles, class Scales>
  [[gnu::always_inline]] static void lookup_in_blocks(const Table16& code, const Scales& scales, int g, Nibbles nibbles,
                                                      F32 (&looked_up)[kNibbleVectors]) {
    static_assert(kGroup * kNibbleVectors <= 32);
    if constexpr (kScales == 2) {  // all nibbles are in one block
      lookup_nibbles<kType>(table(code, scales, g * kGroup / 32), nibbles, looked_up);
    } else {  // this multiplies as often as four tables would, or less
      static_assert(kScales == 4);
      lookup_nibbles<DType::f32>(level_table<DType::f32>(code), nibbles, looked_up);
      for (int i = 0; i < kNibbleVectors; ++i)
        looked_up[i] = round_value<kType>(values<kScales>(scales, looked_up[i], g + i));
    }
  }
  // The bits of vector i's elements, lane by lane.
  static std::uint32_t vector_bits(std::uint64_t bits, int i) {
    return every_second_bit(bits >> ((i / 2) * kGroup), i % 2);
  }
};

// Whether one sum of all terms is accurate enough: what it loses is far less than the rounding of a result to bf16, but
// too much for a result in fp32. Others are sums of shorter chains (kRestart).
template <class Dot>
constexpr bool kOneChain = Dot::kActivation == DType::bf16;

}  // namespace
}  // namespace qlora_native::QLN_ISA
