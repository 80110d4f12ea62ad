// Multiplies pairs of bfloat16 with AVX512_BF16, at twice the rate of fp32. dot_f32-inl.h says what a chunk and
// a unit are; here a unit is two bfloat16. Vector 0 of a chunk holds its 32 even elements, vector 1 the odd ones. The
// instruction treats subnormal inputs and results as zero, whatever the control register says.
#pragma once

#include <bit>

#include "common/microscaling.h"
#include "cpu/isa/avx512/simd.h"

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
    __m512i level;  // the 16 levels twice, so that the fifth bit of an index does not matter
  };

  static F32 dot(F32 accumulator, F32 x, F32 w) {
    return _mm512_dpbf16_ps(accumulator, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }

  static F32 broadcast(const float* unit) { return set1(*unit); }
  // Multiplies by one unit in memory, for all lanes. The compiler would first broadcast it to a register, which halves
  // the speed where the unit is used once.
  static F32 dot_broadcast(F32 accumulator, F32 x, const float* unit) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(accumulator) : "v"(x), "m"(*unit));
    return accumulator;
  }

  template <class Scales>
  static Table table(Table16 code, const Scales& scales) {
    const __m256bh levels = _mm512_cvtneps_pbh(scales.of_block(code.level, 0));
    return {_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(levels))};
  }

  template <bool kOdd>
  static Chunk decode4(const std::uint8_t* bytes, Table table) {
    const __m512i first = load_words(bytes);
    const __m512i second = kOdd ? load_words(bytes + 1) : first;
    const __m512i high = _mm512_srli_epi16(kOdd ? second : first, 4);
    const F32 from_high = _mm512_castsi512_ps(_mm512_permutexvar_epi16(high, table.level));
    const F32 from_low = _mm512_castsi512_ps(_mm512_permutexvar_epi16(first, table.level));
    return kOdd ? Chunk{{from_low, from_high}} : Chunk{{from_high, from_low}};
  }

  // Decodes 64 weights of either of two blocks. One conversion rounds the values of both.
  template <class Scales>
  [[gnu::always_inline]] static void decode4_two(const std::uint8_t* const (&bytes)[2], Table16 code,
                                                 const Scales (&scales)[2], Chunk (&chunk)[2]) {
    const __m512i levels = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(scales[1].of_block(code.level, 0), scales[0].of_block(code.level, 0)));
    const __m512i nibbles = _mm512_set1_epi16(0x0F), second = _mm512_set1_epi16(0x10);  // bit 4 names the block
    for (int i = 0; i < 2; ++i) {
      const __m512i words = load_words(bytes[i]);
      __m512i high = _mm512_srli_epi16(words, 4), low = _mm512_and_si512(words, nibbles);
      if (i == 1) {
        high = _mm512_or_si512(high, second);
        low = _mm512_ternarylogic_epi64(words, nibbles, second, kAndOr);
      }
      chunk[i] = {{_mm512_castsi512_ps(_mm512_permutexvar_epi16(high, levels)),
                   _mm512_castsi512_ps(_mm512_permutexvar_epi16(low, levels))}};
    }
  }

  // Decodes 64 weights of kScales blocks, 2 or 4. An index names the block too.
  template <int kScales, class Scales>
  [[gnu::always_inline]] static Chunk decode4_blocks(const std::uint8_t* bytes, Table16 code, const Scales& scales) {
    const __m512i words = load_words(bytes), block = block_bits<kScales>(), nibbles = _mm512_set1_epi16(0x0F);
    const __m512i high = _mm512_or_si512(_mm512_srli_epi16(words, 4), block);
    const __m512i low = _mm512_ternarylogic_epi64(words, nibbles, block, kAndOr);
    const auto lookup = [&](__m512i index) {
      if constexpr (kScales == 4) return lookup_in_four(code, scales, index);
      return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, levels_of_two(code, scales)));
    };
    return {{lookup(high), lookup(low)}};
  }

  // Decodes 64 weights of kScales blocks, 1, 2 or 4, from 64 bytes.
  template <CodeKind kCodes, int kScales, class Scales>
  [[gnu::always_inline]] static Chunk decode8(const std::uint8_t* bytes, const Scales& scales) {
    F32 even[2], odd[2];
    for (int g = 0; g < 2; ++g) {
      load_levels<kCodes>(bytes + g * 32, even[g], odd[g]);
      for (F32* levels : {&even[g], &odd[g]})
        *levels = kScales == 4 ? scales.of_blocks_of_16(*levels, 2 * g) : scales.of_block(*levels, g * kScales / 2);
    }
    return {{to_bf16(even), to_bf16(odd)}};
  }

  // The small_m kernel multiplies two chunks at once, and vector k of a step holds elements 4i + k. In 64 bytes of
  // 4-bit codes these are one nibble of each 16-bit word, so nothing has to be widened. The words of a chunk are one
  // half of the vector, so one half of a table is for the first chunk and the other half for the second, and one
  // instruction rounds both.
  static constexpr int kStepChunks = 2;
  static constexpr int kStepVectors = 4;
  static constexpr int kHalfStepVectors = 4;  // of a step whose second chunk is zero; the others need not be multiplied
  static constexpr int kStepRows = 4, kStepRowsOfMany = 2, kMaxDirectRows = 5;
  static constexpr bool kFewRows = false;
  struct Step {
    F32 v[kStepVectors];
    F32 vector(int k) const { return v[k]; }
  };
  static Step join(const Chunk (&chunk)[kStepChunks]) {
    const __m512i evens = _mm512_add_epi16(word_numbers(), word_numbers());
    const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    Step step;
    for (int k = 0; k < kStepVectors; ++k)
      step.v[k] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(
          _mm512_castps_si512(chunk[0].v[k % 2]), k < 2 ? evens : odds, _mm512_castps_si512(chunk[1].v[k % 2])));
    return step;
  }
  // A vector is decoded when it is used: the tables are fewer registers than what they decode to.
  template <int kScales, class>
  struct Step4 {
    __m512i high, low;  // in each byte the index that its high or low nibble stands for: bits 4 and 5 name the block
    __m512i levels[kScales];  // of two blocks each, 16 words of either
    [[gnu::always_inline]] F32 vector(int k) const {
      const __m512i pair = k % 2 == 0 ? high : low;
      const __m512i index = k < 2 ? pair : _mm512_srli_epi16(pair, 8);
      if constexpr (kScales == 1) return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, levels[0]));
      if constexpr (kScales == 2) return _mm512_castsi512_ps(_mm512_permutex2var_epi16(levels[0], index, levels[1]));
      if constexpr (kScales == 4) {
        // Each half of the vector has four blocks of its own. The first half is looked up in place of its indices,
        // which the lookup of the second half leaves.
        const __m512i second = _mm512_mask2_permutex2var_epi16(levels[2], index, 0xFFFF0000, levels[3]);
        return _mm512_castsi512_ps(_mm512_mask2_permutex2var_epi16(levels[0], second, 0x0000FFFF, levels[1]));
      }
    }
  };
  template <int kScales, class Scales>
  static Step4<kScales, Scales> step4(const std::uint8_t* codes, Table16 code, const Scales& scales) {
    const __m512i words = _mm512_loadu_si512(codes);
    const __m512i nibbles = _mm512_set1_epi8(0x0F), block = block_bits<kStepChunks * kScales>();
    Step4<kScales, Scales> step = {_mm512_ternarylogic_epi64(_mm512_srli_epi16(words, 4), nibbles, block, kAndOr),
                                   _mm512_ternarylogic_epi64(words, nibbles, block, kAndOr)};
    for (int i = 0; i < kScales; ++i) step.levels[i] = levels_of_two(code, scales + 2 * i);
    return step;
  }
  // 64 bytes as levels: vector k has byte k of each lane.
  template <CodeKind kCodes>
  struct Levels {
    __m512i bytes;
    static Levels of(__m512i codes) { return {codes}; }
    F32 vector(int k) const {
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bytes, static_cast<unsigned>(24 - 8 * k)), 24));
    }
  };
  template <CodeKind kCodes, int kScales, class Scales>
  struct Step8 {
    Levels<kCodes> levels[kStepChunks];
    F32 scale[kStepChunks], minimum[kStepChunks];  // of each lane
    F32 vector(int k) const {
      F32 values[kStepChunks];
      for (int i = 0; i < kStepChunks; ++i) {
        const F32 level = levels[i].vector(k);
        values[i] = Scales::kHasMinimum ? fma(level, scale[i], minimum[i]) : mul(level, scale[i]);
      }
      return to_bf16(values);
    }
  };
  template <CodeKind kCodes, int kScales, class Scales>
  static Step8<kCodes, kScales, Scales> step8(const std::uint8_t* codes, const Scales& scales) {
    Step8<kCodes, kScales, Scales> step;
    for (int i = 0; i < kStepChunks; ++i) {
      step.levels[i] = Levels<kCodes>::of(_mm512_loadu_si512(codes + i * kChunk));
      step.scale[i] = of_lanes<kScales>(scales.scale + i * kScales);
      if constexpr (Scales::kHasMinimum) step.minimum[i] = of_lanes<kScales>(scales.minimum + i * kScales);
    }
    return step;
  }

  template <DType kFrom>
  static Chunk dense(const void* p, float scale) {
    if constexpr (kFrom == DType::bf16)
      if (scale == 1.0f) return words_apart(p);
    F32 even[2], odd[2];
    for (int g = 0; g < 2; ++g) {
      load_pairs<kFrom>(static_cast<const char*>(p) + g * 32 * size_of(kFrom), even[g], odd[g]);
      even[g] = mul(even[g], set1(scale));
      odd[g] = mul(odd[g], set1(scale));
    }
    return {{to_bf16(even), to_bf16(odd)}};
  }
  template <DType kFrom>
  static Chunk dense_natural(const void* p, float scale, int count) {
    Chunk chunk;
    if constexpr (kFrom == DType::bf16)
      if (scale == 1.0f && count >= kChunk) {
        for (int i = 0; i < kVectors; ++i) chunk.v[i] = load(static_cast<const float*>(p) + i * kLanes);
        return chunk;
      }
    for (int i = 0; i < kVectors; ++i) {
      chunk.v[i] = zero();
      if (2 * i * kLanes >= count) continue;
      F32 part[2];
      for (int half = 0; half < 2; ++half) part[half] = dense_vector<kFrom>(p, scale, 2 * i + half, count);
      chunk.v[i] = to_bf16(part);
    }
    return chunk;
  }

  // Values of fp32 as a chunk in natural order.
  static Chunk natural(const F32 (&values)[kChunk / kLanes]) {
    return {{to_bf16({values[0], values[1]}), to_bf16({values[2], values[3]})}};
  }

  static Chunk blend(const Chunk& a, const Chunk& b, int boundary) {
    // Lane i of the even vector is element 2i, of the odd one 2i + 1.
    const std::uint64_t from = boundary < 64 ? ~0ull << boundary : 0;
    return {
        {blend_words(a.v[0], b.v[0], _pext_u64(from, kEven)), blend_words(a.v[1], b.v[1], _pext_u64(from, kOdd64))}};
  }

  static void mask(Chunk& chunk, std::uint64_t bits) {
    chunk.v[0] = mask_words(chunk.v[0], _pext_u64(bits, kEven));
    chunk.v[1] = mask_words(chunk.v[1], _pext_u64(bits, kOdd64));
  }

  // dX = dY . W: a unit holds the elements of rows n and n+1 in one column.
  static constexpr int kColumnVectors = 4;
  struct Columns {
    F32 v[kColumnVectors];
  };
  // Interleaves two rows. The 128-bit lanes stay apart, so vector 0 holds columns 16j + {0,2,4,6}, vector 1
  // 16j + {8,10,12,14}, vectors 2 and 3 the odd ones after them (j = 0 ... 3).
  static Columns columns(const Chunk& n0, const Chunk& n1) {
    return {{unpack_low(n0.v[0], n1.v[0]), unpack_high(n0.v[0], n1.v[0]), unpack_low(n0.v[1], n1.v[1]),
             unpack_high(n0.v[1], n1.v[1])}};
  }
  static Columns columns_natural(const Chunk& n0, const Chunk& n1) {
    alignas(64) static constexpr std::uint16_t kInterleave[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kInterleave);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    Columns result;
    for (int i = 0; i < kColumnVectors; ++i)
      result.v[i] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(n0.v[i / 2]), i % 2 ? high : low,
                                                                  _mm512_castps_si512(n1.v[i / 2])));
    return result;
  }
  static void to_natural(F32 (&accumulators)[kColumnVectors]) {
    // Columns 16j ... 16j+15 are lanes 4j ... 4j+3 of the four vectors.
    F32 even[2], odd[2];  // 32 even columns in order, 32 odd ones
    join_lanes(accumulators[0], accumulators[1], even);
    join_lanes(accumulators[2], accumulators[3], odd);
    for (int g = 0; g < 2; ++g) interleave(even[g], odd[g], accumulators[2 * g], accumulators[2 * g + 1]);
  }
  static F32 mask_columns(F32 accumulators, int vector, std::uint64_t bits) {
    constexpr std::uint64_t kColumns[kColumnVectors] = {0x0055005500550055, 0x5500550055005500, 0x00AA00AA00AA00AA,
                                                        0xAA00AA00AA00AA00};
    return mask_lanes(accumulators, static_cast<std::uint32_t>(_pext_u64(bits, kColumns[vector])));
  }

 private:
  static constexpr int kAndOr = 0xEA;  // of a ternary logic instruction: (a & b) | c

  // The scale of each lane, whose four bytes are in one of kScales blocks of 64 bytes.
  template <int kScales>
  static F32 of_lanes(const float* scales) {
    if constexpr (kScales == 1) return set1(scales[0]);
    if constexpr (kScales == 2) return scales_of_16(scales);
    const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(scales)), quarter);
  }

  // The values of two blocks, 16 words each.
  template <class Scales>
  static __m512i levels_of_two(Table16 code, const Scales& scales) {
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(scales.of_block(code.level, 1), scales.of_block(code.level, 0)));
  }
  template <class Scales>
  static F32 lookup_in_four(Table16 code, const Scales& scales, __m512i index) {
    return _mm512_castsi512_ps(
        _mm512_permutex2var_epi16(levels_of_two(code, scales), index, levels_of_two(code, scales + 2)));
  }
  struct Bytes {
    alignas(64) std::uint8_t byte[64];
  };
  // In bits 4 and 5 of each byte the number of its block, modulo four, of kBlocks blocks in a vector.
  template <int kBlocks>
  static __m512i block_bits() {
    static constexpr Bytes kBits = [] {
      Bytes bits{};
      for (int i = 0; i < 64; ++i) bits.byte[i] = static_cast<std::uint8_t>(i * kBlocks / 64 % 4 << 4);
      return bits;
    }();
    return _mm512_load_si512(kBits.byte);
  }

  // Byte `which` of the bfloat16 numbers that the codes 64 * half ... 64 * half + 63 of E4M3 are, divided by 256.
  template <int half, int which>
  static __m512i bytes_of_e4m3() {
    static constexpr Bytes kBytes = [] {
      Bytes bytes{};
      for (int i = 0; i < 64; ++i) {
        const float value = f32_from_e4m3(static_cast<std::uint8_t>(64 * half + i)) / 256.0f;
        bytes.byte[i] = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(value) >> (16 + 8 * which));
      }
      return bytes;
    }();
    return _mm512_load_si512(kBytes.byte);
  }

  static constexpr std::uint64_t kEven = 0x5555555555555555, kOdd64 = 0xAAAAAAAAAAAAAAAA;

  static __m512i word_numbers() {
    alignas(64) static constexpr std::uint16_t kNumbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                               11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                               22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    return _mm512_load_si512(kNumbers);
  }
  static __m512i load_words(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // The even and the odd ones of 64 words.
  static Chunk words_apart(const void* p) {
    const __m512i first = _mm512_loadu_si512(p), second = _mm512_loadu_si512(static_cast<const char*>(p) + 64);
    const __m512i evens = _mm512_add_epi16(word_numbers(), word_numbers());
    const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    return {{_mm512_castsi512_ps(_mm512_permutex2var_epi16(first, evens, second)),
             _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, odds, second))}};
  }
  static F32 to_bf16(const F32 (&x)[2]) { return reinterpret_cast<F32>(_mm512_cvtne2ps_pbh(x[1], x[0])); }
  static F32 blend_words(F32 a, F32 b, std::uint64_t from_b) {
    return _mm512_castsi512_ps(
        _mm512_mask_blend_epi16(static_cast<__mmask32>(from_b), _mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static F32 mask_words(F32 a, std::uint64_t mask) {
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(static_cast<__mmask32>(mask), _mm512_castps_si512(a)));
  }
  static F32 unpack_low(F32 a, F32 b) {
    return _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static F32 unpack_high(F32 a, F32 b) {
    return _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  // Four-float lanes of low and high alternate: low 0, high 0, low 1, ...
  static void join_lanes(F32 low, F32 high, F32 (&out)[2]) {
    const I32 order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    out[0] = _mm512_permutex2var_ps(low, order, high);
    out[1] = _mm512_permutex2var_ps(low, _mm512_add_epi32(order, _mm512_set1_epi32(8)), high);
  }
};

// A lookup has the numbers of 64 codes as bfloat16, which is half of fp32.
template <>
struct DotBf16::Levels<CodeKind::e4m3> {
  __m512i even, odd;  // bytes 0 and 2 of each lane, and bytes 1 and 3
  static Levels of(__m512i codes) {
    const __m512i low = _mm512_permutex2var_epi8(bytes_of_e4m3<0, 0>(), codes, bytes_of_e4m3<1, 0>());
    const __m512i size = _mm512_permutex2var_epi8(bytes_of_e4m3<0, 1>(), codes, bytes_of_e4m3<1, 1>());
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80)), low_bytes = _mm512_set1_epi16(0x00FF);
    const __m512i high = _mm512_ternarylogic_epi64(codes, sign, size, kAndOr);
    return {_mm512_ternarylogic_epi64(low, low_bytes, _mm512_slli_epi16(high, 8), kAndOr),
            _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_andnot_si512(low_bytes, high))};
  }
  F32 vector(int k) const {
    const __m512i words = k % 2 == 0 ? even : odd;
    return _mm512_castsi512_ps(k < 2 ? _mm512_slli_epi32(words, 16)
                                     : _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
