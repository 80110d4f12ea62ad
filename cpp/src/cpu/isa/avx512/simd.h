// The primitives in AVX-512 (F, BW, DQ, VL). primitives-inl.h says what each of them means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kLanes = 16;
using F32 = __m512;
using I32 = __m512i;

constexpr int kRegisters = 32;
// These register tiles were measured as the best of similar ones on Zen 4.
constexpr int kMaxStripVectors = 4;
constexpr int kRowsOfStrip[kMaxStripVectors + 1] = {0, 16, 8, 8, 4};
constexpr int kMaxStripRows = 6;
constexpr int kColumnStep = 4;
constexpr int kRowsOfDecodingStrip[kMaxStripVectors + 1] = {0, 16, 8, 4, 4};
constexpr int kDecodingColumnStep = 4;

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 set1(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 in_register(F32 x) {
  asm("" : "+v"(x));
  return x;
}
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
inline F32 max_abs(F32 a, F32 b) { return _mm512_range_ps(a, b, 0b1011); }
inline float reduce_max(F32 a) { return _mm512_reduce_max_ps(a); }

inline float reduce_add(F32 a) { return _mm512_reduce_add_ps(a); }

inline void store_sums(float* p, const F32 (&a)[4]) {
  const auto fold = [](F32 x, F32 y) { return add(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
  const __m512d x = _mm512_castps_pd(fold(a[0], a[1])), y = _mm512_castps_pd(fold(a[2], a[3]));
  const F32 four = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}

inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

// x as bfloat16 in the upper half of each lane, rounded to nearest even. A quiet NaN stays one without its lower half.
inline I32 bf16_bits_high(F32 x) {
  const I32 bits = _mm512_castps_si512(x);
  const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x00010000));
  const I32 rounded = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
}

template <DType kType>
inline F32 round_to(F32 x) {
  if constexpr (kType == DType::bf16)
    return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits_high(x), _mm512_set1_epi32(0xFFFF0000)));
  else if constexpr (kType == DType::f16)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  else
    return x;
}

// Without a payload NaN has no carry from its lower half.
template <DType kType>
inline F32 round_value(F32 x) {
  if constexpr (kType != DType::bf16) return round_to<kType>(x);
  const I32 bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x00010000));
  const I32 almost = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  const I32 rounded = _mm512_mask_add_epi32(almost, odd, almost, _mm512_set1_epi32(1));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(0xFFFF0000)));
}
inline F32 canonical_nan(F32 x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set1(__builtin_nanf("")));
}

template <DType kType>
inline F32 load_as_f32(const void* p) {
  if constexpr (kType == DType::f32)
    return _mm512_loadu_ps(p);
  else if constexpr (kType == DType::f16)
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  else
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
}

template <DType kType>
inline F32 load_as_f32(const void* p, int count) {
  const __mmask16 lanes = first_lanes(count);
  if constexpr (kType == DType::f32)
    return _mm512_maskz_loadu_ps(lanes, p);
  else if constexpr (kType == DType::f16)
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
  else
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

template <DType kType>
inline void store_from_f32(void* p, F32 x, int count = kLanes) {
  const __mmask16 lanes = first_lanes(count);
  if constexpr (kType == DType::f32)
    _mm512_mask_storeu_ps(p, lanes, x);
  else if constexpr (kType == DType::f16)
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  else
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits_high(x), 16)));
}

inline void deinterleave(F32 a, F32 b, F32& even, F32& odd) {
  const I32 evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, evens, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
}
inline void interleave(F32 even, F32 odd, F32& a, F32& b) {
  const I32 first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = _mm512_permutex2var_ps(even, first, odd);
  b = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
}

template <DType kType>
inline void load_pairs(const void* p, F32& even, F32& odd) {
  if constexpr (kType == DType::bf16) {
    const I32 pairs = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000)));
  } else {
    const char* bytes = static_cast<const char*>(p);
    deinterleave(load_as_f32<kType>(bytes), load_as_f32<kType>(bytes + kLanes * size_of(kType)), even, odd);
  }
}

inline void end_stream() { _mm_sfence(); }
template <bool kStream>
inline void store_vector(void* p, I32 x) {
  if constexpr (kStream)
    _mm512_stream_si512(static_cast<__m512i*>(p), x);
  else
    _mm512_storeu_si512(p, x);
}
template <DType kType, bool kStream>
inline void store_pairs(void* p, F32 even, F32 odd) {
  if constexpr (kType == DType::f32) {
    F32 a, b;
    interleave(even, odd, a, b);
    store_vector<kStream>(p, _mm512_castps_si512(a));
    store_vector<kStream>(static_cast<float*>(p) + kLanes, _mm512_castps_si512(b));
  } else {
    I32 low, high;
    if constexpr (kType == DType::bf16) {
      low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
      high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(0xFFFF0000));
    } else {
      constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(even, kNearest));
      high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_cvtps_ph(odd, kNearest)), 16);
    }
    store_vector<kStream>(p, _mm512_or_si512(low, high));
  }
}

inline void transpose(F32 (&a)[kLanes]) {
  F32 b[kLanes];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const auto lo = [](F32 x, F32 y) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto hi = [](F32 x, F32 y) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    a[i] = lo(b[i], b[i + 2]);
    a[i + 1] = hi(b[i], b[i + 2]);
    a[i + 2] = lo(b[i + 1], b[i + 3]);
    a[i + 3] = hi(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xDD);
    a[i + 4] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xDD);
  }
}

struct Table16 {
  F32 level;
};
inline Table16 table16(const float* levels) { return {_mm512_loadu_ps(levels)}; }
template <class F>
inline Table16 map_table(Table16 t, F&& f) {
  return {f(t.level)};
}
inline F32 lookup(Table16 t, I32 index) { return _mm512_permutexvar_ps(index, t.level); }

struct Table32 {
  F32 low, high;
};
inline Table32 table32(const float* values) { return {load(values), load(values + kLanes)}; }
inline F32 lookup(const Table32& t, I32 index) { return _mm512_permutex2var_ps(t.low, index, t.high); }

inline I32 load_bytes(const std::uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int kBits>
inline I32 shift_left(I32 x) {
  return _mm512_slli_epi32(x, kBits);
}
template <int kBits>
inline I32 shift_right(I32 x) {
  return _mm512_srli_epi32(x, kBits);
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

inline F32 scales_of_16(const float* scales) {
  return _mm512_mask_broadcastss_ps(set1(scales[0]), 0xFF00, _mm_load_ss(scales + 1));
}

inline F32 bytes_as_f32(const std::uint8_t* p) { return _mm512_cvtepi32_ps(load_bytes(p)); }
inline F32 bytes_as_f32(const std::uint8_t* p, int count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p)));
}
inline F32 each_repeated(const float* from, int first, int shift, int count) {
  const I32 lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const I32 index = _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(first)), _mm_cvtsi32_si128(shift));
  return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(first_lanes(((first + count - 1) >> shift) + 1), from));
}
inline void load_signed_byte_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  const I32 pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24));
  odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 24));
}

// The bits of E4M3, moved to those of fp16, are the number divided by 256. The conversion takes subnormal fp16 numbers
// for what they are, whatever the control register says.
inline void load_e4m3_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const auto value = [](__m256i high) {  // of the byte in the high half of each word; the shift copies the sign
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16(static_cast<short>(0xBF80))));
  };
  even = value(_mm256_slli_epi16(pairs, 8));
  odd = value(pairs);
}

// --- Integers: indices and codes ---
inline I32 set1_i32(int x) { return _mm512_set1_epi32(x); }
inline I32 add_i32(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 as_i32(F32 a) { return _mm512_castps_si512(a); }
inline F32 as_f32(I32 a) { return _mm512_castsi512_ps(a); }
inline I32 max_i32(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 min_u16(I32 a, I32 b) { return _mm512_min_epu16(a, b); }
inline bool any_low_half_below(I32 a, int limit) {
  const I32 low = _mm512_and_si512(a, _mm512_set1_epi32(0xFFFF));
  return _mm512_cmplt_epi32_mask(low, _mm512_set1_epi32(limit)) != 0;
}
inline int reduce_max_i32(I32 a) { return _mm512_reduce_max_epi32(a); }
inline I32 round_to_i32(F32 a) { return _mm512_cvtps_epi32(a); }
inline I32 add_where_above(I32 position, F32 t, F32 limit, int step) {
  return _mm512_mask_add_epi32(position, _mm512_cmp_ps_mask(t, limit, _CMP_GT_OQ), position, _mm512_set1_epi32(step));
}
inline F32 divide(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 square_root(F32 a) { return _mm512_sqrt_ps(a); }
inline I32 truncate_to_i32(F32 a) { return _mm512_cvttps_epi32(a); }
inline F32 with_sign_of(F32 a, F32 b) { return _mm512_or_ps(a, _mm512_and_ps(b, _mm512_set1_ps(-0.0f))); }
inline void store_bytes(std::uint8_t* p, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
inline void store_nibble_pairs(std::uint8_t* p, I32 even, I32 odd) {
  store_bytes(p, _mm512_or_si512(_mm512_slli_epi32(even, 4), odd));
}
inline void store_byte_pairs(std::uint8_t* p, I32 even, I32 odd) {
  const I32 pairs = _mm512_or_si512(_mm512_and_si512(even, _mm512_set1_epi32(0xFF)), _mm512_slli_epi32(odd, 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(pairs));
}

inline std::uint32_t every_second_bit(std::uint64_t bits, int first) {
  return static_cast<std::uint32_t>(_pext_u64(bits, 0x5555555555555555ull >> (64 - 2 * kLanes) << first));
}
inline F32 mask_lanes(F32 x, std::uint32_t mask) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), x); }
inline F32 blend_from(F32 a, F32 b, const std::uint8_t* element, int boundary) {
  return _mm512_mask_blend_ps(_mm512_cmpge_epi32_mask(load_bytes(element), _mm512_set1_epi32(boundary)), a, b);
}

constexpr int kLanes64 = 8;
using U64 = __m512i;
inline U64 set1_u64(std::uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
inline U64 add_u64(U64 a, U64 b) { return _mm512_add_epi64(a, b); }
inline U64 iota_u64() { return _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7); }
inline U64 mul_u32(U64 a, U64 b) { return _mm512_mul_epu32(a, b); }
inline U64 high_u32(U64 a) { return _mm512_srli_epi64(a, 32); }
inline U64 xor_u64(U64 a, U64 b) { return _mm512_xor_si512(a, b); }
inline std::uint64_t at_least_u16(U64 w0, U64 w1, U64 w2, U64 w3, std::uint32_t threshold) {
  const I32 limit = _mm512_set1_epi16(static_cast<short>(threshold));
  const __mmask32 low = _mm512_cmpge_epu16_mask(_mm512_mask_blend_epi32(0xAAAA, w0, _mm512_slli_epi64(w1, 32)), limit);
  const __mmask32 high = _mm512_cmpge_epu16_mask(_mm512_mask_blend_epi32(0xAAAA, w2, _mm512_slli_epi64(w3, 32)), limit);
  return _pdep_u64(low, 0x0F0F0F0F0F0F0F0Full) | _pdep_u64(high, 0xF0F0F0F0F0F0F0F0ull);
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
