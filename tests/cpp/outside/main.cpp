// Quantizes a weight, multiplies by it, and compares the product with plain sums; then passes a bad argument. Prints
// which library it ran, and exits 0 if all is well.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "qlora_native/qlora_native.h"

namespace qn = qlora_native;

int main() {
  constexpr std::int64_t M = 3, N = 5, K = 130;
  constexpr int kBlocksize = 64;
  std::vector<float> w(N * K), x(M * K), y(M * N), decoded(N * K), absmax((N * K + kBlocksize - 1) / kBlocksize);
  for (std::size_t i = 0; i < w.size(); ++i) w[i] = std::sin(static_cast<float>(i));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i));
  std::vector<std::uint8_t> codes((N * K + 1) / 2);

  qn::NonFinite non_finite;
  qn::quantize({.weight = w.data(),
                .elements = N * K,
                .blocksize = kBlocksize,
                .code = qn::codebook("nf4").data(),
                .codes = codes.data(),
                .absmax = absmax.data(),
                .non_finite = &non_finite});
  const qn::QuantizedWeightView weight{.N = N,
                                       .K = K,
                                       .blocksize = kBlocksize,
                                       .codes = codes.data(),
                                       .absmax = absmax.data(),
                                       .code = qn::codebook("nf4").data()};
  qn::dequantize({.weight = weight, .out = decoded.data()});
  qn::LinearForwardArgs args{
      .weight = weight, .x = {x.data(), qn::DType::f32, M, K, K}, .y = {y.data(), qn::DType::f32, M, N, N}};
  qn::linear_forward(args);
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t n = 0; n < N; ++n) {
      double sum = 0.0, size = 0.0;
      for (std::int64_t k = 0; k < K; ++k) {
        const double product = double{x[m * K + k]} * double{decoded[n * K + k]};
        sum += product;
        size += std::abs(product);
      }
      if (!(std::abs(y[m * N + n] - sum) <= 1e-6 * size)) {
        std::printf("y[%d,%d]: expected %g, got %g\n", static_cast<int>(m), static_cast<int>(n), sum, y[m * N + n]);
        return 1;
      }
    }

  args.weight.blocksize = 48;
  try {
    qn::linear_forward(args);
    std::printf("blocksize 48: expected an error\n");
    return 1;
  } catch (const qn::Error& error) {  // must also work if the library is a shared one
    if (error.argument() != "weight.blocksize") return 1;
  }
  std::printf("qlora_native %s on %s, %d threads, cuda: %s\n", qn::version().c_str(), qn::current_isa().c_str(),
              qn::num_threads(), qn::cuda_unavailable_reason().c_str());
  return 0;
}
