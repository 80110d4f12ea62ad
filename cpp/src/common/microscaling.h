// The floating-point formats of 4 bits and of their scales: E2M1, whose blocks of 32 with E8M0 scales are MXFP4 (OCP
// Microscaling Formats v1.0, sections 5.3 and 5.4), and whose blocks of 16 with E4M3 scales are NVFP4.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.h"

namespace qlora_native {

inline constexpr int kMxfp4Blocksize = 32, kNvfp4Blocksize = 16;
inline constexpr float kLargestE2m1 = 6.0f, kLargestE4m3 = 448.0f;

// In the order of the code: bit 3 is the sign.
inline constexpr std::array<float, 16> kE2m1 = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                                -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// The nearest E2M1 number, a tie to the even code; beyond 6 it is 6.
constexpr std::uint8_t e2m1_from_f32(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const float size = std::bit_cast<float>(bits & 0x7FFFFFFF);
  const int code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) +
                   (size >= 3.5f) + (size > 5.0f);
  return static_cast<std::uint8_t>(code | (bits >> 31) << 3);
}

// E8M0: 2^(code - 127). 255 is NaN; code 0 is below fp32's normal numbers.
constexpr float f32_from_e8m0(std::uint8_t code) {
  if (code == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(code == 0 ? 0x00400000u : std::uint32_t{code} << 23);
}
// 1 / f32_from_e8m0(code), exactly: for the scales that MXFP4 quantizes to, of which none is above 2^125.
constexpr float inverse_of_e8m0(std::uint8_t code) { return std::bit_cast<float>((254u - code) << 23); }
// The scale of a block with this absmax: floor(log2(absmax)) - 2, where 2 is the largest exponent of E2M1
// (section 6.3). What is below E8M0's range, an all-zero block too, has its smallest scale.
constexpr std::uint8_t mxfp4_scale(float absmax) {
  const int exponent = static_cast<int>(std::bit_cast<std::uint32_t>(absmax) >> 23);  // biased, 0 below normal numbers
  return static_cast<std::uint8_t>(exponent < 2 ? 0 : exponent - 2);
}

// E4M3 without its sign, of which a scale has none: 7 is the bias, and 127 is NaN.
constexpr float f32_from_e4m3(std::uint8_t code) {
  if (code >= 127) return std::numeric_limits<float>::quiet_NaN();
  if (code < 8) return static_cast<float>(code) * 0x1p-9f;
  return std::bit_cast<float>((std::uint32_t{code} << 20) + (120u << 23));
}
// The nearest of a number in 0 ... 448, a tie to the even code.
constexpr std::uint8_t e4m3_from_f32(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (value >= 0x1p-6f) return static_cast<std::uint8_t>((bits - (120u << 23) + 0x7FFFF + (bits >> 20 & 1)) >> 20);
  // In the binade of 2^14 an fp32 step is 2^-9, E4M3's smallest, so this addition does the rounding.
  const float shifted = value + 0x1p14f;
  return static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(0x1p14f));
}

// NVFP4's scales are relative to one of the whole tensor, by which the largest of them is E4M3's largest. A tensor of
// tiny numbers, and one of zeros, keeps it among fp32's normal numbers.
constexpr float nvfp4_global_scale(float absmax) {
  const float scale = absmax / (kLargestE2m1 * kLargestE4m3);
  return scale > std::numeric_limits<float>::min() ? scale : std::numeric_limits<float>::min();
}
// The scale of a block with this absmax, never 0: what rounds to it has the smallest, an all-zero block has 1.
constexpr std::uint8_t nvfp4_scale(float absmax, float global_scale) {
  if (absmax == 0.0f) return e4m3_from_f32(1.0f);
  const float scale = absmax / (kLargestE2m1 * global_scale);
  const std::uint8_t code = e4m3_from_f32(scale < kLargestE4m3 ? scale : kLargestE4m3);
  return code == 0 ? std::uint8_t{1} : code;
}

// What a byte of the scales means, beside it for NVFP4 the tensor's scale. A byte that is no scale, which is one above
// E4M3's sign bit too, is NaN.
template <int kBlocksize>
constexpr float level_of_scale(std::uint8_t code, float global_scale) {
  if constexpr (kBlocksize == kMxfp4Blocksize) return f32_from_e8m0(code);
  return f32_from_e4m3(code) * global_scale;
}

// One block of `kBlocksize` elements: its scale's byte, and the codes, two in a byte, the first in the high half.
template <int kBlocksize>
constexpr std::uint8_t encode_block(const float (&w)[kBlocksize], float absmax, float global_scale,
                                    std::uint8_t (&codes)[kBlocksize / 2]) {
  if constexpr (kBlocksize == kMxfp4Blocksize) {
    const std::uint8_t scale = mxfp4_scale(absmax);
    const float inverse = inverse_of_e8m0(scale);
    for (int i = 0; i < kBlocksize / 2; ++i) {
      codes[i] =
          static_cast<std::uint8_t>(e2m1_from_f32(w[2 * i] * inverse) << 4 | e2m1_from_f32(w[2 * i + 1] * inverse));
    }
    return scale;
  } else {
    const std::uint8_t scale = nvfp4_scale(absmax, global_scale);
    const float divisor = level_of_scale<kBlocksize>(scale, global_scale);
    for (int i = 0; i < kBlocksize / 2; ++i) {
      codes[i] =
          static_cast<std::uint8_t>(e2m1_from_f32(w[2 * i] / divisor) << 4 | e2m1_from_f32(w[2 * i + 1] / divisor));
    }
    return scale;
  }
}

}  // namespace qlora_native
