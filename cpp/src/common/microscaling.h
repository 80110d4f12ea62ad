// MXFP4, NVFP4 and the floating-point formats that they consist of:
//
//   MXFP4   E2M1 elements in blocks of 32, with E8M0 scales (OCP Microscaling Formats v1.0, sections 5.3 and 5.4)
//   NVFP4   E2M1 elements in blocks of 16, with E4M3 scales
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

// The values in the order of their codes; bit 3 of a code is the sign.
inline constexpr std::array<float, 16> kE2m1 = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                                -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// The code of the nearest E2M1 number, of the even code if two are equally near. Values beyond 6 become 6.
constexpr std::uint8_t e2m1_from_f32(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const float size = std::bit_cast<float>(bits & 0x7FFFFFFF);
  const int code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) +
                   (size >= 3.5f) + (size > 5.0f);
  return static_cast<std::uint8_t>(code | (bits >> 31) << 3);
}

// E8M0 is 2^(code - 127). Code 255 is NaN; the value of code 0 is below fp32's normal numbers.
constexpr float f32_from_e8m0(std::uint8_t code) {
  if (code == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(code == 0 ? 0x00400000u : std::uint32_t{code} << 23);
}
// Exactly 1 / f32_from_e8m0(code), for the scales that MXFP4 quantizes to, none of which is above 2^125.
constexpr float inverse_of_e8m0(std::uint8_t code) { return std::bit_cast<float>((254u - code) << 23); }
// The scale of a block with this absmax has the exponent floor(log2(absmax)) - 2, where 2 is the largest exponent of
// E2M1 (section 6.3). A block whose scale would be below E8M0's range, also an all-zero block, has the smallest scale.
constexpr std::uint8_t mxfp4_scale(float absmax) {
  const int exponent = static_cast<int>(std::bit_cast<std::uint32_t>(absmax) >> 23);  // biased; 0 below normal numbers
  return static_cast<std::uint8_t>(exponent < 2 ? 0 : exponent - 2);
}

// E4M3 without a sign, because scales have none. The bias of the exponent is 7, and code 127 is NaN.
constexpr float f32_from_e4m3(std::uint8_t code) {
  if (code >= 127) return std::numeric_limits<float>::quiet_NaN();
  if (code < 8) return static_cast<float>(code) * 0x1p-9f;
  return std::bit_cast<float>((std::uint32_t{code} << 20) + (120u << 23));
}
// The code of the E4M3 number nearest to a value in 0 ... 448; the even code if two are equally near.
constexpr std::uint8_t e4m3_from_f32(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (value >= 0x1p-6f) return static_cast<std::uint8_t>((bits - (120u << 23) + 0x7FFFF + (bits >> 20 & 1)) >> 20);
  // From 2^14 on the fp32 numbers are 2^-9 apart, which is E4M3's smallest number, so this addition does the rounding.
  const float shifted = value + 0x1p14f;
  return static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(0x1p14f));
}

// The scales of NVFP4 are relative to a scale of the whole tensor, which makes the largest of them E4M3's largest
// number. For a tensor of tiny numbers or zeros, the tensor's scale is fp32's smallest normal number.
constexpr float nvfp4_global_scale(float absmax) {
  const float scale = absmax / (kLargestE2m1 * kLargestE4m3);
  return scale > std::numeric_limits<float>::min() ? scale : std::numeric_limits<float>::min();
}
// The scale of a block with this absmax. It is never 0: a scale that would round to 0 becomes the smallest, and an
// all-zero block has the scale 1.
constexpr std::uint8_t nvfp4_scale(float absmax, float global_scale) {
  if (absmax == 0.0f) return e4m3_from_f32(1.0f);
  const float scale = absmax / (kLargestE2m1 * global_scale);
  const std::uint8_t code = e4m3_from_f32(scale < kLargestE4m3 ? scale : kLargestE4m3);
  return code == 0 ? std::uint8_t{1} : code;
}

// The value of a scale's byte; for NVFP4 it includes the tensor's scale. A byte that is not a scale is NaN, and so is
// any byte with E4M3's sign bit.
template <int kBlocksize>
constexpr float level_of_scale(std::uint8_t code, float global_scale) {
  if constexpr (kBlocksize == kMxfp4Blocksize) return f32_from_e8m0(code);
  return f32_from_e4m3(code) * global_scale;
}

// Encodes a block of `kBlocksize` elements. Returns the byte of its scale, and writes the codes: two in a byte, the
// first in the high half.
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
