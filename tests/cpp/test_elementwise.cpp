// Guards gated activations and RMS norms of the instruction set in use: they are near their definition in float64.
// ctest runs this test once for each instruction set.
//
// A result is rounded once to its dtype. Before that, its fp32 arithmetic may be off by kUnits units in the last place,
// times a factor: the size of the argument of an exponential, or the root of the length of a sum.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "expect.h"
#include "isa_is_here.h"
#include "pool.h"
#include "qlora_native/qlora_native.h"
#include "tensor.h"

namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kUnits = 8.0;
// Exponentials below about e^-88 are computed as 0 (exp-inl.h).
constexpr double kMinExponential = 1e-38;

struct Shape {
  std::int64_t rows, N, gap;
};
// The shapes have no rows; less than a vector of any instruction set, exactly one, and one element more; several
// vectors and a rest; and several rows in a task.
constexpr Shape kShapes[] = {{0, 5, 0},  {3, 1, 0},   {3, 3, 2},    {2, 8, 0},    {4, 16, 3},
                             {3, 17, 0}, {5, 100, 0}, {70, 577, 7}, {3, 4096, 0}, {2, 40001, 1}};

// The largest error of any value, divided by the error that is allowed for it.
class Worst {
 public:
  void see(double actual, double expected, DType dtype, double allowed) {
    const double off = std::fabs(actual - expected);
    const double ratio = off / (unit_roundoff(dtype) * std::fabs(expected) + allowed + smallest_normal(dtype));
    worst_ = std::max(worst_, std::isnan(ratio) ? INFINITY : ratio);
  }
  double value() const { return worst_; }

 private:
  double worst_ = 0.0;
};

struct Function {
  double value, derivative;
  double error_of_value, error_of_derivative;  // bounds of the errors in fp32 arithmetic
};

// Follows the definition in elementwise.h. Both activations are x s with s = 1 / (1 + e^-a), where a is x or, for
// gelu_tanh, a polynomial in x.
Function function_of(qn::Activation activation, double x) {
  constexpr double kTwoRoots = 2.0 * 0.79788456080286536, kCubic = 0.044715;
  const bool silu = activation == qn::Activation::silu;
  const double a = silu ? x : kTwoRoots * (x + kCubic * x * x * x);
  const double slope = silu ? 1.0 : kTwoRoots * (1.0 + 3.0 * kCubic * x * x);
  const double s = 1.0 / (1.0 + std::exp(-a)), rest = 1.0 / (1.0 + std::exp(a));
  const double curved = x * s * rest * slope;
  // An absolute error of the argument becomes a relative error of the exponential.
  const double units = kUnits * kUnit * (1.0 + std::fabs(a));
  const double floor = kMinExponential * std::fabs(x);
  return {x * s, s + curved, units * std::fabs(x * s) + floor,
          units * (s + std::fabs(curved)) + kUnits * kUnit * std::fabs(x * s * slope) + floor * slope};
}

TEST(gated_activation_and_its_gradients_are_those_of_float64) {
  for (const qn::Activation activation : {qn::Activation::silu, qn::Activation::gelu_tanh})
    for (const DType dtype : kDTypes)
      for (const Shape& shape : kShapes) {
        Random random(static_cast<std::uint64_t>(shape.N));
        Tensor gate(dtype, shape.rows, shape.N, shape.gap), up(dtype, shape.rows, shape.N, 2 * shape.gap);
        Tensor dh(dtype, shape.rows, shape.N), h(dtype, shape.rows, shape.N, shape.gap);
        Tensor dgate(dtype, shape.rows, shape.N, shape.gap), dup(dtype, shape.rows, shape.N);
        gate.fill(random, 3.0f), up.fill(random, 1.0f), dh.fill(random, 1.0f);
        if (shape.rows > 2 && shape.N > 2) {  // large values of both signs, and zeros
          gate.set(0, 0, -100.0f), gate.set(0, 1, 100.0f), gate.set(0, 2, 0.0f);
          gate.set(1, 0, -20.0f), gate.set(1, 1, 20.0f), gate.set(1, 2, -0.0f);
        }
        qn::gated_activation({activation, gate.in(), up.in(), h.out()});
        qn::gated_activation_backward({activation, gate.in(), up.in(), dh.in(), dgate.out(), dup.out()});
        EXPECT(h.keeps_to_its_columns() && dgate.keeps_to_its_columns());
        Worst worst;
        for (std::int64_t i = 0; i < shape.rows; ++i)
          for (std::int64_t j = 0; j < shape.N; ++j) {
            const Function f = function_of(activation, gate.at(i, j));
            const double u = up.at(i, j), d = dh.at(i, j);
            const double rounding = 2.0 * kUnit;  // for the products with u and d
            worst.see(h.at(i, j), f.value * u, dtype,
                      (f.error_of_value + rounding * std::fabs(f.value)) * std::fabs(u));
            worst.see(dup.at(i, j), f.value * d, dtype,
                      (f.error_of_value + rounding * std::fabs(f.value)) * std::fabs(d));
            worst.see(dgate.at(i, j), f.derivative * u * d, dtype,
                      (f.error_of_derivative + rounding * std::fabs(f.derivative)) * std::fabs(u * d));
          }
        EXPECT(worst.value() <= 1.0);
        if (!(worst.value() <= 1.0))
          std::printf("  activation %d of %d x %d %s: %.3g times what is allowed\n", static_cast<int>(activation),
                      static_cast<int>(shape.rows), static_cast<int>(shape.N), qn::name_of(dtype), worst.value());
      }
}

TEST(rms_norm_and_its_gradient_are_those_of_float64) {
  for (const float shift : {0.0f, 1.0f})
    for (const DType dtype : kDTypes)
      for (const Shape& shape : kShapes) {
        Random random(static_cast<std::uint64_t>(shape.N));
        Tensor x(dtype, shape.rows, shape.N, shape.gap), dy(dtype, shape.rows, shape.N, 2 * shape.gap);
        Tensor y(dtype, shape.rows, shape.N, shape.gap), dx(dtype, shape.rows, shape.N), weight(dtype, 1, shape.N);
        x.fill(random, 2.0f), dy.fill(random, 1.0f), weight.fill(random, 0.5f);
        if (shape.rows > 2)
          for (std::int64_t j = 0; j < shape.N; ++j) x.set(0, j, 0.0f);  // then only eps is under the root
        std::vector<float> r(shape.rows);
        const float eps = 1e-5f;
        qn::rms_norm({x.in(), weight.data(), shift, eps, y.out(), r.data()});
        qn::rms_norm_backward({x.in(), weight.data(), shift, dy.in(), r.data(), dx.out()});
        EXPECT(y.keeps_to_its_columns());
        const double N = static_cast<double>(shape.N);
        const double of_sum = kUnit * (kUnits + kSumFactor * std::sqrt(N));
        Worst worst;
        for (std::int64_t i = 0; i < shape.rows; ++i) {
          double squares = 0.0, along = 0.0, gradients = 0.0;
          for (std::int64_t j = 0; j < shape.N; ++j) squares += std::pow(double{x.at(i, j)}, 2.0);
          const double exact = 1.0 / std::sqrt(squares / N + double{eps}), given = r[i];
          worst.see(given, exact, DType::f32, of_sum * exact);
          const auto factor = [&](std::int64_t j) { return double{shift} + double{weight.at(0, j)}; };
          const auto weighted = [&](std::int64_t j) { return dy.at(i, j) * factor(j); };
          for (std::int64_t j = 0; j < shape.N; ++j) {
            along += x.at(i, j) * given * weighted(j);
            gradients += weighted(j) * weighted(j);
          }
          const double norms = given * std::sqrt(squares * gradients);
          for (std::int64_t j = 0; j < shape.N; ++j) {
            const double expected = x.at(i, j) * exact * factor(j), along_x = x.at(i, j) * given / N;
            // If 1 and the weight nearly cancel, the rounding of 1 + weight counts.
            const double of_factor = kUnits * kUnit * std::fabs(x.at(i, j)) * exact * (double{shift} + 1.0);
            worst.see(y.at(i, j), expected, dtype, of_sum * std::fabs(expected) + of_factor);
            const double slack = of_sum * std::fabs(along_x) * norms +
                                 kUnits * kUnit * (std::fabs(weighted(j)) + std::fabs(dy.at(i, j)) * double{shift});
            worst.see(dx.at(i, j), given * (weighted(j) - along_x * along), dtype, given * slack);
          }
        }
        EXPECT(worst.value() <= 1.0);
        if (!(worst.value() <= 1.0))
          std::printf("  norm of %d x %d %s, shift %g: %.3g times what is allowed\n", static_cast<int>(shape.rows),
                      static_cast<int>(shape.N), qn::name_of(dtype), static_cast<double>(shift), worst.value());
      }
}

TEST(bits_are_the_same_for_any_number_of_threads) {
  std::vector<char> expected;
  for (const int threads : {1, 2, 3, 3}) {
    use_pool(threads);
    Random random(7);
    Tensor x(DType::bf16, 200, 577), gate(DType::bf16, 200, 577), weight(DType::bf16, 1, 577);
    Tensor y(DType::bf16, 200, 577), h(DType::bf16, 200, 577);
    x.fill(random, 1.0f), gate.fill(random, 2.0f), weight.fill(random, 1.0f);
    std::vector<float> r(200);
    qn::rms_norm({x.in(), weight.data(), 0.0f, 1e-6f, y.out(), r.data()});
    qn::gated_activation({qn::Activation::silu, gate.in(), y.in(), h.out()});
    if (expected.empty()) expected = h.bytes();
    EXPECT(h.bytes() == expected);
  }
  use_pool(2);
}

TEST(value_that_is_not_finite_stays_in_its_row) {
  for (const float value : {NAN, INFINITY}) {
    Tensor x(DType::f32, 3, 40), weight(DType::f32, 1, 40), y(DType::f32, 3, 40), h(DType::f32, 3, 40);
    Random random(3);
    x.fill(random, 1.0f), weight.fill(random, 1.0f);
    x.set(1, 5, value);
    std::vector<float> r(3);
    qn::rms_norm({x.in(), weight.data(), 0.0f, 1e-6f, y.out(), r.data()});
    qn::gated_activation({qn::Activation::silu, x.in(), x.in(), h.out()});
    EXPECT(std::isnan(y.at(1, 5)) && !std::isfinite(h.at(1, 5)));
    for (std::int64_t j = 0; j < 40; ++j) {
      EXPECT(std::isfinite(y.at(0, j)) && std::isfinite(y.at(2, j)));
      EXPECT(j == 5 || std::isfinite(h.at(1, j)));
    }
  }
}

}  // namespace

int main() {
  if (!isa_is_here()) return kSkipped;
  use_pool(2);
  return run_tests();
}
