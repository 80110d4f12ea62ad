// Tables of 256 with AVX512BW: as halves of 16 bits, of which a register holds 32. See table_vbmi.h.
#pragma once

#include "cpu/avx512/simd.h"

namespace qlora_native {
namespace {

// A table of 256 floats, looked up for so many vectors of indices at a time.
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
// `words`: the indices of values[0] in the lower, those of values[1] in the upper half of each 128-bit lane, four and
// four.
inline void lookup_words(const Table256& table, I32 words, F32 (&values)[kTableVectors]) {
  const I32 low = lookup_halves(table.low, words), high = lookup_halves(table.high, words);
  values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

// The values at consecutive bytes.
inline void lookup_bytes(const Table256& table, const std::uint8_t* bytes, F32 (&values)[kTableVectors]) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  lookup_words(table, _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(loaded, order)), values);
}
// The values at the lanes of vectors of indices.
inline void lookup(const Table256& table, const I32 (&index)[kTableVectors], F32 (&values)[kTableVectors]) {
  lookup_words(table, _mm512_packus_epi32(index[0], index[1]), values);
}

}  // namespace
}  // namespace qlora_native
