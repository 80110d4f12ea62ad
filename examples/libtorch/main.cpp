// qlora_native's torch ops from C++: load their library, quantize a weight, multiply with it and an adapter, forward
// and backward, and compare with torch's own arithmetic. The schemas are in python/bindings/ops.cpp.
#include <dlfcn.h>
#include <torch/torch.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <tuple>

using at::Tensor;
using Optional = std::optional<Tensor>;

// An op by name, with the C++ signature of its schema.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void expect_close(const char* name, const Tensor& actual, const Tensor& expected) {
  const double error = ((actual - expected).norm() / expected.norm()).item<double>();
  std::printf("%-4s relative error %.1e\n", name, error);
  if (!(error < 1e-5)) throw std::runtime_error("the ops and torch disagree");
}

int main() try {
  if (dlopen(QLN_TORCH_LIBRARY, RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  const auto quantize = op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Optional&, const Optional&, int64_t, int64_t)>("qlora_native::quantize");
  const auto dequantize =
      op<Tensor(const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
                const Optional&, const Optional&, const Optional&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                at::ScalarType)>("qlora_native::dequantize");
  const auto forward = op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
      const Optional&, const Optional&, const Optional&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
      const Optional&, const Optional&, const Optional&, double, double, const Optional&, const Optional&, int64_t)>(
      "qlora_native::linear_forward");
  const auto backward = op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
      const Optional&, const Optional&, const Optional&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
      const Optional&, const Optional&, double, double, const Optional&, bool, const Optional&, int64_t)>(
      "qlora_native::linear_backward_input");

  torch::manual_seed(0);
  constexpr int64_t M = 32, N = 96, K = 128, kRank = 8, kBits = 4, kBlocksize = 64;
  constexpr int64_t kNestedBlocksize = 256, kByteFormat = 0;  // for other weights than this one
  constexpr double kScaling = 2.0;
  const Tensor weight = torch::randn({N, K}), x = torch::randn({M, K}), dy = torch::randn({M, N});
  const Tensor a = torch::randn({kRank, K}), b = torch::randn({N, kRank});
  // Four bits: any 16 ascending levels. These are int4's; nf4's are in qlora_native/codebook.h.
  const Tensor code = (torch::arange(16) - 8).to(torch::kFloat) / 7;

  const auto [codes, absmax, nested_absmax, offset, non_finite] = quantize.call(weight, code, {}, kBits, kBlocksize);
  const Tensor decoded = dequantize
                             .call(codes, absmax, {}, {}, {}, code, {}, {}, {}, N, K, kBits, kBlocksize,
                                   kNestedBlocksize, kByteFormat, torch::kFloat)
                             .view({N, K});
  // No groups of rows, and one weight.
  const auto [y, u] = forward.call(x, codes, absmax, {}, {}, {}, code, {}, {}, {}, N, K, kBits, kBlocksize,
                                   kNestedBlocksize, kByteFormat, {}, a, b, kScaling, 0.0, {}, {}, 1);
  const auto [dx, v] = backward.call(dy, codes, absmax, {}, {}, {}, code, {}, {}, {}, N, K, kBits, kBlocksize,
                                     kNestedBlocksize, kByteFormat, a, b, kScaling, 0.0, {}, true, {}, 1);
  const Tensor merged = decoded + kScaling * b.mm(a);
  expect_close("y", y, x.mm(merged.t()));
  expect_close("dx", dx, dy.mm(merged));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "libtorch_example: %s\n", error.what());
  return 1;
}
