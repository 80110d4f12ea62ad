// Tables of 256 floats with AVX512BW. They are stored as halves of 16 bits, of which a register holds 32.
#pragma once

#include "cpu/isa/avx512/simd.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kTableVectors = 2;
struct Table256 {
  alignas(64) std::uint16_t low[256], high[256];
  explicit Table256(const float* values) {
    for (int i = 0; i < 256; ++i) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, values + i, sizeof(bits));
      low[i] = static_cast<std::uint16_t>(bits);
      high[i] = static_cast<std::uint16_t>(bits >> 16);
    }
  }
};

inline I32 lookup_halves(const std::uint16_t* table, I32 index) {
  I32 part[4];  // by the low six bits, for each value of the upper two
  for (int i = 0; i < 4; ++i)
    part[i] =
        _mm512_permutex2var_epi16(_mm512_load_si512(table + 64 * i), index, _mm512_load_si512(table + 64 * i + 32));
  const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
  const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
  return _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(part[0], bit6, part[1]), bit7,
                               _mm512_mask_mov_epi16(part[2], bit6, part[3]));
}
// Each 128-bit lane of `words` has four indices of values[0] in its lower half, and four of values[1] in its upper
// half.
inline void lookup_words(const Table256& table, I32 words, F32 (&values)[kTableVectors]) {
  const I32 low = lookup_halves(table.low, words), high = lookup_halves(table.high, words);
  values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

inline void lookup_bytes(const Table256& table, const std::uint8_t* bytes, F32 (&values)[kTableVectors],
                         int count = kTableVectors * kLanes) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i loaded = _mm256_maskz_loadu_epi8(~std::uint32_t{0} >> (kTableVectors * kLanes - count), bytes);
  lookup_words(table, _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(loaded, order)), values);
}

// Vectors of codes, packed as lookup_words() takes them.
struct Codes {
  I32 words;
};
inline Codes pack(const I32 (&code)[kTableVectors]) { return {_mm512_packus_epi32(code[0], code[1])}; }
inline void lookup(const Table256& table, Codes codes, F32 (&values)[kTableVectors]) {
  lookup_words(table, codes.words, values);
}
inline void store_high_halves(std::uint8_t* p, const I32 (&x)[kTableVectors]) {
  for (int k = 0; k < kTableVectors; ++k) store_bytes(p + k * kLanes, shift_right<16>(x[k]));
}
inline void store_high_halves_around(std::uint8_t* p, int middle, const I32 (&x)[kTableVectors],
                                     const F32 (&sign)[kTableVectors]) {
  const I32 middles = _mm512_set1_epi32(middle);
  for (int k = 0; k < kTableVectors; ++k) {
    const I32 number = shift_right<16>(x[k]);
    const I32 above = _mm512_add_epi32(middles, number), below = _mm512_sub_epi32(middles, number);
    const I32 code = _mm512_mask_mov_epi32(above, _mm512_movepi32_mask(as_i32(sign[k])), below);
    store_bytes(p + k * kLanes, _mm512_max_epi32(code, _mm512_setzero_si512()));
  }
}
inline void store_codes(std::uint8_t* p, Codes codes, const F32 (&t)[kTableVectors],
                        const F32 (&limit)[kTableVectors]) {
  const I32 order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const I32 ordered = _mm512_permutexvar_epi64(order, codes.words);
  const auto above = [&](int k) { return static_cast<__mmask32>(_mm512_cmp_ps_mask(t[k], limit[k], _CMP_GT_OQ)); };
  const __mmask32 all = _mm512_kunpackw(above(1), above(0));
  const I32 sum = _mm512_mask_add_epi16(ordered, all, ordered, _mm512_set1_epi16(1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(sum));
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
