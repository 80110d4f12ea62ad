// What all algorithms share: ranges, and run-time values as template arguments.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

// Not std::min and std::max: the linker could hand their copies to a machine that lacks the instructions.
template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

// The numbers begin ... end-1.
struct Range {
  std::int64_t begin = 0, end = 0;
  std::int64_t count() const { return end - begin; }
};

// Calls f with the element type as a compile-time constant.
template <class F>
inline auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(std::integral_constant<DType, DType::bf16>{});
    case DType::f16:
      return f(std::integral_constant<DType, DType::f16>{});
    default:
      return f(std::integral_constant<DType, DType::f32>{});
  }
}

// Calls f with n, which is 1 ... kMax, as a compile-time constant.
template <int kMax, class F>
inline void with_constant(int n, F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((n == i + 1 ? f(std::integral_constant<int, i + 1>()) : void()), ...);
  }(std::make_integer_sequence<int, kMax>());
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
