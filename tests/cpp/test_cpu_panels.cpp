// Guards products by panels of decoded W on the CPU (cpu/product/panels-inl.h), over a dense product that is a plain
// loop: the calls that they make, and that their results are near those in float64. tests/test_kernels.py runs them
// over torch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/product/config.h"
#include "expect.h"
#include "qlora_native/qlora_native.h"
#include "quantized.h"
#include "tensor.h"

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

// How far results may be off: the result, and in the adapter's part A, s*B, the low-rank factor and the part itself,
// are rounded once each. `of_adapter` is the sum of the part's absolute terms.
double tolerance(DType dtype, double result, double of_adapter) {
  return 1.01 * unit_roundoff(dtype) * (std::abs(result) + 4.0 * of_adapter) + smallest_normal(dtype);
}

struct Shape {
  std::int64_t M, N, K, rank;
};

void result_is_near_float64_whether_low_rank_rows_are_wanted_or_not(DType dtype, Shape s) {
  Random random(static_cast<std::uint64_t>(s.M + s.rank));
  const Tensor weight = Tensor(DType::f32, s.N, s.K).fill(random, 0.1f);
  const Quantized quantized(weight.in(), format_named("nf4"), 64, true);
  Tensor w(dtype, s.N, s.K);
  qn::dequantize({.weight = quantized.view(), .dtype = dtype, .out = w.data()});
  const Tensor x = Tensor(dtype, s.M, s.K, 3).fill(random, 1.0f), dy = Tensor(dtype, s.M, s.N, 1).fill(random, 1.0f);
  const Tensor bias = Tensor(dtype, 1, s.N).fill(random, 1.0f);
  const Tensor a = Tensor(DType::f32, s.rank, s.K).fill(random, 0.1f);
  const Tensor b = Tensor(DType::f32, s.N, s.rank).fill(random, 0.1f);
  const qn::LoraView lora{.rank = s.rank, .a = a.data(), .b = b.data(), .scaling = 0.5f};

  const auto run = [&](const Tensor& from, std::int64_t cols, bool wanted, Tensor& low_rank, auto call) {
    dense_operand = {from.bytes().data(), from.bytes().data() + from.bytes().size()};
    Tensor out(dtype, s.M, cols, 2);
    call(out.out(), wanted ? low_rank.out() : qn::Matrix{});
    EXPECT(out.keeps_to_its_columns());
    // No other product has so many rows: its x was not copied.
    EXPECT(dense_operand.products >= (s.rank > 0 ? 2 : 1));
    return out;
  };
  const auto check = [&](const Tensor& from, std::int64_t cols, bool forward) {
    Tensor low_rank(dtype, s.M, std::max<std::int64_t>(s.rank, 1));
    const auto call = [&](qn::Matrix out, qn::Matrix low) {
      if (s.rank == 0) low = {};
      if (forward)
        qn::linear_forward(
            {.weight = quantized.view(), .lora = lora, .x = x.in(), .bias = bias.data(), .y = out, .u = low});
      else
        qn::linear_backward_input({.weight = quantized.view(), .lora = lora, .dy = dy.in(), .dx = out, .v = low});
    };
    const Tensor out = run(from, cols, true, low_rank, call);
    EXPECT(run(from, cols, false, low_rank, call).bytes() == out.bytes());
    const std::int64_t inner = from.cols();
    std::vector<double> narrow(s.rank), absolute(narrow.size());
    for (std::int64_t m = 0; m < s.M; m += std::max<std::int64_t>(s.M / 20, 1)) {
      for (std::int64_t r = 0; r < s.rank; ++r) {
        double &sum = narrow[r] = 0.0, &terms = absolute[r] = 0.0;
        for (std::int64_t k = 0; k < inner; ++k) {
          const double term = static_cast<double>(from.at(m, k)) * (forward ? a.at(r, k) : 0.5 * b.at(k, r));
          sum += term;
          terms += std::abs(term);
        }
      }
      for (std::int64_t j = 0; j < cols; ++j) {
        double sum = forward ? bias.at(0, j) : 0.0f, of_adapter = std::abs(sum);
        for (std::int64_t k = 0; k < inner; ++k)
          sum += static_cast<double>(from.at(m, k)) * (forward ? w.at(j, k) : w.at(k, j));
        for (std::int64_t r = 0; r < s.rank; ++r) {
          const double factor = forward ? 0.5 * b.at(j, r) : a.at(r, j);
          sum += narrow[r] * factor;
          of_adapter += absolute[r] * std::abs(factor);
        }
        const double error = std::abs(out.at(m, j) - sum);
        EXPECT(error <= tolerance(dtype, sum, of_adapter));
      }
    }
  };
  check(x, s.N, true);
  check(dy, s.K, false);
}

void fail(const qn::DenseGemmArgs&, const qn::Stream&) { throw qn::Unavailable("no product"); }
// The adapter's products succeed, and the one that is added to them does not.
void fail_to_add(const qn::DenseGemmArgs& args, const qn::Stream& stream) {
  if (args.accumulate) fail(args, stream);
  dense_gemm(args, stream);
}

TEST(failed_product_is_an_error_and_the_next_call_is_right) {
  Random random(1);
  const Tensor weight = Tensor(DType::f32, 9, 70).fill(random, 0.1f);
  const Quantized quantized(weight.in(), format_named("nf4"), 64, true);
  const Tensor x = Tensor(DType::f32, 20, 70).fill(random, 1.0f);
  const Tensor a = Tensor(DType::f32, 4, 70).fill(random, 0.1f), b = Tensor(DType::f32, 9, 4).fill(random, 0.1f);
  const auto product = [&] {
    Tensor y(DType::f32, 20, 9);
    qn::linear_forward({.weight = quantized.view(),
                        .lora = {.rank = 4, .a = a.data(), .b = b.data(), .scaling = 0.5f},
                        .x = x.in(),
                        .y = y.out()});
    return y.bytes();
  };
  const auto right = product();
  for (const qn::DenseGemm failing : {&fail, &fail_to_add}) {
    qn::set_dense_gemm(failing);
    try {
      product();
      EXPECT(false);
    } catch (const qn::Unavailable& error) {
      EXPECT(std::string(error.what()) == "no product");
    }
    qn::set_dense_gemm(dense_gemm);
    EXPECT(product() == right);
  }
}

}  // namespace

int main() {
  setenv("QLN_FORCE_KERNEL", "panels", 1);
  unsetenv("QLN_BACKEND");
  if (qn::current_isa() == "scalar") return kSkipped;  // it has one kernel
  qn::set_dense_gemm(dense_gemm);
  for (const DType dtype : kDTypes) {
    for (const Shape s : {Shape{3, 5, 70, 0}, {40, 130, 64, 1}, {17, 66, 200, 70}})
      result_is_near_float64_whether_low_rank_rows_are_wanted_or_not(dtype, s);
    // More rows of U and V than there is memory for at once.
    const std::int64_t rank = 40,
                       rows = qn::cpu::kLowRankBytes / (rank * static_cast<std::int64_t>(qn::size_of(dtype)));
    result_is_near_float64_whether_low_rank_rows_are_wanted_or_not(dtype, {rows + rows / 3, 9, 10, rank});
  }
  return run_tests();
}
