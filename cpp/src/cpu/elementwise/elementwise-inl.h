// Gated activations, RMS norms and the rotation of positions. A task takes some rows, and reads and writes each element
// once (a norm reads them twice, the second time from the cache).
#pragma once

#include <cmath>
#include <utility>

#include "common/layout.h"
#include "cpu/isa/exp-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/runtime/parallel.h"
#include "qlora_native/attention.h"
#include "qlora_native/elementwise.h"

namespace qlora_native::QLN_ISA {
namespace {

// A task takes rows with about so many elements in all. That is tens of microseconds of work, beside which the cost of
// a call of the thread pool is negligible.
constexpr std::int64_t kTaskElements = 32768;

// Calls body(row) on the thread pool for each of `rows` rows of `cols` elements.
template <class Body>
void for_each_row(std::int64_t rows, std::int64_t cols, const Body& body) {
  const std::int64_t rows_per_task = larger<std::int64_t>(1, kTaskElements / cols);
  parallel_for(ceil_div(rows, rows_per_task), [&](std::int64_t task) {
    const std::int64_t end = smaller(rows, (task + 1) * rows_per_task);
    for (std::int64_t row = task * rows_per_task; row < end; ++row) body(row);
  });
}

template <class Pointer>
auto row_of(const BasicMatrix<Pointer>& matrix, std::int64_t row) {
  using Byte = std::conditional_t<std::is_same_v<Pointer, void*>, char, const char>;
  return static_cast<Byte*>(matrix.data) + row * matrix.stride * static_cast<std::int64_t>(size_of(matrix.dtype));
}

// Calls body(offset in bytes, lanes) for each vector of a row.
template <DType kType, class Body>
void for_each_vector(std::int64_t cols, const Body& body) {
  constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  std::int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) body(i * kSize, kLanes);
  if (i < cols) body(i * kSize, static_cast<int>(cols - i));
}

// ---- gated activations ----

struct ActivationOfVector {
  F32 value, derivative;
};

template <Activation kActivation>
ActivationOfVector activation_of(F32 x) {
  if constexpr (kActivation == Activation::silu) {
    const F32 s = sigmoid_of(x);
    const F32 value = mul(x, s);
    return {value, fma(value, add(set1(1.0f), mul(s, set1(-1.0f))), s)};  // s + x s (1 - s)
  } else {
    // (1 + tanh(z)) / 2 = sigmoid(2 z)
    constexpr float kTwoRootsOf2OverPi = 1.59576912f, kCubic = 0.044715f;
    const F32 square = mul(x, x);
    const F32 s = sigmoid_of(mul(mul(x, set1(kTwoRootsOf2OverPi)), fma(square, set1(kCubic), set1(1.0f))));
    const F32 value = mul(x, s);
    const F32 slope = mul(set1(kTwoRootsOf2OverPi), fma(square, set1(3.0f * kCubic), set1(1.0f)));
    return {value, fma(mul(value, add(set1(1.0f), mul(s, set1(-1.0f)))), slope, s)};
  }
}

// Calls f(activation), where the activation is a compile-time constant.
template <class F>
void with_activation(Activation activation, const F& f) {
  if (activation == Activation::silu)
    f(std::integral_constant<Activation, Activation::silu>());
  else
    f(std::integral_constant<Activation, Activation::gelu_tanh>());
}

inline void gated_activation_rows(const GatedActivationArgs& args, const Stream&) {
  with_dtype(args.gate.dtype, [&](auto dtype) {
    with_activation(args.activation, [&](auto activation) {
      constexpr DType kType = dtype();
      for_each_row(args.gate.rows, args.gate.cols, [&](std::int64_t row) {
        const char *gate = row_of(args.gate, row), *up = row_of(args.up, row);
        char* h = row_of(args.h, row);
        for_each_vector<kType>(args.gate.cols, [&](std::int64_t at, int lanes) {
          const F32 f = activation_of<activation()>(load_as_f32<kType>(gate + at, lanes)).value;
          store_from_f32<kType>(h + at, mul(f, load_as_f32<kType>(up + at, lanes)), lanes);
        });
      });
    });
  });
}

inline void gated_activation_backward_rows(const GatedActivationBackwardArgs& args, const Stream&) {
  with_dtype(args.gate.dtype, [&](auto dtype) {
    with_activation(args.activation, [&](auto activation) {
      constexpr DType kType = dtype();
      for_each_row(args.gate.rows, args.gate.cols, [&](std::int64_t row) {
        const char *gate = row_of(args.gate, row), *up = row_of(args.up, row), *dh = row_of(args.dh, row);
        char *dgate = row_of(args.dgate, row), *dup = row_of(args.dup, row);
        for_each_vector<kType>(args.gate.cols, [&](std::int64_t at, int lanes) {
          const ActivationOfVector f = activation_of<activation()>(load_as_f32<kType>(gate + at, lanes));
          const F32 gradient = load_as_f32<kType>(dh + at, lanes);
          const F32 gate_gradient = mul(mul(gradient, load_as_f32<kType>(up + at, lanes)), f.derivative);
          store_from_f32<kType>(dgate + at, gate_gradient, lanes);
          store_from_f32<kType>(dup + at, mul(gradient, f.value), lanes);
        });
      });
    });
  });
}

// ---- RMS norms ----

// Returns the sum of value(offset, lanes) over a row. There are four partial sums, so that their additions need
// not wait for each other.
template <DType kType, class Value>
float sum_of_row(std::int64_t cols, const Value& value) {
  constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  constexpr int kPartialSums = 4;
  F32 partial_sums[kPartialSums] = {zero(), zero(), zero(), zero()};
  std::int64_t i = 0;
  for (; i + kPartialSums * kLanes <= cols; i += kPartialSums * kLanes) {
    for (int k = 0; k < kPartialSums; ++k)
      partial_sums[k] = add(partial_sums[k], value((i + k * kLanes) * kSize, kLanes));
  }
  for (; i < cols; i += kLanes)
    partial_sums[0] = add(partial_sums[0], value(i * kSize, static_cast<int>(smaller<std::int64_t>(kLanes, cols - i))));
  return reduce_add(add(add(partial_sums[0], partial_sums[1]), add(partial_sums[2], partial_sums[3])));
}

inline void rms_norm_rows(const RmsNormArgs& args, const Stream&) {
  with_dtype(args.x.dtype, [&](auto dtype) {
    constexpr DType kType = dtype();
    const std::int64_t N = args.x.cols;
    const char* weight = static_cast<const char*>(args.weight);
    for_each_row(args.x.rows, N, [&](std::int64_t row) {
      const char* x = row_of(args.x, row);
      char* y = row_of(args.y, row);
      const float squares = sum_of_row<kType>(N, [&](std::int64_t at, int lanes) {
        const F32 value = load_as_f32<kType>(x + at, lanes);
        return mul(value, value);
      });
      const float r = 1.0f / std::sqrt(squares / static_cast<float>(N) + args.eps);
      args.r[row] = r;
      for_each_vector<kType>(N, [&](std::int64_t at, int lanes) {
        const F32 factor = add(load_as_f32<kType>(weight + at, lanes), set1(args.shift));
        store_from_f32<kType>(y + at, mul(mul(load_as_f32<kType>(x + at, lanes), set1(r)), factor), lanes);
      });
    });
  });
}

inline void rms_norm_backward_rows(const RmsNormBackwardArgs& args, const Stream&) {
  with_dtype(args.x.dtype, [&](auto dtype) {
    constexpr DType kType = dtype();
    const std::int64_t N = args.x.cols;
    const char* weight = static_cast<const char*>(args.weight);
    for_each_row(args.x.rows, N, [&](std::int64_t row) {
      const char *x = row_of(args.x, row), *dy = row_of(args.dy, row);
      char* dx = row_of(args.dx, row);
      const float r = args.r[row];
      const auto weighted = [&](std::int64_t at, int lanes) {
        const F32 factor = add(load_as_f32<kType>(weight + at, lanes), set1(args.shift));
        return mul(load_as_f32<kType>(dy + at, lanes), factor);
      };
      // x is multiplied by r first, because the square of a large r alone may be infinite.
      const auto normalized = [&](std::int64_t at, int lanes) {
        return mul(load_as_f32<kType>(x + at, lanes), set1(r));
      };
      const float along = sum_of_row<kType>(
          N, [&](std::int64_t at, int lanes) { return mul(normalized(at, lanes), weighted(at, lanes)); });
      const F32 mean = set1(-along / static_cast<float>(N));
      for_each_vector<kType>(N, [&](std::int64_t at, int lanes) {
        const F32 gradient = mul(fma(normalized(at, lanes), mean, weighted(at, lanes)), set1(r));
        store_from_f32<kType>(dx + at, gradient, lanes);
      });
    });
  });
}

// ---- rotation of positions ----

inline void rotate_rows(const RotaryArgs& args, const Stream&) {
  with_dtype(args.dtype, [&](auto dtype) {
    constexpr DType kType = dtype();
    constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
    const std::int64_t D = args.head_dim, half = D / 2 * kSize;
    for_each_row(args.batch * args.x.rows, larger<std::int64_t>(1, args.x.heads) * D, [&](std::int64_t token) {
      const std::int64_t b = token / args.x.rows, row = token % args.x.rows;
      const std::int64_t angles = (args.shared ? row : token) * D * kSize;
      const char *cos = static_cast<const char*>(args.cos) + angles, *sin = static_cast<const char*>(args.sin) + angles;
      const auto first = [&](const auto& x) { return (b * x.batch_stride + row * x.row_stride) * kSize; };
      const char* x = static_cast<const char*>(args.x.data) + first(args.x);
      char* y = static_cast<char*>(args.y.data) + first(args.y);
      const F32 sign = set1(args.transposed ? -1.0f : 1.0f);
      const char *sin1 = sin, *sin2 = sin + half;  // of x2 in y1, and of x1 in y2
      if (args.transposed) std::swap(sin1, sin2);
      for (std::int64_t h = 0; h < args.x.heads; ++h, x += args.x.head_stride * kSize, y += args.y.head_stride * kSize)
        for_each_vector<kType>(D / 2, [&](std::int64_t at, int lanes) {
          const auto of = [&](const char* p) { return load_as_f32<kType>(p + at, lanes); };
          const F32 x1 = of(x), x2 = of(x + half);
          const F32 minus = mul(mul(of(sin1), sign), set1(-1.0f));
          store_from_f32<kType>(y + at, fma(x2, minus, mul(x1, of(cos))), lanes);
          store_from_f32<kType>(y + half + at, fma(x1, mul(of(sin2), sign), mul(x2, of(cos + half))), lanes);
        });
    });
  });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
