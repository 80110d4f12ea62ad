// Guards CodeTable, by which the CUDA kernels quantize an optimizer's moments: the codes agree with the midpoints of
// the map, for every float from half of the level nearest to 0 up to a rounding error beyond 1.
#include <cmath>
#include <cstdio>

#include "optimizer/code_table.cuh"

namespace qlora_native::cuda_emulated {
namespace {

template <bool kSigned>
std::int64_t wrong_codes(bool is_negative) {
  static constexpr CodeTable<kSigned> kSums;
  const std::array<float, 256>& map = kSigned ? kDynamicMap : kUnsignedDynamicMap;
  const auto midpoint = [&](int i) { return (double{map[i]} + double{map[i + 1]}) / 2.0; };
  const auto first = std::bit_cast<std::uint32_t>(CodeTable<kSigned>::kSmallest / 2.0f);
  const std::uint32_t last = std::bit_cast<std::uint32_t>(1.0f) + 4;
  std::int64_t wrong = 0;
  int expected = 0;
  for (std::uint32_t i = 0; i <= last - first; ++i) {  // t ascends
    const float t = is_negative ? -std::bit_cast<float>(last - i) : std::bit_cast<float>(first + i);
    while (expected < 255 && double{t} > midpoint(expected)) ++expected;  // a tie takes the lower level
    const int code = static_cast<int>(code_in_byte_2<kSigned>(kSums, t) >> 16 & 0xFF);
    if (code != expected && ++wrong <= 5) std::printf("%a: expected code %d, got %d\n", t, expected, code);
  }
  return wrong;
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() {
  using namespace qlora_native::cuda_emulated;
  static constexpr CodeTable<true> kSigned;
  static constexpr CodeTable<false> kUnsigned;
  std::int64_t wrong = wrong_codes<true>(false) + wrong_codes<true>(true) + wrong_codes<false>(false);
  for (const float t : {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-20f, -1e-20f, NAN, -NAN}) {
    const auto code1 = code_in_byte_2(kSigned, t) >> 16 & 0xFF, code2 = code_in_byte_2(kUnsigned, t) >> 16 & 0xFF;
    if (code1 == 127 && (code2 == 0)) continue;
    std::printf("%a: expected the codes of 0\n", t);
    ++wrong;
  }
  std::printf("%lld wrong codes\n", static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
