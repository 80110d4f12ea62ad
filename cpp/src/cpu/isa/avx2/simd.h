// The primitives in AVX2, FMA and F16C. primitives-inl.h says what each of them means.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kLanes = 8;
using F32 = __m256;
using I32 = __m256i;

constexpr int kRegisters = 16;
// Twelve accumulators of a register tile, and what multiplies them, fill the sixteen registers.
constexpr int kMaxStripVectors = 3;
constexpr int kRowsOfStrip[kMaxStripVectors + 1] = {0, 8, 4, 4};
constexpr int kMaxStripRows = 6;
constexpr int kColumnStep = 2;
constexpr int kRowsOfDecodingStrip[kMaxStripVectors + 1] = {0, 8, 4, 4};
constexpr int kDecodingColumnStep = 2;

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 set1(float x) { return _mm256_set1_ps(x); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline F32 in_register(F32 x) {
  asm("" : "+x"(x));
  return x;
}
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F32 max_abs(F32 a, F32 b) { return max(abs(a), abs(b)); }
inline float reduce_max(F32 a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline float reduce_add(F32 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

inline void store_sums(float* p, const F32 (&a)[4]) {
  const F32 four = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
}

// The low half of each 32-bit lane, in order.
inline __m128i low_halves(I32 x) {
  const I32 in_order = _mm256_packus_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF)), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(in_order, 0b1000));
}

// x as bfloat16 in the upper half of each lane, rounded to nearest even. A quiet NaN stays one without its lower half.
inline I32 bf16_bits_high(F32 x) {
  const I32 bits = _mm256_castps_si256(x);
  const I32 odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I32 number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
  const I32 added = _mm256_and_si256(_mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)), number);
  return _mm256_add_epi32(bits, added);
}

template <DType kType>
inline F32 round_to(F32 x) {
  if constexpr (kType == DType::bf16)
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits_high(x), _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  else if constexpr (kType == DType::f16)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  else
    return x;
}

// Without a payload NaN has no carry from its lower half.
template <DType kType>
inline F32 round_value(F32 x) {
  if constexpr (kType != DType::bf16) return round_to<kType>(x);
  const I32 bits = _mm256_castps_si256(x);
  const I32 odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I32 rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline F32 canonical_nan(F32 x) {
  return _mm256_blendv_ps(x, set1(__builtin_nanf("")), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

inline I32 lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
// The first `count` bytes, up to 16, and zeros. To load a copy of them would wait until the copy is stored.
inline __m128i load_first_bytes(const void* p, int count) {
  const auto number_at = [&]<class Number>(Number number, int at) -> std::uint64_t {
    __builtin_memcpy(&number, static_cast<const char*>(p) + at, sizeof(number));
    return number;
  };
  // The first bytes and the last ones, which may have some in common.
  const auto first_and_last = [&]<class Number>(Number number, int bytes) {
    const int before = bytes - static_cast<int>(sizeof(number));
    return number_at(number, 0) | number_at(number, before) << 8 * before;
  };
  std::uint64_t low = 0, high = 0;
  if (count >= 8) {
    low = number_at(std::uint64_t(), 0);
    if (count > 8) high = number_at(std::uint64_t(), count - 8) >> 8 * (16 - count);
  } else if (count >= 4) {
    low = first_and_last(std::uint32_t(), count);
  } else if (count >= 2) {
    low = first_and_last(std::uint16_t(), count);
  } else if (count == 1) {
    low = number_at(std::uint8_t(), 0);
  }
  return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
}
// Stores the first 0 ... 7 of eight elements. A masked store takes tens of cycles on some processors.
inline void store_first(float* p, F32 x, int count) {
  __m128 rest = _mm256_castps256_ps128(x);
  if ((count & 4) != 0) {
    _mm_storeu_ps(p, rest);
    rest = _mm256_extractf128_ps(x, 1);
  }
  if ((count & 2) != 0) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p + (count & 4)), rest);
    rest = _mm_movehl_ps(rest, rest);
  }
  if ((count & 1) != 0) _mm_store_ss(p + (count & 6), rest);
}
inline void store_first(std::uint16_t* p, __m128i x, int count) {
  if ((count & 4) != 0) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), x);
    x = _mm_unpackhi_epi64(x, x);
  }
  if ((count & 2) != 0) {
    _mm_storeu_si32(p + (count & 4), x);
    x = _mm_srli_epi64(x, 32);
  }
  if ((count & 1) != 0) _mm_storeu_si16(p + (count & 6), x);
}

template <DType kType>
inline F32 halves_as_f32(__m128i halves) {
  if constexpr (kType == DType::f16)
    return _mm256_cvtph_ps(halves);
  else
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
template <DType kType>
inline F32 load_as_f32(const void* p) {
  if constexpr (kType == DType::f32)
    return _mm256_loadu_ps(static_cast<const float*>(p));
  else
    return halves_as_f32<kType>(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

template <DType kType>
inline F32 load_as_f32(const void* p, int count) {
  if (count == kLanes) return load_as_f32<kType>(p);
  if constexpr (kType == DType::f32) {
    const I32 first = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane_numbers());
    return _mm256_maskload_ps(static_cast<const float*>(p), first);
  } else {
    return halves_as_f32<kType>(load_first_bytes(p, 2 * count));
  }
}

template <DType kType>
inline void store_from_f32(void* p, F32 x, int count = kLanes) {
  if constexpr (kType == DType::f32) {
    if (count == kLanes) return _mm256_storeu_ps(static_cast<float*>(p), x);
    store_first(static_cast<float*>(p), x, count);
  } else {
    __m128i halves;
    if constexpr (kType == DType::f16)
      halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    else
      halves = low_halves(_mm256_srli_epi32(bf16_bits_high(x), 16));
    if (count == kLanes) return _mm_storeu_si128(static_cast<__m128i*>(p), halves);
    store_first(static_cast<std::uint16_t*>(p), halves, count);
  }
}

inline void deinterleave(F32 a, F32 b, F32& even, F32& odd) {
  const auto in_order = [](F32 x) {  // the middle two pairs of lanes change places
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0b11011000));
  };
  even = in_order(_mm256_shuffle_ps(a, b, 0b10001000));
  odd = in_order(_mm256_shuffle_ps(a, b, 0b11011101));
}
inline void interleave(F32 even, F32 odd, F32& a, F32& b) {
  const F32 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}

template <DType kType>
inline void load_pairs(const void* p, F32& even, F32& odd) {
  if constexpr (kType == DType::bf16) {
    const I32 pairs = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  } else {
    const char* bytes = static_cast<const char*>(p);
    deinterleave(load_as_f32<kType>(bytes), load_as_f32<kType>(bytes + kLanes * size_of(kType)), even, odd);
  }
}

inline void end_stream() { _mm_sfence(); }
template <bool kStream>
inline void store_vector(void* p, I32 x) {
  if constexpr (kStream)
    _mm256_stream_si256(static_cast<__m256i*>(p), x);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
}
template <DType kType, bool kStream>
inline void store_pairs(void* p, F32 even, F32 odd) {
  if constexpr (kType == DType::f32) {
    F32 a, b;
    interleave(even, odd, a, b);
    store_vector<kStream>(p, _mm256_castps_si256(a));
    store_vector<kStream>(static_cast<float*>(p) + kLanes, _mm256_castps_si256(b));
  } else if constexpr (kType == DType::f16) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m128i evens = _mm256_cvtps_ph(even, kNearest), odds = _mm256_cvtps_ph(odd, kNearest);
    store_vector<kStream>(p, _mm256_set_m128i(_mm_unpackhi_epi16(evens, odds), _mm_unpacklo_epi16(evens, odds)));
  } else {
    // Words of 16 bits: the high halves of either.
    const I32 low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
    store_vector<kStream>(p, _mm256_blend_epi16(low, _mm256_castps_si256(odd), 0xAA));
  }
}

inline void transpose(F32 (&a)[kLanes]) {
  F32 b[kLanes];
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0b01000100);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0b11101110);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0b01000100);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0b11101110);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) a[i] = b[i];
}

struct Table16 {
  F32 low, high;
};
inline Table16 table16(const float* levels) { return {load(levels), load(levels + kLanes)}; }
template <class F>
inline Table16 map_table(Table16 t, F&& f) {
  return {f(t.low), f(t.high)};
}
inline F32 lookup(Table16 t, I32 index) {
  const F32 bit3_as_sign = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                          bit3_as_sign);
}

struct Table32 {
  Table16 low, high;
};
inline Table32 table32(const float* values) { return {table16(values), table16(values + 2 * kLanes)}; }
inline F32 lookup(const Table32& t, I32 index) {
  const F32 bit4_as_sign = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27));
  return _mm256_blendv_ps(lookup(t.low, index), lookup(t.high, index), bit4_as_sign);
}

inline I32 load_bytes(const std::uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
template <int kBits>
inline I32 shift_left(I32 x) {
  return _mm256_slli_epi32(x, kBits);
}
template <int kBits>
inline I32 shift_right(I32 x) {
  return _mm256_srli_epi32(x, kBits);
}

constexpr int kNibbleVectors = 1;
using LevelTable = Table16;
template <DType kType>
inline LevelTable level_table(Table16 levels) {
  return map_table(levels, round_value<kType>);
}
inline I32 high_nibbles(const std::uint8_t* p) { return shift_right<4>(load_bytes(p)); }
inline I32 low_nibbles(const std::uint8_t* p) { return load_bytes(p); }  // the high ones do not matter
template <DType kType>
inline void lookup_nibbles(LevelTable t, I32 nibbles, F32 (&values)[kNibbleVectors]) {
  values[0] = lookup(t, nibbles);
}

inline F32 scales_of_16(const float* scales) { return set1(scales[0]); }

inline F32 bytes_as_f32(const std::uint8_t* p) { return _mm256_cvtepi32_ps(load_bytes(p)); }
inline F32 bytes_as_f32(const std::uint8_t* p, int count) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_first_bytes(p, count)));
}
inline F32 each_repeated(const float* from, int first, int shift, int count) {
  const I32 numbers = _mm256_add_epi32(lane_numbers(), _mm256_set1_epi32(first));
  const I32 index = _mm256_srl_epi32(numbers, _mm_cvtsi32_si128(shift));
  return _mm256_permutevar8x32_ps(load_as_f32<DType::f32>(from, ((first + count - 1) >> shift) + 1), index);
}
inline void load_signed_byte_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  const I32 pairs = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 24), 24));
  odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 24));
}

// The bits of E4M3, moved to those of fp16, are the number divided by 256. The conversion takes subnormal fp16 numbers
// for what they are, whatever the control register says.
inline void load_e4m3_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const auto value = [](__m128i high) {  // of the byte in the high half of each word; the shift copies the sign
    return _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(high, 1), _mm_set1_epi16(static_cast<short>(0xBF80))));
  };
  even = value(_mm_slli_epi16(pairs, 8));
  odd = value(pairs);
}

// --- Integers: indices and codes ---
inline I32 set1_i32(int x) { return _mm256_set1_epi32(x); }
inline I32 add_i32(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 as_i32(F32 a) { return _mm256_castps_si256(a); }
inline F32 as_f32(I32 a) { return _mm256_castsi256_ps(a); }
inline I32 max_i32(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
inline I32 min_u16(I32 a, I32 b) { return _mm256_min_epu16(a, b); }
inline bool any_low_half_below(I32 a, int limit) {
  const I32 low = _mm256_and_si256(a, _mm256_set1_epi32(0xFFFF));
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32(_mm256_set1_epi32(limit), low)) != 0;
}
inline int reduce_max_i32(I32 a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0b01001110));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0b10110001)));
}
inline I32 round_to_i32(F32 a) { return _mm256_cvtps_epi32(a); }
inline I32 add_where_above(I32 position, F32 t, F32 limit, int step) {
  const I32 above = as_i32(_mm256_cmp_ps(t, limit, _CMP_GT_OQ));
  return _mm256_add_epi32(position, _mm256_and_si256(above, _mm256_set1_epi32(step)));
}
inline F32 divide(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 square_root(F32 a) { return _mm256_sqrt_ps(a); }
inline I32 truncate_to_i32(F32 a) { return _mm256_cvttps_epi32(a); }
inline F32 with_sign_of(F32 a, F32 b) { return _mm256_or_ps(a, _mm256_and_ps(b, _mm256_set1_ps(-0.0f))); }
inline void store_bytes(std::uint8_t* p, I32 a) {
  const __m128i halves = low_halves(_mm256_and_si256(a, _mm256_set1_epi32(0xFF)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
inline void store_nibble_pairs(std::uint8_t* p, I32 even, I32 odd) {
  store_bytes(p, _mm256_or_si256(_mm256_slli_epi32(even, 4), odd));
}
inline void store_byte_pairs(std::uint8_t* p, I32 even, I32 odd) {
  const I32 pairs = _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi32(0xFF)), _mm256_slli_epi32(odd, 8));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(pairs));
}

inline std::uint32_t every_second_bit(std::uint64_t bits, int first) {
  return static_cast<std::uint32_t>(_pext_u64(bits, 0x5555555555555555ull >> (64 - 2 * kLanes) << first));
}
inline F32 mask_lanes(F32 x, std::uint32_t mask) {
  const I32 bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const I32 selected = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
  return _mm256_and_ps(x, as_f32(selected));
}
inline F32 blend_from(F32 a, F32 b, const std::uint8_t* element, int boundary) {
  const I32 below = _mm256_cmpgt_epi32(_mm256_set1_epi32(boundary), load_bytes(element));
  return _mm256_blendv_ps(b, a, as_f32(below));
}

constexpr int kTableVectors = 2;
struct Table256 {
  const float* values;
  explicit Table256(const float* all) : values(all) {}
};
// A gather would be no faster on Zen 4, and is far slower where its microcode was mended.
inline void lookup_bytes(const Table256& table, const std::uint8_t* bytes, F32 (&values)[kTableVectors],
                         int count = kTableVectors * kLanes) {
  std::uint8_t copy[kTableVectors * kLanes] = {};
  if (count < kTableVectors * kLanes) {
    __builtin_memcpy(copy, bytes, static_cast<std::size_t>(count));
    bytes = copy;
  }
  for (int k = 0; k < kTableVectors; ++k) {
    const auto at = [&](int i) { return table.values[bytes[k * kLanes + i]]; };
    values[k] = _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  }
}

struct Codes {
  I32 code[kTableVectors];
};
inline Codes pack(const I32 (&code)[kTableVectors]) { return {{code[0], code[1]}}; }
inline void lookup(const Table256& table, const Codes& codes, F32 (&values)[kTableVectors]) {
  std::uint8_t bytes[kTableVectors * kLanes];
  for (int k = 0; k < kTableVectors; ++k) store_bytes(bytes + k * kLanes, codes.code[k]);
  lookup_bytes(table, bytes, values);
}
inline void store_high_halves(std::uint8_t* p, const I32 (&x)[kTableVectors]) {
  for (int k = 0; k < kTableVectors; ++k) store_bytes(p + k * kLanes, shift_right<16>(x[k]));
}
inline void store_high_halves_around(std::uint8_t* p, int middle, const I32 (&x)[kTableVectors],
                                     const F32 (&sign)[kTableVectors]) {
  for (int k = 0; k < kTableVectors; ++k) {
    const I32 with_sign = _mm256_sign_epi32(shift_right<16>(x[k]), as_i32(sign[k]));
    const I32 code = _mm256_add_epi32(_mm256_set1_epi32(middle), with_sign);
    store_bytes(p + k * kLanes, _mm256_max_epi32(code, _mm256_setzero_si256()));
  }
}
inline void store_codes(std::uint8_t* p, const Codes& codes, const F32 (&t)[kTableVectors],
                        const F32 (&limit)[kTableVectors]) {
  for (int k = 0; k < kTableVectors; ++k)
    store_bytes(p + k * kLanes, add_where_above(codes.code[k], t[k], limit[k], 1));
}

constexpr int kLanes64 = 4;
using U64 = __m256i;
inline U64 set1_u64(std::uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
inline U64 add_u64(U64 a, U64 b) { return _mm256_add_epi64(a, b); }
inline U64 iota_u64() { return _mm256_setr_epi64x(0, 1, 2, 3); }
inline U64 mul_u32(U64 a, U64 b) { return _mm256_mul_epu32(a, b); }
inline U64 high_u32(U64 a) { return _mm256_srli_epi64(a, 32); }
inline U64 xor_u64(U64 a, U64 b) { return _mm256_xor_si256(a, b); }
inline std::uint64_t at_least_u16(U64 w0, U64 w1, U64 w2, U64 w3, std::uint32_t threshold) {
  const I32 limit = _mm256_set1_epi16(static_cast<short>(threshold));
  const I32 first = _mm256_blend_epi32(w0, _mm256_slli_epi64(w1, 32), 0xAA),
            last = _mm256_blend_epi32(w2, _mm256_slli_epi64(w3, 32), 0xAA);
  const auto reaches = [&](I32 numbers) { return _mm256_cmpeq_epi16(_mm256_max_epu16(numbers, limit), numbers); };
  // All eight numbers of a counter side by side, then a byte for each.
  const I32 even_counters = reaches(_mm256_unpacklo_epi64(first, last));
  const I32 odd_counters = reaches(_mm256_unpackhi_epi64(first, last));
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(even_counters, odd_counters)));
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
