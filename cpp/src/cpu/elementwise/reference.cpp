// The scalar backend's gated activations and RMS norms, as elementwise.h defines them, in fp64.
#include <cmath>

#include "cpu/isa/scalar/reference.h"
#include "cpu/runtime/parallel.h"

namespace qlora_native::reference {
namespace {

template <class Pointer>
double element(const BasicMatrix<Pointer>& matrix, std::int64_t row, std::int64_t i) {
  return double{load(matrix.data, matrix.dtype, row * matrix.stride + i)};
}
void put(const Matrix& matrix, std::int64_t row, std::int64_t i, double value) {
  store(matrix.data, matrix.dtype, row * matrix.stride + i, static_cast<float>(value));
}

struct ValueAndDerivative {
  double value, derivative;
};

ValueAndDerivative activation_of(Activation activation, double x) {
  // x s(a) with s(a) = 1 / (1 + e^-a), for (1 + tanh(z)) / 2 = s(2 z).
  constexpr double kTwoRootsOf2OverPi = 1.59576912160573072, kCubic = 0.044715;
  const bool silu = activation == Activation::silu;
  const double a = silu ? x : kTwoRootsOf2OverPi * (x + kCubic * x * x * x);
  const double slope = silu ? 1.0 : kTwoRootsOf2OverPi * (1.0 + 3.0 * kCubic * x * x);
  const double s = 1.0 / (1.0 + std::exp(-a)), rest = 1.0 / (1.0 + std::exp(a));
  return {x * s, s + x * s * rest * slope};
}

}  // namespace

void gated_activation(const GatedActivationArgs& args, const Stream&) {
  parallel_for(args.gate.rows, [&](std::int64_t row) {
    for (std::int64_t i = 0; i < args.gate.cols; ++i)
      put(args.h, row, i, activation_of(args.activation, element(args.gate, row, i)).value * element(args.up, row, i));
  });
}

void gated_activation_backward(const GatedActivationBackwardArgs& args, const Stream&) {
  parallel_for(args.gate.rows, [&](std::int64_t row) {
    for (std::int64_t i = 0; i < args.gate.cols; ++i) {
      const ValueAndDerivative f = activation_of(args.activation, element(args.gate, row, i));
      const double dh = element(args.dh, row, i);
      put(args.dgate, row, i, dh * element(args.up, row, i) * f.derivative);
      put(args.dup, row, i, dh * f.value);
    }
  });
}

void rms_norm(const RmsNormArgs& args, const Stream&) {
  parallel_for(args.x.rows, [&](std::int64_t row) {
    const std::int64_t N = args.x.cols;
    double squares = 0.0;
    for (std::int64_t i = 0; i < N; ++i) squares += element(args.x, row, i) * element(args.x, row, i);
    const double r = 1.0 / std::sqrt(squares / static_cast<double>(N) + double{args.eps});
    args.r[row] = static_cast<float>(r);
    for (std::int64_t i = 0; i < N; ++i) {
      const double factor = double{args.shift} + double{load(args.weight, args.x.dtype, i)};
      put(args.y, row, i, element(args.x, row, i) * r * factor);
    }
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, const Stream&) {
  parallel_for(args.x.rows, [&](std::int64_t row) {
    const std::int64_t N = args.x.cols;
    const double r = double{args.r[row]};
    const auto weighted = [&](std::int64_t i) {
      return element(args.dy, row, i) * (double{args.shift} + double{load(args.weight, args.x.dtype, i)});
    };
    double along = 0.0;
    for (std::int64_t i = 0; i < N; ++i) along += element(args.x, row, i) * r * weighted(i);
    for (std::int64_t i = 0; i < N; ++i)
      put(args.dx, row, i, r * (weighted(i) - element(args.x, row, i) * r * along / static_cast<double>(N)));
  });
}

}  // namespace qlora_native::reference
