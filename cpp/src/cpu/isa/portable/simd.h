// The primitives of tile products in plain C++, on any machine: sixteen lanes, as AVX-512 has. primitives-inl.h
// says what each of them means.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/float16.h"
#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kLanes = 16;
struct F32 {
  float lane[kLanes];
};
struct I32 {
  std::int32_t lane[kLanes];
};

// No register tile of vectors is multiplied here, but the products, which have both, name them.
constexpr int kRegisters = 32;
constexpr int kMaxStripVectors = 3;
constexpr int kRowsOfStrip[kMaxStripVectors + 1] = {0, 1, 1, 1};
constexpr int kMaxStripRows = 6;
constexpr int kColumnStep = 2;
constexpr int kDecodingColumnStep = 2;
constexpr int kRowsOfDecodingStrip[kMaxStripVectors + 1] = {0, 1, 1, 1};

// A vector whose lane i is f(i).
template <class Vector = F32, class F>
inline Vector each_lane(F&& f) {
  Vector result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
  return result;
}

inline F32 set1(float x) {
  return each_lane([&](int) { return x; });
}
inline F32 zero() { return set1(0.0f); }
inline F32 load(const float* p) {
  F32 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline F32 add(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F32 mul(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F32 fma(F32 a, F32 b, F32 c) {
  return each_lane([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}

inline F32 max(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32 min(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32 abs(F32 a) {
  return each_lane([&](int i) { return std::fabs(a.lane[i]); });
}
inline F32 divide(F32 a, F32 b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F32 with_sign_of(F32 a, F32 b) {
  return each_lane([&](int i) { return std::copysign(a.lane[i], b.lane[i]); });
}
inline float reduce_max(F32 a) {
  float largest = a.lane[0];
  for (int i = 1; i < kLanes; ++i) largest = a.lane[i] > largest ? a.lane[i] : largest;
  return largest;
}
inline float reduce_add(F32 a) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  return a.lane[0];
}
inline I32 as_i32(F32 a) { return std::bit_cast<I32>(a); }
inline F32 as_f32(I32 a) { return std::bit_cast<F32>(a); }
inline I32 set1_i32(int x) {
  return each_lane<I32>([&](int) { return x; });
}
inline I32 add_i32(I32 a, I32 b) {  // modulo 2^32
  return each_lane<I32>([&](int i) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.lane[i]) + static_cast<std::uint32_t>(b.lane[i]));
  });
}
template <int kBits>
inline I32 shift_left(I32 a) {
  return each_lane<I32>(
      [&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.lane[i]) << kBits); });
}

template <DType kType>
inline float round_lane(float x) {
  if constexpr (kType == DType::bf16) return f32_from_bf16(bf16_from_f32(x));
  if constexpr (kType == DType::f16) return f32_from_f16(f16_from_f32(x));
  return x;
}
template <DType kType>
inline F32 round_to(F32 x) {
  return each_lane([&](int i) { return round_lane<kType>(x.lane[i]); });
}

template <DType kType>
inline F32 round_value(F32 x) {
  return round_to<kType>(x);
}
inline F32 canonical_nan(F32 x) {
  return each_lane([&](int i) { return x.lane[i] == x.lane[i] ? x.lane[i] : __builtin_nanf(""); });
}

template <DType kType>
inline float load_lane(const void* p, int i) {
  if constexpr (kType == DType::f32) {
    float x;
    __builtin_memcpy(&x, static_cast<const char*>(p) + 4 * i, sizeof(x));
    return x;
  } else {
    std::uint16_t bits;
    __builtin_memcpy(&bits, static_cast<const char*>(p) + 2 * i, sizeof(bits));
    return kType == DType::bf16 ? f32_from_bf16(bits) : f32_from_f16(bits);
  }
}
template <DType kType>
inline F32 load_as_f32(const void* p, int count = kLanes) {
  return each_lane([&](int i) { return i < count ? load_lane<kType>(p, i) : 0.0f; });
}
template <DType kType>
inline void store_from_f32(void* p, F32 x, int count = kLanes) {
  for (int i = 0; i < count; ++i) {
    char* to = static_cast<char*>(p) + i * static_cast<int>(size_of(kType));
    if constexpr (kType == DType::f32) {
      __builtin_memcpy(to, &x.lane[i], sizeof(float));
    } else {
      const std::uint16_t bits = kType == DType::bf16 ? bf16_from_f32(x.lane[i]) : f16_from_f32(x.lane[i]);
      __builtin_memcpy(to, &bits, sizeof(bits));
    }
  }
}

inline void interleave(F32 even, F32 odd, F32& a, F32& b) {
  const auto at = [&](int i) { return i % 2 == 0 ? even.lane[i / 2] : odd.lane[i / 2]; };
  a = each_lane(at);
  b = each_lane([&](int i) { return at(kLanes + i); });
}
template <DType kType>
inline void load_pairs(const void* p, F32& even, F32& odd) {
  even = each_lane([&](int i) { return load_lane<kType>(p, 2 * i); });
  odd = each_lane([&](int i) { return load_lane<kType>(p, 2 * i + 1); });
}

// Plain C++ has no non-temporal stores.
inline void end_stream() {}
template <DType kType, bool>
inline void store_pairs(void* p, F32 even, F32 odd) {
  F32 a, b;
  interleave(even, odd, a, b);
  store_from_f32<kType>(p, a);
  store_from_f32<kType>(static_cast<char*>(p) + kLanes * size_of(kType), b);
}

inline void transpose(F32 (&a)[kLanes]) {
  F32 b[kLanes];
  for (int i = 0; i < kLanes; ++i) b[i] = each_lane([&](int j) { return a[j].lane[i]; });
  for (int i = 0; i < kLanes; ++i) a[i] = b[i];
}

struct Table16 {
  float level[16];
};
inline Table16 table16(const float* levels) {
  Table16 t;
  __builtin_memcpy(&t, levels, sizeof(t));
  return t;
}
template <class F>
inline Table16 map_table(Table16 t, F&& f) {
  const F32 mapped = f(load(t.level));
  return table16(mapped.lane);
}
constexpr int kNibbleVectors = 1;
using LevelTable = Table16;
template <DType kType>
inline LevelTable level_table(Table16 levels) {
  return map_table(levels, round_value<kType>);
}
inline I32 high_nibbles(const std::uint8_t* p) {
  return each_lane<I32>([&](int i) { return p[i] >> 4; });
}
inline I32 low_nibbles(const std::uint8_t* p) {
  return each_lane<I32>([&](int i) { return p[i] & 15; });
}
template <DType>
inline void lookup_nibbles(LevelTable t, I32 nibbles, F32 (&values)[kNibbleVectors]) {
  values[0] = each_lane([&](int i) { return t.level[nibbles.lane[i]]; });
}
inline F32 scales_of_16(const float* scales) {
  return each_lane([&](int i) { return scales[i / 8]; });
}
inline F32 bytes_as_f32(const std::uint8_t* p, int count = kLanes) {
  return each_lane([&](int i) { return i < count ? static_cast<float>(p[i]) : 0.0f; });
}
inline F32 each_repeated(const float* from, int first, int shift, int count) {
  return each_lane([&](int i) { return i < count ? from[(first + i) >> shift] : 0.0f; });
}
inline void load_signed_byte_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  const auto value = [&](int i) { return static_cast<float>(static_cast<std::int8_t>(p[i])); };
  even = each_lane([&](int i) { return value(2 * i); });
  odd = each_lane([&](int i) { return value(2 * i + 1); });
}

// The bits of E4M3, moved to those of fp16, are the number divided by 256.
inline float e4m3_over_256(std::uint8_t byte) {
  return f32_from_f16(static_cast<std::uint16_t>((byte & 0x80) << 8 | (byte & 0x7F) << 7));
}
inline void load_e4m3_pairs(const std::uint8_t* p, F32& even, F32& odd) {
  even = each_lane([&](int i) { return e4m3_over_256(p[2 * i]); });
  odd = each_lane([&](int i) { return e4m3_over_256(p[2 * i + 1]); });
}

inline F32 mask_lanes(F32 x, std::uint32_t mask) {
  return each_lane([&](int i) { return mask >> i & 1 ? x.lane[i] : 0.0f; });
}
inline F32 blend_from(F32 a, F32 b, const std::uint8_t* element, int boundary) {
  return each_lane([&](int i) { return element[i] >= boundary ? b.lane[i] : a.lane[i]; });
}
inline std::uint32_t every_second_bit(std::uint64_t bits, int first) {
  std::uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result |= static_cast<std::uint32_t>(bits >> (2 * i + first) & 1) << i;
  return result;
}

constexpr int kTableVectors = 1;
struct Table256 {
  const float* values;
  explicit Table256(const float* all) : values(all) {}
};
inline void lookup_bytes(const Table256& table, const std::uint8_t* bytes, F32 (&values)[kTableVectors],
                         int count = kLanes) {
  values[0] = each_lane([&](int i) { return table.values[i < count ? bytes[i] : 0]; });
}

constexpr int kLanes64 = 8;
struct U64 {
  std::uint64_t lane[kLanes64];
};
template <class F>
inline U64 each_lane64(F&& f) {
  U64 result;
  for (int i = 0; i < kLanes64; ++i) result.lane[i] = f(i);
  return result;
}
inline U64 set1_u64(std::uint64_t x) {
  return each_lane64([&](int) { return x; });
}
inline U64 add_u64(U64 a, U64 b) {
  return each_lane64([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline U64 iota_u64() {
  return each_lane64([](int i) { return static_cast<std::uint64_t>(i); });
}
inline U64 high_u32(U64 a) {
  return each_lane64([&](int i) { return a.lane[i] >> 32; });
}
inline U64 mul_u32(U64 a, U64 b) {
  return each_lane64([&](int i) { return (a.lane[i] & 0xFFFFFFFFu) * (b.lane[i] & 0xFFFFFFFFu); });
}
inline U64 xor_u64(U64 a, U64 b) {
  return each_lane64([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline std::uint64_t at_least_u16(U64 w0, U64 w1, U64 w2, U64 w3, std::uint32_t threshold) {
  std::uint64_t bits = 0;
  for (int i = 0; i < kLanes64; ++i) {
    const std::uint64_t words[4] = {w0.lane[i], w1.lane[i], w2.lane[i], w3.lane[i]};
    for (int k = 0; k < 8; ++k)
      bits |= std::uint64_t{(words[k / 2] >> (16 * (k % 2)) & 0xFFFF) >= threshold} << (8 * i + k);
  }
  return bits;
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
