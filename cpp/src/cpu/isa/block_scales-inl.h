// From levels to values: level * scale, or level * scale + minimum in formats whose blocks have a minimum. With a
// minimum the product is exact in fp32 (types.h), so it does not matter that the sum is fused with it.
#pragma once

#include "cpu/isa/primitives-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// What a code is, before it is a level.
enum class CodeKind { nibbles, int8, e4m3 };
constexpr int bits_of(CodeKind kind) { return kind == CodeKind::nibbles ? 4 : 8; }

// The levels of 2 * kLanes adjacent bytes, the even ones and the odd ones. Those of E4M3 are divided by 256.
template <CodeKind kCodes>
[[gnu::always_inline]] inline void load_levels(const std::uint8_t* bytes, F32& even, F32& odd) {
  if constexpr (kCodes == CodeKind::e4m3)
    load_e4m3_pairs(bytes, even, odd);
  else
    load_signed_byte_pairs(bytes, even, odd);
}

// Scales of adjacent blocks, and their minima if they have some. The members turn levels into values.
template <bool kMinimum>
struct BlockScales {
  static constexpr bool kHasMinimum = kMinimum;
  const float *scale = nullptr, *minimum = nullptr;

  BlockScales operator+(std::int64_t blocks) const { return {scale + blocks, kMinimum ? minimum + blocks : nullptr}; }
  // All levels belong to one block.
  [[gnu::always_inline]] F32 of_block(F32 levels, int block) const {
    if constexpr (kMinimum) return fma(levels, set1(scale[block]), set1(minimum[block]));
    return mul(levels, set1(scale[block]));
  }
  // The levels are an even or an odd vector (dot_f32-inl.h), in blocks of 16 from `block` on.
  [[gnu::always_inline]] F32 of_blocks_of_16(F32 levels, int block) const {
    if constexpr (kMinimum) return fma(levels, scales_of_16(scale + block), scales_of_16(minimum + block));
    return mul(levels, scales_of_16(scale + block));
  }
  float of_level(float level, int block) const {
    return kMinimum ? __builtin_fmaf(level, scale[block], minimum[block]) : level * scale[block];
  }
};

// A codebook's values in one block.
template <class Scales>
[[gnu::always_inline]] inline Table16 values_of(const Table16& code, const Scales& scales, int block) {
  return map_table(code, [&](F32 levels) { return scales.of_block(levels, block); });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
