// CodeTable quantizes the moments of an optimizer to a dynamic map.
#pragma once

#include "common/codebook.h"
#include "device/simt.cuh"

namespace qlora_native::QLN_CUDA {

// Quantizes by one lookup in shared memory and one addition.
//
// The upper 16 bits of a float choose an entry. The 2^16 floats with the same upper half form a cell. They lie so close
// together that at most one midpoint of the map is among them. The entry plus the bits of a float has the float's code
// in its upper half:
//
//   entry = (code << 16 | 0xFFFF - lower half of the midpoint) - (upper half of the cell's floats << 16)
//
// `code` is that of the smallest float of the cell. If the lower half of a float is above that of the midpoint, the
// addition carries into the code. For a negative number the complement of its bits is added, because that ascends with
// the number.
template <bool kSigned>
struct CodeTable {
  // Numbers nearer to 0 than this count as this. It is nearer to 0 than the first midpoints, which are 1.6e-7 and, of
  // the signed map, 2.75e-7.
  static constexpr float kSmallest = 0x1p-23f;
  // The entries end with the upper half of 1. A number that exceeds 1 by a rounding error has the same upper half.
  static constexpr std::uint32_t kFirst = std::bit_cast<std::uint32_t>(kSmallest) >> 16;
  static constexpr std::uint32_t kCount = (std::bit_cast<std::uint32_t>(1.0f) >> 16) + 1 - kFirst;

  std::uint32_t entries[(kSigned ? 2 : 1) * kCount];  // positive, then negative floats, away from 0

  constexpr CodeTable() : entries{} {
    const auto& midpoints = kSigned ? kDynamicMidpoints : kUnsignedDynamicMidpoints;
    for (std::uint32_t negative = 0; negative < (kSigned ? 2 : 1); ++negative) {
      const auto smallest = [&](std::uint32_t cell) {  // the smallest float of a cell
        const auto bits = negative ? (kFirst + cell) << 16 | 0x8000FFFFu : (kFirst + cell) << 16;
        return std::bit_cast<float>(bits);
      };
      std::uint32_t code = 0;  // the code ascends with the floats
      for (std::uint32_t i = 0; i < kCount; ++i) {
        const std::uint32_t cell = negative ? kCount - 1 - i : i;
        while (smallest(cell) > midpoints[code]) ++code;
        const std::uint32_t flip = negative ? 0xFFFFFFFFu : 0u;
        const std::uint32_t upper = std::bit_cast<std::uint32_t>(smallest(cell)) >> 16 & 0x7FFFu;
        const std::uint32_t midpoint = std::bit_cast<std::uint32_t>(midpoints[code]) & 0x7FFFFFFFu;
        const bool is_here = (midpoints[code] < 0.0f) == (negative == 1) && midpoint >> 16 == upper;
        const std::uint32_t lower = is_here ? (midpoint ^ flip) & 0xFFFFu : 0xFFFFu;
        entries[negative * kCount + cell] = (code << 16) + (0xFFFFu - lower) - (((upper << 16) ^ flip) & 0xFFFF0000u);
      }
    }
  }
};

// Byte 2 of the result is the code of t, which lies in [-1, 1] up to a rounding error. NaN has the code of 0.
template <bool kSigned>
__device__ __forceinline__ std::uint32_t code_in_byte_2(const CodeTable<kSigned>& table, float t) {
  using Table = CodeTable<kSigned>;
  const auto bits = std::bit_cast<std::uint32_t>(fmaxf(kSigned ? fabsf(t) : t, Table::kSmallest));
  // A shift instead of pick_bytes() would make the address three instructions.
  if constexpr (!kSigned) return table.entries[pick_bytes(bits, 0, 0x4432) - Table::kFirst] + bits;
  const auto flip = static_cast<std::uint32_t>(std::bit_cast<std::int32_t>(t) >> 31);  // all bits of a negative number
  return table.entries[(bits >> 16) - Table::kFirst + (flip & Table::kCount)] + (bits ^ flip);
}

}  // namespace qlora_native::QLN_CUDA
