// Guards the quantizers of an optimizer's moments: each finds the level that a search of the map finds, for every float
// in the map's range. This test is compiled once for each instruction set that has its own quantizer; the scalar
// backend searches the map. Under an emulator, where this takes very long, it tests one batch in 61.
#include <bit>
#include <cstdio>
#include <cstdlib>

#include QLN_SIMD_HEADER  // with the Table256 of an instruction set

#include "cpu/optimizer/optimizer-inl.h"
#include "expect.h"

namespace qlora_native::QLN_ISA {
namespace {

// This is nearer to 0 than the first midpoints, 1.6e-7 and 2.75e-7, so smaller numbers have the code of 0.
constexpr float kSmallest = 0x1p-24f;

// This exceeds the largest level by a rounding error.
constexpr std::uint32_t kLast = std::bit_cast<std::uint32_t>(1.0f) + 4;

constexpr int kBatch = kTableVectors * kLanes;

std::uint32_t floats_from_batch_to_batch() {
  return std::getenv("QLN_TEST_EMULATED") == nullptr ? kBatch : 61 * kBatch;
}

bool has_feature() {
#if QLN_X86
  return __builtin_cpu_supports(QLN_FEATURE);
#else
  return true;
#endif
}

// Encodes as update_8bit() does, for a block whose largest element is 1.
template <bool kSigned>
void encode(const Encoder<kSigned>& encoder, const float* values, std::uint8_t* codes) {
  F32 t[kTableVectors], scaled[kTableVectors], number[kTableVectors];
  I32 rounded[kTableVectors], smallest = set1_i32(-1);
  for (int k = 0; k < kTableVectors; ++k) {
    t[k] = load(values + k * kLanes);
    scaled[k] = mul(t[k], set1(encoder.kNumber.kScale));
    number[k] = encoder.number(scaled[k]);
    rounded[k] = round_to_i32(number[k]);
    smallest = min_u16(smallest, rounded[k]);
  }
  encoder.store_nearest(rounded, scaled, codes);
  if (any_low_half_below(smallest, Encoder<kSigned>::kEdge)) encoder.store_exact(number, t, codes);
}

// Encodes sign * t for all floats t from kSmallest to kLast, in ascending order, and counts those whose code is not
// that of the nearest level (of the lower level for a tie). The number of a value's level is the number of exact
// midpoints below the value.
template <bool kSigned>
std::int64_t wrong_codes(float sign) {
  const std::array<float, 256>& map = kSigned ? kDynamicMap : kUnsignedDynamicMap;
  const auto midpoint = [&](int i) { return (double{map[i]} + double{map[i + 1]}) / 2.0; };
  const Encoder<kSigned> encoder;
  std::int64_t wrong = 0;
  int expected = 0;
  while (expected < 255 && sign * kSmallest > midpoint(expected)) ++expected;
  const std::uint32_t step = floats_from_batch_to_batch();
  for (std::uint32_t bits = std::bit_cast<std::uint32_t>(kSmallest); bits <= kLast; bits += step) {
    alignas(64) float values[kBatch];
    std::uint8_t codes[kBatch];
    for (int i = 0; i < kBatch; ++i) values[i] = sign * std::bit_cast<float>(std::min(bits + i, kLast));
    encode(encoder, values, codes);
    for (int i = 0; i < kBatch; ++i) {
      if (sign > 0.0f) {
        while (expected < 255 && values[i] > midpoint(expected)) ++expected;
      } else {
        while (expected > 0 && !(values[i] > midpoint(expected - 1))) --expected;
      }
      if (codes[i] != expected && ++wrong <= 5)
        std::printf("%a: expected code %d, got %d\n", values[i], expected, codes[i]);
    }
  }
  return wrong;
}

// Tests 0 and samples of the numbers between 0 and kSmallest, some of them subnormal.
template <bool kSigned>
std::int64_t wrong_codes_near_zero() {
  const Encoder<kSigned> encoder;
  std::int64_t wrong = 0;
  for (float t = kSmallest;; t /= 2.0f) {
    alignas(64) float values[kBatch];
    std::uint8_t codes[kBatch];
    for (int i = 0; i < kBatch; ++i) values[i] = kSigned && i % 2 == 1 ? -t : t;
    encode(encoder, values, codes);
    for (std::uint8_t code : codes) wrong += code != (kSigned ? 127 : 0);
    if (t == 0.0f) return wrong;
  }
}

}  // namespace
}  // namespace qlora_native::QLN_ISA

int main() {
  using namespace qlora_native::QLN_ISA;
  if (!has_feature()) return kSkipped;
  const std::int64_t wrong = wrong_codes<true>(1.0f) + wrong_codes<true>(-1.0f) + wrong_codes<false>(1.0f) +
                             wrong_codes_near_zero<true>() + wrong_codes_near_zero<false>();
  if (wrong > 0) std::printf("%lld wrong codes\n", static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
