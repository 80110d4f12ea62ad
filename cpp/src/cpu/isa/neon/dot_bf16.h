// Multiplies pairs of bfloat16 with FEAT_BF16 (bfdot), which is two multiply-adds for one of an fp32 instruction.
// dot_f32-inl.h says what a chunk and a unit are; here a unit is two bfloat16. Of 32 elements, vectors 0 and 1
// of a chunk hold the even ones, vectors 2 and 3 the odd ones.
//
// The instruction rounds differently from the one of x86. Without FEAT_EBF16, or with FPCR.EBF = 0 as it is unless a
// program sets it, two products, their sum and its sum with the accumulator are operations of their own, none of them
// fused. Each is rounded to odd: what is not exact is cut off, and then its last bit set. Subnormal operands and
// results are zero, whatever FPCR says. (Arm Architecture Reference Manual for A-profile, DDI 0487, the description of
// "BFDOT (vector)" and BFDotAdd() in the shared pseudocode.) So a rounding is off by up to one unit in the last place,
// twice as much as one to nearest, in either direction. With FPCR.EBF = 1 the bits would be others.
#pragma once

#include "cpu/isa/neon/simd.h"

#include "cpu/isa/dot_f32-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

struct DotBf16 {
  static constexpr DType kActivation = DType::bf16;
  static constexpr int kElementsPerUnit = 2;
  static constexpr int kUnits = kChunk / kElementsPerUnit;
  static constexpr int kVectors = kUnits / kLanes;
  static constexpr std::int64_t kRestart = 1024;  // the rounding of the result hides a longer chain
  static constexpr std::int64_t kBlock = 1024;

  struct Chunk {
    F32 v[kVectors];
  };
  struct Table {
    uint8x16_t low, high;  // bytes of the 16 levels
  };

  static F32 dot(F32 accumulator, F32 x, F32 w) { return vbfdotq_f32(accumulator, pairs_of(x), pairs_of(w)); }

  // One unit for all lanes: the instruction takes it from a lane.
  struct Unit {
    bfloat16x4_t pair;
  };
  static Unit broadcast(const float* unit) { return {vreinterpret_bf16_f32(float32x2_t{*unit, 0.0f})}; }
  static F32 dot(F32 accumulator, F32 x, Unit w) { return vbfdotq_lane_f32(accumulator, pairs_of(x), w.pair, 0); }
  static F32 dot(F32 accumulator, Unit x, F32 w) { return dot(accumulator, w, x); }
  static F32 dot_broadcast(F32 accumulator, F32 x, const float* unit) { return dot(accumulator, x, broadcast(unit)); }

  template <class Scales>
  [[gnu::always_inline]] static Table table(const Table16& code, const Scales& scales, int block = 0) {
    const Table16 levels = values_of(code, scales, block);
    const uint8x16_t first = vreinterpretq_u8_f32(to_bf16(levels.level[0], levels.level[1]));
    const uint8x16_t last = vreinterpretq_u8_f32(to_bf16(levels.level[2], levels.level[3]));
    return {vuzp1q_u8(first, last), vuzp2q_u8(first, last)};
  }

  template <bool kOdd>
  [[gnu::always_inline]] static Chunk decode4(const std::uint8_t* bytes, Table table) {
    Chunk chunk;
    for (int q = 0; q < 2; ++q) {
      const std::uint8_t* p = bytes + 16 * q;
      const uint8x16_t even = kOdd ? low_nibbles(p) : high_nibbles(p);
      const uint8x16_t odd = kOdd ? high_nibbles(p + 1) : low_nibbles(p);
      for (int half = 0; half < 2; ++half) {
        chunk.v[4 * q + half] = lookup_half(table, even, half);
        chunk.v[4 * q + 2 + half] = lookup_half(table, odd, half);
      }
    }
    return chunk;
  }

  // 64 weights of kScales blocks, 2 or 4.
  template <int kScales, class Scales>
  [[gnu::always_inline]] static Chunk decode4_blocks(const std::uint8_t* bytes, const Table16& code,
                                                     const Scales& scales) {
    const Step4<kScales, Scales> step = step4<kScales>(bytes, code, scales);
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i) chunk.v[i] = step.vector(i);
    return chunk;
  }

  // 64 weights of kScales blocks, 1, 2 or 4, from 64 bytes.
  template <CodeKind kCodes, int kScales, class Scales>
  [[gnu::always_inline]] static Chunk decode8(const std::uint8_t* bytes, const Scales& scales) {
    Chunk chunk;
    for (int g = 0; g < kChunk / 16; ++g) {
      F32 even[2], odd[2];
      for (int i = 0; i < 2; ++i) {
        load_levels<kCodes>(bytes + 16 * g + 8 * i, even[i], odd[i]);
        even[i] = scales.of_block(even[i], g * kScales / 4);
        odd[i] = scales.of_block(odd[i], g * kScales / 4);
      }
      chunk.v[even_vector(g)] = to_bf16(even[0], even[1]);
      chunk.v[odd_vector(g)] = to_bf16(odd[0], odd[1]);
    }
    return chunk;
  }

  static constexpr int kStepChunks = 1;
  static constexpr int kStepVectors = kVectors;
  static constexpr int kStepRows = 2, kStepRowsOfMany = 2, kMaxDirectRows = 8;
  static constexpr bool kFewRows = false;
  struct Step {
    Chunk chunk;
    F32 vector(int k) const { return chunk.v[k]; }
  };
  static Step join(const Chunk (&chunk)[kStepChunks]) { return {chunk[0]}; }
  template <int kScales, class>
  struct Step4 {
    const std::uint8_t* bytes;
    Table table[kScales];
    F32 vector(int k) const {
      const int quarter = k / 4 * 2 + k % 2;  // of the chunk: the even or the odd ones of 16 elements
      const std::uint8_t* p = bytes + 16 * (k / 4);
      return lookup_half(table[quarter * kScales / 4], k / 2 % 2 == 0 ? high_nibbles(p) : low_nibbles(p), k % 2);
    }
  };
  template <int kScales, class Scales>
  [[gnu::always_inline]] static Step4<kScales, Scales> step4(const std::uint8_t* codes, const Table16& code,
                                                             const Scales& scales) {
    Step4<kScales, Scales> step{codes, {}};
    for (int i = 0; i < kScales; ++i) step.table[i] = table(code, scales, i);
    return step;
  }
  template <CodeKind, int, class>
  using Step8 = Step;
  template <CodeKind kCodes, int kScales, class Scales>
  [[gnu::always_inline]] static Step step8(const std::uint8_t* codes, const Scales& scales) {
    return {decode8<kCodes, kScales>(codes, scales)};
  }

  template <DType kFrom>
  static Chunk dense(const void* p, float scale) {
    Chunk chunk;
    for (int g = 0; g < kChunk / 16; ++g) {
      F32 even[2], odd[2];
      for (int i = 0; i < 2; ++i) {
        load_pairs<kFrom>(static_cast<const char*>(p) + (16 * g + 8 * i) * size_of(kFrom), even[i], odd[i]);
        even[i] = mul(even[i], set1(scale));
        odd[i] = mul(odd[i], set1(scale));
      }
      chunk.v[even_vector(g)] = to_bf16(even[0], even[1]);
      chunk.v[odd_vector(g)] = to_bf16(odd[0], odd[1]);
    }
    return chunk;
  }
  template <DType kFrom>
  static Chunk dense_natural(const void* p, float scale, int count) {
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i)
      chunk.v[i] =
          to_bf16(dense_vector<kFrom>(p, scale, 2 * i, count), dense_vector<kFrom>(p, scale, 2 * i + 1, count));
    return chunk;
  }

  static Chunk natural(const F32 (&values)[kChunk / kLanes]) {
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i) chunk.v[i] = to_bf16(values[2 * i], values[2 * i + 1]);
    return chunk;
  }

  static Chunk blend(const Chunk& a, const Chunk& b, int boundary) {
    const uint16x8_t limit = vdupq_n_u16(static_cast<std::uint16_t>(boundary));
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i) {
      const uint16x8_t first = vdupq_n_u16(static_cast<std::uint16_t>(first_element(i)));
      const uint16x8_t element = vaddq_u16(first, uint16x8_t{0, 2, 4, 6, 8, 10, 12, 14});
      chunk.v[i] = vreinterpretq_f32_u16(vbslq_u16(vcgeq_u16(element, limit), words_of(b.v[i]), words_of(a.v[i])));
    }
    return chunk;
  }

  static void mask(Chunk& chunk, std::uint64_t bits) {
    for (int i = 0; i < kVectors; ++i) {
      const uint16x8_t all = vdupq_n_u16(static_cast<std::uint16_t>(bits >> first_element(i)));
      const uint16x8_t mask = vtstq_u16(all, uint16x8_t{1, 1 << 2, 1 << 4, 1 << 6, 1 << 8, 1 << 10, 1 << 12, 1 << 14});
      chunk.v[i] = vreinterpretq_f32_u16(vandq_u16(words_of(chunk.v[i]), mask));
    }
  }

  // dX = dY . W: a unit holds the elements of rows n and n+1 in one column. Vector i of a chunk becomes two.
  static constexpr int kColumnVectors = kChunk / kLanes;
  struct Columns {
    F32 v[kColumnVectors];
  };
  static Columns columns(const Chunk& n0, const Chunk& n1) {
    Columns result;
    for (int i = 0; i < kVectors; ++i) {
      result.v[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(words_of(n0.v[i]), words_of(n1.v[i])));
      result.v[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(words_of(n0.v[i]), words_of(n1.v[i])));
    }
    return result;
  }
  static Columns columns_natural(const Chunk& n0, const Chunk& n1) { return columns(n0, n1); }
  static void to_natural(F32 (&accumulators)[kColumnVectors]) {
    F32 natural[kColumnVectors];
    for (int g = 0; g < kChunk / 16; ++g)
      for (int i = 0; i < 2; ++i)
        interleave(accumulators[2 * even_vector(g) + i], accumulators[2 * odd_vector(g) + i], natural[4 * g + 2 * i],
                   natural[4 * g + 2 * i + 1]);
    for (int i = 0; i < kColumnVectors; ++i) accumulators[i] = natural[i];
  }
  static F32 mask_columns(F32 accumulators, int vector, std::uint64_t bits) {
    const auto from = static_cast<std::uint32_t>(bits >> (first_element(vector / 2) + vector % 2 * 8));
    const uint32x4_t mask = vtstq_u32(vdupq_n_u32(from), uint32x4_t{1, 1 << 2, 1 << 4, 1 << 6});
    return vreinterpretq_f32_u32(vandq_u32(bits_of(accumulators), mask));
  }

 private:
  // The vectors of elements 16 g ... 16 g + 15, and which element of a chunk is a vector's first: the others follow two
  // apart.
  static constexpr int even_vector(int g) { return g / 2 * 4 + g % 2; }
  static constexpr int odd_vector(int g) { return even_vector(g) + 2; }
  static constexpr int first_element(int vector) { return vector / 4 * 32 + vector % 2 * 16 + vector / 2 % 2; }

  static bfloat16x8_t pairs_of(F32 x) { return vreinterpretq_bf16_f32(x); }
  static uint16x8_t words_of(F32 x) { return vreinterpretq_u16_f32(x); }
  static F32 to_bf16(F32 first, F32 last) {
    return vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first), last));
  }
  // Eight of the 16 values that nibbles stand for.
  static F32 lookup_half(const Table& table, uint8x16_t nibbles, int half) {
    const uint8x16_t low = vqtbl1q_u8(table.low, nibbles), high = vqtbl1q_u8(table.high, nibbles);
    return vreinterpretq_f32_u16(half == 0 ? first_words(low, high) : last_words(low, high));
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
