// Tables of 256 floats with AVX512_VBMI. They are stored as bytes, of which a register holds 64.
#pragma once

#include "cpu/isa/avx512/simd.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kTableVectors = 4;
struct Table256 {
  alignas(64) std::uint8_t byte[4][256];  // of each value, from the lowest
  explicit Table256(const float* values) {
    for (int i = 0; i < 256; ++i) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, values + i, sizeof(bits));
      for (int k = 0; k < 4; ++k) byte[k][i] = static_cast<std::uint8_t>(bits >> 8 * k);
    }
  }
};

// A transposition of four by four, which leads from the order of elements to that of lookup_lanes(), and back.
inline I32 lanes_to_order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }

// The indices are bytes. Bytes 4 k ... 4 k + 3 of each 128-bit lane are those of values[k].
inline void lookup_lanes(const Table256& table, I32 index, F32 (&values)[kTableVectors]) {
  const __mmask64 upper = _mm512_movepi8_mask(index);  // from 128 on
  I32 byte[4];
  for (int k = 0; k < 4; ++k) {
    const std::uint8_t* const part = table.byte[k];
    byte[k] = _mm512_mask_mov_epi8(
        _mm512_permutex2var_epi8(_mm512_load_si512(part), index, _mm512_load_si512(part + 64)), upper,
        _mm512_permutex2var_epi8(_mm512_load_si512(part + 128), index, _mm512_load_si512(part + 192)));
  }
  const I32 low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
  const I32 low23 = _mm512_unpacklo_epi8(byte[2], byte[3]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
  values[0] = as_f32(_mm512_unpacklo_epi16(low01, low23));
  values[1] = as_f32(_mm512_unpackhi_epi16(low01, low23));
  values[2] = as_f32(_mm512_unpacklo_epi16(high01, high23));
  values[3] = as_f32(_mm512_unpackhi_epi16(high01, high23));
}

inline void lookup_bytes(const Table256& table, const std::uint8_t* bytes, F32 (&values)[kTableVectors],
                         int count = kTableVectors * kLanes) {
  const I32 index = _mm512_maskz_loadu_epi8(~std::uint64_t{0} >> (kTableVectors * kLanes - count), bytes);
  lookup_lanes(table, _mm512_permutexvar_epi32(lanes_to_order(), index), values);
}

// Vectors of codes, packed as lookup_lanes() takes them.
struct Codes {
  I32 bytes;
};
inline Codes pack(const I32 (&code)[kTableVectors]) {
  return {_mm512_packus_epi16(_mm512_packus_epi32(code[0], code[1]), _mm512_packus_epi32(code[2], code[3]))};
}
inline void lookup(const Table256& table, Codes codes, F32 (&values)[kTableVectors]) {
  lookup_lanes(table, codes.bytes, values);
}
// Takes one byte of each lane, in the order of elements.
template <int kByte>
inline I32 bytes_of(const I32 (&x)[kTableVectors]) {
  const auto bytes_of_two = [](I32 a, I32 b) {
    // Bytes kByte, 4 + kByte, ... of the two side by side.
    const I32 lanes = _mm512_setr_epi32(0x0C080400, 0x1C181410, 0x2C282420, 0x3C383430, 0x4C484440, 0x5C585450,
                                        0x6C686460, 0x7C787470, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutex2var_epi8(a, _mm512_add_epi8(lanes, _mm512_set1_epi8(kByte)), b);
  };
  return _mm512_inserti64x4(bytes_of_two(x[0], x[1]), _mm512_castsi512_si256(bytes_of_two(x[2], x[3])), 1);
}
inline void store_high_halves(std::uint8_t* p, const I32 (&x)[kTableVectors]) {
  _mm512_storeu_si512(p, bytes_of<2>(x));
}
inline void store_high_halves_around(std::uint8_t* p, int middle, const I32 (&x)[kTableVectors],
                                     const F32 (&sign)[kTableVectors]) {
  const I32 signs[kTableVectors] = {as_i32(sign[0]), as_i32(sign[1]), as_i32(sign[2]), as_i32(sign[3])};
  const I32 number = bytes_of<2>(x), middles = _mm512_set1_epi8(static_cast<char>(middle));
  const __mmask64 negative = _mm512_movepi8_mask(bytes_of<3>(signs));
  const I32 above = _mm512_add_epi8(middles, number);
  _mm512_storeu_si512(p, _mm512_mask_subs_epu8(above, negative, middles, number));
}
inline void store_codes(std::uint8_t* p, Codes codes, const F32 (&t)[kTableVectors],
                        const F32 (&limit)[kTableVectors]) {
  const auto above = [&](int k) { return static_cast<__mmask64>(_mm512_cmp_ps_mask(t[k], limit[k], _CMP_GT_OQ)); };
  const __mmask64 all = _mm512_kunpackd(_mm512_kunpackw(above(3), above(2)), _mm512_kunpackw(above(1), above(0)));
  const I32 ordered = _mm512_permutexvar_epi32(lanes_to_order(), codes.bytes);
  _mm512_storeu_si512(p, _mm512_mask_add_epi8(ordered, all, ordered, _mm512_set1_epi8(1)));
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
