// A dynamic map's quantizer for the moments of an optimizer: CodeSums.
#pragma once

#include "common/codebook.h"
#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

// A dynamic map's quantizer as one lookup and one addition, for a machine that looks up quickly in any table. Floats
// whose upper halves are the same, 2^16 of them, lie so close together that at most one midpoint is among them; an
// entry adds that midpoint up with their code, so that the lower half of a float carries into the code where it is
// above it:
//
//   code << 16 | 0xFFFF - lower half of the midpoint,   minus the floats' upper half, which the float brings along
//
// `code` is that of the least of them. Of negative numbers the complement is added, which ascends as they do.
template <bool kSigned>
struct CodeSums {
  // Nearer to 0 than the first midpoints (1.6e-7, or 2.75e-7 of the signed map): whatever is smaller counts as this.
  static constexpr float kSmallest = 0x1p-23f;
  // Up to the upper half of 1, which is also that of a rounding error beyond.
  static constexpr std::uint32_t kFirst = std::bit_cast<std::uint32_t>(kSmallest) >> 16;
  static constexpr std::uint32_t kCount = (std::bit_cast<std::uint32_t>(1.0f) >> 16) + 1 - kFirst;

  std::uint32_t of[(kSigned ? 2 : 1) * kCount];  // positive, then negative floats, away from 0

  constexpr CodeSums() : of{} {
    const auto& midpoints = kSigned ? kDynamicMidpoints : kUnsignedDynamicMidpoints;
    for (std::uint32_t negative = 0; negative < (kSigned ? 2 : 1); ++negative) {
      const auto least = [&](std::uint32_t cell) {  // of its floats
        const auto bits = negative ? (kFirst + cell) << 16 | 0x8000FFFFu : (kFirst + cell) << 16;
        return std::bit_cast<float>(bits);
      };
      std::uint32_t code = 0;  // ascending with the floats
      for (std::uint32_t i = 0; i < kCount; ++i) {
        const std::uint32_t cell = negative ? kCount - 1 - i : i;
        while (least(cell) > midpoints[code]) ++code;
        const std::uint32_t flip = negative ? 0xFFFFFFFFu : 0u;
        const std::uint32_t upper = std::bit_cast<std::uint32_t>(least(cell)) >> 16 & 0x7FFFu;
        const std::uint32_t midpoint = std::bit_cast<std::uint32_t>(midpoints[code]) & 0x7FFFFFFFu;
        const bool is_here = (midpoints[code] < 0.0f) == (negative == 1) && midpoint >> 16 == upper;
        const std::uint32_t lower = is_here ? (midpoint ^ flip) & 0xFFFFu : 0xFFFFu;
        of[negative * kCount + cell] = (code << 16) + (0xFFFFu - lower) - (((upper << 16) ^ flip) & 0xFFFF0000u);
      }
    }
  }
};

// The code of t, which lies in [-1, 1] up to a rounding error, is byte 2. NaN has the code of 0.
template <bool kSigned>
__device__ __forceinline__ std::uint32_t code_in_byte_2(const CodeSums<kSigned>& sums, float t) {
  using Sums = CodeSums<kSigned>;
  const auto bits = std::bit_cast<std::uint32_t>(fmaxf(kSigned ? fabsf(t) : t, Sums::kSmallest));
  // A shift would, together with the address, become three instructions.
  if constexpr (!kSigned) return sums.of[pick_bytes(bits, 0, 0x4432) - Sums::kFirst] + bits;
  const auto flip = static_cast<std::uint32_t>(std::bit_cast<std::int32_t>(t) >> 31);  // all bits of a negative number
  return sums.of[(bits >> 16) - Sums::kFirst + (flip & Sums::kCount)] + (bits ^ flip);
}

}  // namespace qlora_native::QLN_CUDA
