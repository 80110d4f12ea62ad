// The primitives in Advanced SIMD, which every 64-bit Arm processor has. primitives-inl.h says what
// each of them means.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kLanes = 4;
using F32 = float32x4_t;
using I32 = int32x4_t;

constexpr int kRegisters = 32;
// A core with four pipes and multiply-adds of four cycles wants 16 accumulators of a register tile in flight. 24
// accumulators, the 3 or 4 vectors that they share and a unit fill the registers, and load the least for each
// multiply-add: 3 vectors and 8 units, or 4 and 6. No Arm machine has measured these tiles.
constexpr int kMaxStripVectors = 4;
constexpr int kRowsOfStrip[kMaxStripVectors + 1] = {0, 16, 8, 8, 4};
constexpr int kMaxStripRows = 6;
constexpr int kColumnStep = 4;
// Decoding takes half of the registers.
constexpr int kRowsOfDecodingStrip[kMaxStripVectors + 1] = {0, 16, 8, 4, 4};
constexpr int kDecodingColumnStep = 2;

inline F32 zero() { return vdupq_n_f32(0.0f); }
inline F32 set1(float x) { return vdupq_n_f32(x); }
inline F32 load(const float* p) { return vld1q_f32(p); }
inline F32 in_register(F32 x) {
  asm("" : "+w"(x));
  return x;
}
inline void store(float* p, F32 x) { vst1q_f32(p, x); }
inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
inline F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
inline F32 max(F32 a, F32 b) { return vmaxq_f32(a, b); }
inline F32 min(F32 a, F32 b) { return vminq_f32(a, b); }
inline F32 abs(F32 a) { return vabsq_f32(a); }
inline F32 max_abs(F32 a, F32 b) { return max(abs(a), abs(b)); }
inline float reduce_max(F32 a) { return vmaxvq_f32(a); }

inline float reduce_add(F32 a) { return vaddvq_f32(a); }

inline void store_sums(float* p, const F32 (&a)[4]) {
  store(p, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
}

// A register from anywhere, and to anywhere.
template <class Vector>
inline Vector load_from(const void* p) {
  Vector x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
template <class Vector>
inline void store_to(void* p, Vector x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

inline uint32x4_t bits_of(F32 x) { return vreinterpretq_u32_f32(x); }

// x as bfloat16 in the upper half of each lane, rounded to nearest even; NaN stays NaN.
inline uint32x4_t bf16_bits_high(F32 x) {
  const uint32x4_t bits = bits_of(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
  return vbslq_u32(vceqq_f32(x, x), rounded, quiet);
}

template <DType kType>
inline F32 round_to(F32 x) {
  if constexpr (kType == DType::bf16)
    return vreinterpretq_f32_u32(vandq_u32(bf16_bits_high(x), vdupq_n_u32(0xFFFF0000)));
  else if constexpr (kType == DType::f16)
    return vcvt_f32_f16(vcvt_f16_f32(x));
  else
    return x;
}

// To round a weight's value to bfloat16, 0x7FFF and the last bit that stays are added to its bits before the lower half
// is cut off. Without a payload NaN has no carry from its lower half.
inline uint32x4_t added_to_round(F32 value) {
  const uint32x4_t odd = vtstq_u32(bits_of(value), vdupq_n_u32(0x10000));  // -1
  return vsubq_u32(vdupq_n_u32(0x7FFF), odd);
}
template <DType kType>
inline F32 round_value(F32 x) {
  if constexpr (kType != DType::bf16) return round_to<kType>(x);
  const uint32x4_t rounded = vaddq_u32(bits_of(x), added_to_round(x));
  return vreinterpretq_f32_u32(vandq_u32(rounded, vdupq_n_u32(0xFFFF0000)));
}
inline F32 canonical_nan(F32 x) { return vbslq_f32(vceqq_f32(x, x), x, vdupq_n_f32(__builtin_nanf(""))); }

template <DType kType>
inline F32 load_as_f32(const void* p) {
  if constexpr (kType == DType::f32)
    return load_from<F32>(p);
  else if constexpr (kType == DType::f16)
    return vcvt_f32_f16(load_from<float16x4_t>(p));
  else
    return vreinterpretq_f32_u32(vshll_n_u16(load_from<uint16x4_t>(p), 16));
}

template <DType kType>
inline F32 load_as_f32(const void* p, int count) {
  if (count == kLanes) return load_as_f32<kType>(p);
  char copy[kLanes * size_of(kType)] = {};
  __builtin_memcpy(copy, p, static_cast<std::size_t>(count) * size_of(kType));
  return load_as_f32<kType>(copy);
}

template <DType kType>
inline void store_from_f32(void* p, F32 x, int count = kLanes) {
  const auto store_first = [&](auto elements) {
    if (count == kLanes) return store_to(p, elements);
    __builtin_memcpy(p, &elements, static_cast<std::size_t>(count) * size_of(kType));
  };
  if constexpr (kType == DType::f32)
    store_first(x);
  else if constexpr (kType == DType::f16)
    store_first(vcvt_f16_f32(x));
  else
    store_first(vshrn_n_u32(bf16_bits_high(x), 16));
}

inline void deinterleave(F32 a, F32 b, F32& even, F32& odd) {
  even = vuzp1q_f32(a, b);
  odd = vuzp2q_f32(a, b);
}
inline void interleave(F32 even, F32 odd, F32& a, F32& b) {
  a = vzip1q_f32(even, odd);
  b = vzip2q_f32(even, odd);
}

template <DType kType>
inline void load_pairs(const void* p, F32& even, F32& odd) {
  if constexpr (kType == DType::bf16) {
    const uint32x4_t pairs = load_from<uint32x4_t>(p);
    even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000)));
  } else {
    const char* bytes = static_cast<const char*>(p);
    deinterleave(load_as_f32<kType>(bytes), load_as_f32<kType>(bytes + kLanes * size_of(kType)), even, odd);
  }
}

// No store is non-temporal: there is no intrinsic for it, and these processors see for themselves that whole lines are
// written.
inline void end_stream() {}
template <DType kType, bool kStream>
inline void store_pairs(void* p, F32 even, F32 odd) {
  if constexpr (kType == DType::f32) {
    F32 a, b;
    interleave(even, odd, a, b);
    store_to(p, a);
    store_to(static_cast<char*>(p) + sizeof(a), b);
  } else if constexpr (kType == DType::f16) {
    const float16x4_t evens = vcvt_f16_f32(even), odds = vcvt_f16_f32(odd);
    const uint16x4_t low = vreinterpret_u16_f16(evens), high = vreinterpret_u16_f16(odds);
    store_to(p, vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high)));
  } else {
    store_to(p, vsriq_n_u32(bits_of(odd), bits_of(even), 16));  // the high halves of either
  }
}

inline void transpose(F32 (&a)[kLanes]) {
  const float64x2_t b0 = vreinterpretq_f64_f32(vtrn1q_f32(a[0], a[1]));
  const float64x2_t b1 = vreinterpretq_f64_f32(vtrn2q_f32(a[0], a[1]));
  const float64x2_t b2 = vreinterpretq_f64_f32(vtrn1q_f32(a[2], a[3]));
  const float64x2_t b3 = vreinterpretq_f64_f32(vtrn2q_f32(a[2], a[3]));
  a[0] = vreinterpretq_f32_f64(vtrn1q_f64(b0, b2));
  a[1] = vreinterpretq_f32_f64(vtrn1q_f64(b1, b3));
  a[2] = vreinterpretq_f32_f64(vtrn2q_f64(b0, b2));
  a[3] = vreinterpretq_f32_f64(vtrn2q_f64(b1, b3));
}

// Functions take it by reference: GCC 14 at -O3 overwrites a float that is passed in the register after such four.
struct Table16 {
  F32 level[4];
};
inline Table16 table16(const float* levels) {
  return {{load(levels), load(levels + 4), load(levels + 8), load(levels + 12)}};
}
template <class F>
[[gnu::always_inline]] inline Table16 map_table(const Table16& t, F&& f) {
  return {{f(t.level[0]), f(t.level[1]), f(t.level[2]), f(t.level[3])}};
}
// Where each lane's four bytes are in a table of floats, of which there are kCount.
template <int kCount>
inline uint8x16_t bytes_of_floats(I32 index) {
  const uint32x4_t number = vandq_u32(vreinterpretq_u32_s32(index), vdupq_n_u32(kCount - 1));
  return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), number, vdupq_n_u32(0x04040404)));
}
inline uint8x16x4_t bytes_of_table(const Table16& t) {
  return {{vreinterpretq_u8_f32(t.level[0]), vreinterpretq_u8_f32(t.level[1]), vreinterpretq_u8_f32(t.level[2]),
           vreinterpretq_u8_f32(t.level[3])}};
}
inline F32 lookup(const Table16& t, I32 index) {
  return vreinterpretq_f32_u8(vqtbl4q_u8(bytes_of_table(t), bytes_of_floats<16>(index)));
}

struct Table32 {
  Table16 low, high;
};
inline Table32 table32(const float* values) { return {table16(values), table16(values + 16)}; }
inline F32 lookup(const Table32& t, I32 index) {
  const uint8x16_t bytes = bytes_of_floats<32>(index);  // beyond a table the first lookup gives 0, the second nothing
  const uint8x16_t from_low = vqtbl4q_u8(bytes_of_table(t.low), bytes);
  return vreinterpretq_f32_u8(vqtbx4q_u8(from_low, bytes_of_table(t.high), vsubq_u8(bytes, vdupq_n_u8(64))));
}

inline I32 load_bytes(const std::uint8_t* p) {
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(load_from<std::uint32_t>(p)));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
template <int kBits>
inline I32 shift_left(I32 x) {
  return vshlq_n_s32(x, kBits);
}
template <int kBits>
inline I32 shift_right(I32 x) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), kBits));
}

// A lookup (tbl) takes a byte for each of 16 indices from a register. So a table is the levels' first bytes in one
// register, their second ones in another, and so on; what 16 codes select from each is put together by interleaving:
//
//   byte[0]  a0 b0 c0 d0 ...      a0 a1 b0 b1 ...
//   byte[1]  a1 b1 c1 d1 ...                         a0 a1 a2 a3 b0 b1 b2 b3 ...    4 vectors of 4 floats
//   byte[2]  a2 b2 c2 d2 ...      a2 a3 b2 b3 ...
//   byte[3]  a3 b3 c3 d3 ...
//
// That is four lookups and eight interleavings for 16 weights. Levels that are rounded to bfloat16 have two bytes of
// zeros, and take half of the lookups.
constexpr int kNibbleVectors = 4;
struct LevelTable {
  uint8x16_t byte[4];
};
template <DType kType>
[[gnu::always_inline]] inline LevelTable level_table(const Table16& levels) {
  LevelTable table{};
  const auto put_apart = [&](int first, uint16x8_t words0, uint16x8_t words1) {
    const uint8x16_t bytes0 = vreinterpretq_u8_u16(words0), bytes1 = vreinterpretq_u8_u16(words1);
    table.byte[first] = vuzp1q_u8(bytes0, bytes1);
    table.byte[first + 1] = vuzp2q_u8(bytes0, bytes1);
  };
  if constexpr (kType == DType::bf16) {
    const auto rounded = [&](int i) {
      const F32 value = levels.level[i], next = levels.level[i + 1];
      return vaddhn_high_u32(vaddhn_u32(bits_of(value), added_to_round(value)), bits_of(next), added_to_round(next));
    };
    put_apart(2, rounded(0), rounded(2));
  } else {
    const Table16 rounded = map_table(levels, round_value<kType>);
    const auto words = [&](int i) { return vreinterpretq_u16_f32(rounded.level[i]); };
    put_apart(0, vuzp1q_u16(words(0), words(1)), vuzp1q_u16(words(2), words(3)));
    put_apart(2, vuzp2q_u16(words(0), words(1)), vuzp2q_u16(words(2), words(3)));
  }
  return table;
}
inline uint8x16_t high_nibbles(const std::uint8_t* p) { return vshrq_n_u8(load_from<uint8x16_t>(p), 4); }
inline uint8x16_t low_nibbles(const std::uint8_t* p) { return vandq_u8(load_from<uint8x16_t>(p), vdupq_n_u8(15)); }

// The 16-bit parts of 16 values, 8 and 8, whose bytes two tables hold.
inline uint16x8_t first_words(uint8x16_t low, uint8x16_t high) { return vreinterpretq_u16_u8(vzip1q_u8(low, high)); }
inline uint16x8_t last_words(uint8x16_t low, uint8x16_t high) { return vreinterpretq_u16_u8(vzip2q_u8(low, high)); }

inline F32 scales_of_16(const float* scales) { return set1(scales[0]); }

template <DType kType>
[[gnu::always_inline]] inline void lookup_nibbles(const LevelTable& t, uint8x16_t nibbles,
                                                  F32 (&values)[kNibbleVectors]) {
  const auto bytes = [&](int i) { return vqtbl1q_u8(t.byte[i], nibbles); };
  const uint16x8_t high[2] = {first_words(bytes(2), bytes(3)), last_words(bytes(2), bytes(3))};
  uint16x8_t low[2] = {vdupq_n_u16(0), vdupq_n_u16(0)};
  if constexpr (kType != DType::bf16) {
    low[0] = first_words(bytes(0), bytes(1));
    low[1] = last_words(bytes(0), bytes(1));
  }
  for (int i = 0; i < 2; ++i) {
    values[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(low[i], high[i]));
    values[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[i], high[i]));
  }
}

inline F32 bytes_as_f32(const std::uint8_t* p) { return vcvtq_f32_s32(load_bytes(p)); }
inline F32 bytes_as_f32(const std::uint8_t* p, int count) {
  if (count == kLanes) return bytes_as_f32(p);
  std::uint8_t copy[kLanes] = {};
  __builtin_memcpy(copy, p, static_cast<std::size_t>(count));
  return bytes_as_f32(copy);
}
inline F32 each_repeated(const float* from, int first, int shift, int count) {
  float each[kLanes] = {};
  for (int i = 0; i < count; ++i) each[i] = from[(first + i) >> shift];
  return load(each);
}
inline void load_signed_byte_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  const I32 pairs = vreinterpretq_s32_s16(vmovl_s8(load_from<int8x8_t>(p)));
  even = vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(pairs, 16), 16));
  odd = vcvtq_f32_s32(vshrq_n_s32(pairs, 16));
}

// The bits of E4M3, moved to those of fp16, are the number divided by 256.
inline void load_e4m3_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  const int16x4_t pairs = load_from<int16x4_t>(p);
  const auto value = [](int16x4_t high) {  // of the byte in the high half of each word; the shift copies the sign
    return vcvt_f32_f16(
        vreinterpret_f16_s16(vand_s16(vshr_n_s16(high, 1), vdup_n_s16(static_cast<std::int16_t>(0xBF80)))));
  };
  even = value(vshl_n_s16(pairs, 8));
  odd = value(pairs);
}

// --- Integers: indices and codes ---
inline I32 set1_i32(int x) { return vdupq_n_s32(x); }
inline I32 add_i32(I32 a, I32 b) { return vaddq_s32(a, b); }
inline I32 as_i32(F32 a) { return vreinterpretq_s32_f32(a); }
inline F32 as_f32(I32 a) { return vreinterpretq_f32_s32(a); }
inline I32 max_i32(I32 a, I32 b) { return vmaxq_s32(a, b); }
inline I32 min_u16(I32 a, I32 b) {
  return vreinterpretq_s32_u16(vminq_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b)));
}
inline bool any_low_half_below(I32 a, int limit) { return vminvq_s32(vandq_s32(a, vdupq_n_s32(0xFFFF))) < limit; }
inline int reduce_max_i32(I32 a) { return vmaxvq_s32(a); }
inline I32 round_to_i32(F32 a) { return vcvtnq_s32_f32(a); }
inline I32 add_where_above(I32 position, F32 t, F32 limit, int step) {
  return vaddq_s32(position, vandq_s32(vreinterpretq_s32_u32(vcgtq_f32(t, limit)), vdupq_n_s32(step)));
}
inline F32 divide(F32 a, F32 b) { return vdivq_f32(a, b); }
inline F32 square_root(F32 a) { return vsqrtq_f32(a); }
inline I32 truncate_to_i32(F32 a) { return vcvtq_s32_f32(a); }
inline F32 with_sign_of(F32 a, F32 b) { return vbslq_f32(vdupq_n_u32(0x80000000), b, a); }
inline void store_bytes(std::uint8_t* p, I32 a) {
  const int16x4_t halves = vmovn_s32(a);
  const std::uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
}
inline void store_nibble_pairs(std::uint8_t* p, I32 even, I32 odd) { store_bytes(p, vsliq_n_s32(odd, even, 4)); }
inline void store_byte_pairs(std::uint8_t* p, I32 even, I32 odd) { store_to(p, vmovn_s32(vsliq_n_s32(even, odd, 8))); }

inline std::uint32_t every_second_bit(std::uint64_t bits, int first) {
  auto x = static_cast<std::uint32_t>(bits >> first) & 0x55;
  x = (x | x >> 1) & 0x33;
  return (x | x >> 2) & 0x0F;
}
inline F32 mask_lanes(F32 x, std::uint32_t mask) {
  const uint32x4_t selected = vtstq_u32(vdupq_n_u32(mask), uint32x4_t{1, 2, 4, 8});
  return vreinterpretq_f32_u32(vandq_u32(bits_of(x), selected));
}
inline F32 blend_from(F32 a, F32 b, const std::uint8_t* element, int boundary) {
  return vbslq_f32(vcgeq_s32(load_bytes(element), vdupq_n_s32(boundary)), b, a);
}

constexpr int kTableVectors = 4;
struct Table256 {
  const float* values;
  explicit Table256(const float* all) : values(all) {}
};
// One value after the other: a lookup of bytes in all of the table would take sixteen instructions of four registers
// each for four vectors.
inline void lookup_bytes(const Table256& table, const std::uint8_t* bytes, F32 (&values)[kTableVectors],
                         int count = kTableVectors * kLanes) {
  std::uint8_t copy[kTableVectors * kLanes] = {};
  if (count < kTableVectors * kLanes) {
    __builtin_memcpy(copy, bytes, static_cast<std::size_t>(count));
    bytes = copy;
  }
  for (int k = 0; k < kTableVectors; ++k) {
    const auto at = [&](int i) { return table.values[bytes[k * kLanes + i]]; };
    values[k] = F32{at(0), at(1), at(2), at(3)};
  }
}

// The lowest bytes of the lanes, in order.
inline uint8x16_t lowest_bytes(const I32 (&x)[kTableVectors]) {
  const auto words = [&](int i) { return vreinterpretq_u16_s32(x[i]); };
  return vuzp1q_u8(vreinterpretq_u8_u16(vuzp1q_u16(words(0), words(1))),
                   vreinterpretq_u8_u16(vuzp1q_u16(words(2), words(3))));
}
struct Codes {
  I32 code[kTableVectors];
};
inline Codes pack(const I32 (&code)[kTableVectors]) { return {{code[0], code[1], code[2], code[3]}}; }
inline void lookup(const Table256& table, const Codes& codes, F32 (&values)[kTableVectors]) {
  for (int k = 0; k < kTableVectors; ++k) {
    const I32 code = codes.code[k];
    values[k] = F32{table.values[vgetq_lane_s32(code, 0)], table.values[vgetq_lane_s32(code, 1)],
                    table.values[vgetq_lane_s32(code, 2)], table.values[vgetq_lane_s32(code, 3)]};
  }
}
inline void store_high_halves(std::uint8_t* p, const I32 (&x)[kTableVectors]) {
  const I32 numbers[kTableVectors] = {shift_right<16>(x[0]), shift_right<16>(x[1]), shift_right<16>(x[2]),
                                      shift_right<16>(x[3])};
  store_to(p, lowest_bytes(numbers));
}
inline void store_high_halves_around(std::uint8_t* p, int middle, const I32 (&x)[kTableVectors],
                                     const F32 (&sign)[kTableVectors]) {
  I32 code[kTableVectors];
  for (int k = 0; k < kTableVectors; ++k) {
    const I32 number = shift_right<16>(x[k]), negative = vshrq_n_s32(as_i32(sign[k]), 31);
    const I32 with_sign = vsubq_s32(veorq_s32(number, negative), negative);
    code[k] = vmaxq_s32(vaddq_s32(vdupq_n_s32(middle), with_sign), vdupq_n_s32(0));
  }
  store_to(p, lowest_bytes(code));
}
inline void store_codes(std::uint8_t* p, const Codes& codes, const F32 (&t)[kTableVectors],
                        const F32 (&limit)[kTableVectors]) {
  I32 code[kTableVectors];
  for (int k = 0; k < kTableVectors; ++k) code[k] = add_where_above(codes.code[k], t[k], limit[k], 1);
  store_to(p, lowest_bytes(code));
}

constexpr int kLanes64 = 2;
using U64 = uint64x2_t;
inline U64 set1_u64(std::uint64_t x) { return vdupq_n_u64(x); }
inline U64 add_u64(U64 a, U64 b) { return vaddq_u64(a, b); }
inline U64 iota_u64() { return U64{0, 1}; }
inline U64 mul_u32(U64 a, U64 b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
inline U64 high_u32(U64 a) { return vshrq_n_u64(a, 32); }
inline U64 xor_u64(U64 a, U64 b) { return veorq_u64(a, b); }
inline std::uint64_t at_least_u16(U64 w0, U64 w1, U64 w2, U64 w3, std::uint32_t threshold) {
  const U64 first = vsliq_n_u64(w0, w1, 32), last = vsliq_n_u64(w2, w3, 32);
  const uint16x8_t limit = vdupq_n_u16(static_cast<std::uint16_t>(threshold));
  const auto bits = [&](U64 numbers) -> std::uint64_t {
    const uint8x8_t reached = vmovn_u16(vcgeq_u16(vreinterpretq_u16_u64(numbers), limit));
    return vaddv_u8(vand_u8(reached, uint8x8_t{1, 2, 4, 8, 16, 32, 64, 128}));
  };
  return bits(vtrn1q_u64(first, last)) | bits(vtrn2q_u64(first, last)) << 8;
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
