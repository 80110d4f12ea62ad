// The exponential function for vectors, and functions that use it.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

// e^x for x <= 0, within 2 units in the last place; 0 below -88; NaN for NaN. It writes x = n * ln 2 + r with |r| <= ln
// 2 / 2 (Cody and Waite), and e^r as its series up to r^7, whose relative error is 5e-9.
inline F32 exp_of_negative(F32 x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 0x1.8p23f;  // the sum of n and this has n in its lowest bits
  x = max(set1(-88.0f), x);            // in this order, NaN stays
  const F32 shifted = fma(x, set1(kLog2E), set1(kRound));
  const F32 n = add(shifted, set1(-kRound));
  const F32 r = fma(n, set1(-kLn2Low), fma(n, set1(-kLn2High), x));
  F32 p = set1(1.0f / 5040.0f);
  for (const float coefficient : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
    p = fma(p, r, set1(coefficient));
  return mul(p, as_f32(shift_left<23>(add_i32(as_i32(shifted), set1_i32(127)))));  // 2^n; 0 for n = -127
}
// tanh(x) = sign(x) * (1 - 2 / (e^(2|x|) + 1)), written with e^(-2|x|).
inline F32 tanh_of(F32 x) {
  const F32 e = exp_of_negative(mul(abs(x), set1(-2.0f)));
  return with_sign_of(divide(add(set1(1.0f), mul(e, set1(-1.0f))), add(set1(1.0f), e)), x);
}
// 1 / (1 + e^-x) = n / (1 + e) with e = e^-|x|, and n = 1 for x >= 0, else n = e. It subtracts no nearly equal numbers,
// so for large negative x, too, it has the relative accuracy of e.
inline F32 sigmoid_of(F32 x) {
  const F32 e = exp_of_negative(mul(abs(x), set1(-1.0f)));
  const F32 is_positive = add(with_sign_of(set1(0.5f), x), set1(0.5f));
  const F32 numerator = fma(is_positive, add(set1(1.0f), mul(e, set1(-1.0f))), e);
  return divide(numerator, add(set1(1.0f), e));
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
