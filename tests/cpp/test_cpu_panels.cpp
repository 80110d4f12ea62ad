// Guards products by panels of decoded W on the CPU (cpu/product/panels-inl.h), over a dense product that is a plain
// loop: the calls that they make, and that their results are near those in float64. tests/test_kernels.py runs them
// over torch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/product/config.h"
#include "layer.h"
#include "qlora_native/qlora_native.h"

namespace {

template <class Pointer>
float at(const qn::BasicMatrix<Pointer>& m, std::int64_t i, std::int64_t j) {
  const std::int64_t e = i * m.stride + j;
  if (m.dtype == DType::f32) return static_cast<const float*>(m.data)[e];
  const std::uint16_t half = static_cast<const std::uint16_t*>(m.data)[e];
  return m.dtype == DType::bf16 ? qn::f32_from_bf16(half) : qn::f32_from_f16(half);
}
void set(const qn::Matrix& m, std::int64_t i, std::int64_t j, float value) {
  const std::int64_t e = i * m.stride + j;
  if (m.dtype == DType::f32)
    static_cast<float*>(m.data)[e] = value;
  else
    static_cast<std::uint16_t*>(m.data)[e] =
        m.dtype == DType::bf16 ? qn::bf16_from_f32(value) : qn::f16_from_f32(value);
}

// The memory of X, or of dY, and how many products multiplied rows of it.
struct DenseOperand {
  const char *begin, *end;
  int products = 0;
};
DenseOperand dense_operand;

// Sums in float64, rounded once.
void dense_gemm(const qn::DenseGemmArgs& args, const qn::Stream&) {
  const std::int64_t rows = args.x.rows, inner = args.x.cols;
  const auto* data = static_cast<const char*>(args.x.data);
  dense_operand.products += data >= dense_operand.begin && data < dense_operand.end;
  EXPECT(args.out.rows == rows && !(args.accumulate && args.bias != nullptr));
  EXPECT((args.transpose_w ? args.w.cols : args.w.rows) == inner);
  EXPECT(args.w.rows * args.w.stride * static_cast<std::int64_t>(qn::size_of(args.w.dtype)) <= qn::cpu::kPanelBytes);
  const qn::ConstMatrix bias{args.bias, args.out.dtype, 1, args.out.cols, args.out.cols};
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < args.out.cols; ++j) {
      double sum = args.accumulate ? at(args.out, i, j) : args.bias != nullptr ? at(bias, 0, j) : 0.0f;
      for (std::int64_t k = 0; k < inner; ++k)
        sum += static_cast<double>(at(args.x, i, k)) * (args.transpose_w ? at(args.w, j, k) : at(args.w, k, j));
      set(args.out, i, j, static_cast<float>(sum));
    }
}

// The adapter's part may be rounded before the weight's is added. With U and V in memory of the call the bits are the
// same.
void expect_results_near_float64(const Case& c) {
  Layer layer(c);
  layer.rounds_adapter_part = true;
  const auto run = [&](const Tensor& operand, const auto& product) {
    dense_operand = {operand.bytes().data(), operand.bytes().data() + operand.bytes().size()};
    product();
    // No other product has so many rows: its x was not copied.
    EXPECT(dense_operand.products >= (c.rank > 0 ? 2 : 1));
  };
  run(layer.x, [&] { layer.forward(); });
  run(layer.dy, [&] { layer.backward(); });
  layer.check(/*with_gradients=*/false);
  const std::vector<char> y = layer.y.bytes(), dx = layer.dx.bytes();
  qn::LinearForwardArgs forward = layer.forward_args();
  qn::LinearBackwardInputArgs backward = layer.backward_args();
  forward.u = backward.v = {};
  run(layer.x, [&] { qn::linear_forward(forward); });
  run(layer.dy, [&] { qn::linear_backward_input(backward); });
  EXPECT(layer.y.bytes() == y && layer.dx.bytes() == dx);
}

TEST(results_are_near_float64_whether_low_rank_rows_are_stored_or_not) {
  for (const DType dtype : kDTypes) {
    const auto expect = [&](std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t rank) {
      expect_results_near_float64({.M = M, .N = N, .K = K, .dtype = dtype, .bias = true, .rank = rank, .gap = 3});
    };
    expect(3, 5, 70, 0);
    expect(40, 130, 64, 1);
    expect(17, 66, 200, 70);
    // More rows of U and V than there is memory for at once.
    const std::int64_t rows = qn::cpu::kLowRankBytes / (40 * static_cast<std::int64_t>(qn::size_of(dtype)));
    expect(rows + rows / 3, 9, 10, 40);
  }
}

void fail(const qn::DenseGemmArgs&, const qn::Stream&) { throw qn::Unavailable("no product"); }
// The adapter's products succeed, and the one that is added to them does not.
void fail_to_add(const qn::DenseGemmArgs& args, const qn::Stream& stream) {
  if (args.accumulate) fail(args, stream);
  dense_gemm(args, stream);
}

TEST(failed_product_is_an_error_and_the_next_call_is_right) {
  Layer layer({.M = 20, .N = 9, .K = 70, .dtype = DType::f32, .rank = 4});
  const auto product = [&] {
    layer.forward();
    return layer.y.bytes();
  };
  const std::vector<char> expected = product();
  for (const qn::DenseGemm failing : {&fail, &fail_to_add}) {
    qn::set_dense_gemm(failing);
    try {
      product();
      EXPECT(false);
    } catch (const qn::Unavailable& error) {
      EXPECT(std::string(error.what()) == "no product");
    }
    qn::set_dense_gemm(dense_gemm);
    EXPECT(product() == expected);
  }
}

}  // namespace

int main() {
  setenv("QLN_FORCE_KERNEL", "panels", 1);
  unsetenv("QLN_BACKEND");
  if (qn::current_isa() == "scalar") return kSkipped;  // it has one kernel
  qn::set_dense_gemm(dense_gemm);
  return run_tests();
}
