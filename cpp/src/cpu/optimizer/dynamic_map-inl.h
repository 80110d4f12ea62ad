// The nearest level of an 8-bit dynamic map, by arithmetic.
#pragma once

#include <algorithm>

#include "common/codebook.h"

namespace qlora_native::QLN_ISA {
namespace {

// The closed form of a dynamic map's quantizer: a function of a value's size, rising, that reaches n at the midpoint
// between the levels n - 1 and n of one sign, so that the whole part of its result is the level's number.
//
// A decade's levels lie evenly, d apart in the decade that ends at b = 10^(i-6), 5 d in the next. At b, where a = 0 of
// a = (size - b) / d, the midpoints before it are a = ..., -2, -1, those after it 1, 5, 10, ...: with k the number of
// the one at 1, they are where k + min(a, (a - 1) / 3, a / 5) is whole. One item for each factor of four of the size,
// chosen by its highest byte, has room for one such b: k, and the line that is a. Below the first midpoint and above
// the last a line alone does. kScale puts the last midpoint where such a factor ends, and a millionth below: what a
// rounding carries across does not belong above.
//
// Midpoints and coefficients are rounded: within kUncertain of a whole number the result decides nothing.
template <bool kSigned>
struct DynamicMapNumber {
  static constexpr const std::array<float, 256>& kMidpoints = kSigned ? kDynamicMidpoints : kUnsignedDynamicMidpoints;
  static constexpr int kLast = kSigned ? 128 : 255, kFirstCode = kSigned ? 127 : 0;
  static constexpr double midpoint(int n) { return double{kMidpoints[kFirstCode + n - 1]} * double{kScale}; }

  static constexpr float kScale = static_cast<float>((2.0 + 2e-6) / double{kMidpoints[254]});
  static constexpr float kSmallest = 0x1p-29f;  // a size is at least this: of item 1
  static constexpr float kUncertain = 0x1p-13f;
  static constexpr float kThird = 1.0f / 3.0f, kFifth = 0.2f;

  // Of sizes times kScale in [kSmallest, 8), by the low four bits of the highest byte: [2, 8) is item 0, [0.5, 2) item
  // 15, and so on downwards. a = slope * size + intercept.
  float slope[16] = {}, intercept[16] = {}, k[16] = {};

  constexpr DynamicMapNumber() {
    const auto line = [&](int item, double line_slope, double from, double a, double number) {
      slope[item] = static_cast<float>(line_slope);
      intercept[item] = static_cast<float>(a - line_slope * from);
      k[item] = static_cast<float>(number);
    };
    // At its end the map is half a number above its last midpoint; k is beyond reach, so that the minimum is a.
    const double last = midpoint(kLast);
    line(0, 0.5 / (double{kScale} - last), last, -5.0, kLast + 5.0);
    double begin = 0.5;
    for (int item = 15; item > 0; --item, begin /= 4.0) {
      double b = kScale, levels = kSigned ? 64.0 : 128.0;  // the smallest b that is not below this item, or begins it
      while (b / 10.0 >= begin && levels > (kSigned ? 1.0 : 2.0)) {
        b /= 10.0;
        levels /= 2.0;
      }
      if (begin < midpoint(1)) {
        line(item, 0.2 / midpoint(1), midpoint(1), -7.0, 8.0);
      } else {
        const double d = 0.9 * b / levels;
        line(item, 1.0 / d, b, 0.0, kSigned ? 2.0 * levels : 2.0 * levels - 1.0);
      }
    }
  }

  constexpr double number(double size) const {
    int item = 0;
    for (double begin = 2.0; size < begin && item != 1; begin /= 4.0) item = item == 0 ? 15 : item - 1;
    const double a = double{slope[item]} * size + double{intercept[item]};
    return double{k[item]} + std::min(a, std::min((a - 1.0) * double{kThird}, a * double{kFifth}));
  }
  // Whether the statement above is true, with a margin of the same size for the roundings of its evaluation.
  constexpr bool is_exact() const {
    for (int n = 1; n <= kLast; ++n) {
      const double off = number(midpoint(n)) - n;
      if (off > double{kUncertain} / 2.0 || off < -double{kUncertain} / 2.0) return false;
    }
    int n = 0;  // where one item takes over from another
    for (double begin = 0x1p-29; begin <= 2.0; begin *= 4.0) {
      while (n < kLast && midpoint(n + 1) < begin) ++n;
      for (const double size : {begin, begin * (1.0 - 0x1p-40)})
        if (!(number(size) > n && number(size) < n + 1)) return false;
    }
    return number(kScale * (1.0 + 1e-6)) < kLast + 1;
  }
};
static_assert(DynamicMapNumber<true>().is_exact() && DynamicMapNumber<false>().is_exact());

}  // namespace
}  // namespace qlora_native::QLN_ISA
