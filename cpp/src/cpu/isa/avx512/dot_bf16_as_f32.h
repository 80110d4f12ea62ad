// Multiplies bfloat16 as fp32, for few rows of x on processors with AMX. There vdpbf16ps takes as long as four
// multiply-adds of fp32, which multiply twice as many elements (measured on an Intel Xeon, Emerald Rapids), and tables
// of fp32 cost little more than those of bfloat16. dot_bf16.h is for processors where the instruction is faster.
#pragma once

#include <array>

#include "cpu/isa/avx512/dot_bf16.h"

namespace qlora_native::QLN_ISA {
namespace {

// The element of 32 whose code is a nibble of a 32-bit word.
constexpr int element_of(int nibble, int word) { return 8 * word + nibble / 2 * 2 + 1 - nibble % 2; }

// A chunk is that of DotBf16, and a step is what two chunks are as fp32. Its vectors 2b and 2b + 1 have the 32 elements
// of 16 bytes of 4-bit codes, which are four words of 32 bits: lane 4g + w has nibbles g and g + 4 of word w. So each
// vector belongs to one block of 32, and its indices are one shift of codes that a load broadcasts.
struct DotBf16AsF32 : DotBf16 {
  static F32 dot(F32 accumulator, F32 x, F32 w) { return fma(x, w, accumulator); }

  static constexpr int kStepVectors = 8;
  static constexpr bool kFewRows = true;
  struct Step {
    F32 v[kStepVectors];
    F32 vector(int k) const { return v[k]; }
  };
  static Step join(const Chunk (&chunk)[kStepChunks]) {
    struct Words {
      alignas(64) std::uint16_t word[32];
    };
    // The upper word of each lane is taken from the even elements, or from the odd ones after them; the lower is zero.
    static constexpr auto kWords = [] {
      std::array<Words, kStepVectors / kStepChunks> words{};
      for (int k = 0; k < kStepVectors / kStepChunks; ++k)
        for (int lane = 0; lane < kLanes; ++lane) {
          const int e = k / 2 * 32 + element_of(k % 2 * 4 + lane / 4, lane % 4);
          words[k].word[2 * lane + 1] = static_cast<std::uint16_t>(e / 2 + e % 2 * 32);
        }
      return words;
    }();
    Step step;
    for (int k = 0; k < kStepVectors; ++k) {
      const Chunk& from = chunk[k / 4];
      step.v[k] = _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi16(0xAAAAAAAA, _mm512_castps_si512(from.v[0]),
                                                                      _mm512_load_si512(kWords[k % 4].word),
                                                                      _mm512_castps_si512(from.v[1])));
    }
    return step;
  }

  template <int kScales>
  struct StepOfTables {
    const std::uint8_t* codes;
    F32 values[kStepChunks * kScales];  // of each block
    [[gnu::always_inline]] F32 vector(int k) const {
      const I32 index = _mm512_srlv_epi32(load_words_of_32(codes + k / 2 * 16), k % 2 == 0 ? shifts(0) : shifts(16));
      return _mm512_permutexvar_ps(index, values[k * kScales / 4]);
    }

   private:
    static I32 shifts(int first) {
      return _mm512_add_epi32(_mm512_set1_epi32(first),
                              _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    }
  };
  // Levels that are scaled, and rounded two vectors at a time.
  template <class Levels, int kScales, class Scales>
  struct StepOfLevels {
    Levels levels;
    Scales scales;
    [[gnu::always_inline]] F32 vector(int k) const {
      F32 pair[2], rounded[2];
      for (int half = 0; half < 2; ++half) {
        const F32 level = levels.vector(k / 2 * 2 + half);
        pair[half] = kScales == 4 ? of_two_blocks(scales, level, k / 2 * 2) : scales.of_block(level, k * kScales / 4);
      }
      round_words_apart(pair, rounded);
      return rounded[k % 2];
    }
  };
  // Levels as StepOfLevels takes them: lane i of vector j is the first element of a pair if i is even, and the second
  // if it is odd. An element of the pair is in lane i / 2 + j % 2 * 8 of the step's vector.
  struct NibbleLevels {
    const std::uint8_t* codes;
    F32 code;
    [[gnu::always_inline]] F32 vector(int j) const {
      const I32 twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
      const I32 shifts = _mm512_setr_epi32(0, 16, 0, 16, 0, 16, 0, 16, 4, 20, 4, 20, 4, 20, 4, 20);
      const I32 words = _mm512_permutexvar_epi32(twice, load_words_of_32(codes + j / 2 * 16));
      const I32 index = _mm512_srlv_epi32(words, _mm512_add_epi32(shifts, _mm512_set1_epi32(j % 2 * 8)));
      return _mm512_permutexvar_ps(index, code);
    }
  };
  template <CodeKind kCodes>
  struct ByteLevels {
    const std::uint8_t* codes;
    [[gnu::always_inline]] F32 vector(int j) const {
      const I32 bytes = _mm512_loadu_si512(codes + j / 4 * kChunk);
      if constexpr (kCodes == CodeKind::e4m3)
        return Levels<kCodes>::of(_mm512_permutexvar_epi8(order_of_bytes(), bytes)).vector(j % 4);
      // 2^23 + 128 + level, whose lowest byte is that of the level with its sign turned.
      const I32 index = _mm512_srli_epi32(order_of_bytes(), static_cast<unsigned>(j % 4 * 8));
      const I32 number = _mm512_mask_permutexvar_epi8(_mm512_set1_epi32(0x4B000000), 0x1111111111111111, index,
                                                      _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
      return add(as_f32(number), set1(-8388736.0f));
    }
  };

  template <int kScales, class Scales>
  using Step4 = std::conditional_t<kScales == 4, StepOfLevels<NibbleLevels, 4, Scales>, StepOfTables<kScales>>;
  template <int kScales, class Scales>
  [[gnu::always_inline]] static Step4<kScales, Scales> step4(const std::uint8_t* codes, Table16 code,
                                                             const Scales& scales) {
    if constexpr (kScales == 4) {
      return {{codes, code.level}, scales};
    } else {
      StepOfTables<kScales> step{codes, {}};
      for (int i = 0; i < kScales; ++i) {
        F32 two[2];
        values_of_two(code, scales + 2 * i, two);
        step.values[2 * i] = two[0];
        step.values[2 * i + 1] = two[1];
      }
      return step;
    }
  }
  template <CodeKind kCodes, int kScales, class Scales>
  using Step8 = StepOfLevels<ByteLevels<kCodes>, kScales, Scales>;
  template <CodeKind kCodes, int kScales, class Scales>
  static Step8<kCodes, kScales, Scales> step8(const std::uint8_t* codes, const Scales& scales) {
    return {{codes}, scales};
  }

 private:
  static I32 load_words_of_32(const std::uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Rounds two vectors. Of the 32 results rounded[0] has those with even numbers, and rounded[1] those with odd ones.
  static void round_words_apart(const F32 (&pair)[2], F32 (&rounded)[2]) {
    const I32 words = reinterpret_cast<I32>(_mm512_cvtne2ps_pbh(pair[1], pair[0]));
    rounded[0] = as_f32(_mm512_slli_epi32(words, 16));
    rounded[1] = as_f32(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
  // The values of two blocks. Their lanes alternate, so that one conversion rounds both.
  template <class Scales>
  static void values_of_two(Table16 code, const Scales& scales, F32 (&values)[2]) {
    F32 pair[2];
    for (int half = 0; half < 2; ++half) {
      const I32 twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      const F32 levels = _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8 * half)), code.level);
      pair[half] =
          Scales::kHasMinimum ? fma(levels, set2(scales.scale), set2(scales.minimum)) : mul(levels, set2(scales.scale));
    }
    round_words_apart(pair, values);
  }
  static F32 set2(const float* p) {
    double both;
    __builtin_memcpy(&both, p, sizeof(both));
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  // The values of levels in two blocks of 16: lanes 4i ... 4i + 3 are in the first one if i is even.
  template <class Scales>
  static F32 of_two_blocks(const Scales& scales, F32 levels, int block) {
    const auto lanes = [block](const float* p) {
      return _mm512_mask_broadcastss_ps(set1(p[block]), 0xF0F0, _mm_load_ss(p + block + 1));
    };
    if constexpr (Scales::kHasMinimum) return fma(levels, lanes(scales.scale), lanes(scales.minimum));
    return mul(levels, lanes(scales.scale));
  }
  // Lane i of pair[j % 2] of elements 32 * (j / 2) ... has its code in byte j.
  static I32 order_of_bytes() {
    struct Order {
      alignas(64) std::uint8_t byte[64];
    };
    static constexpr Order kOrder = [] {
      Order order{};
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j) {
          const int lane = j % 2 * 8 + i / 2;  // of the step's vectors
          order.byte[4 * i + j] = static_cast<std::uint8_t>(j / 2 * 32 + element_of(lane / 4 + i % 2 * 4, lane % 4));
        }
      return order;
    }();
    return _mm512_load_si512(kOrder.byte);
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
