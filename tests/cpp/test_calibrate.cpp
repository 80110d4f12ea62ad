// Guards calibrated quantization of the instruction set in use: `gram` is near its definition in float64 and exactly
// symmetric; `weighted_scales` and `quantize_with_feedback` have the bits of the scalar backend, whose loops are those
// of their definitions. All have the same bits for any number of threads. ctest runs this test once for each
// instruction set; it exits 1 on a failure.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "common/codebook.h"
#include "common/layout.h"
#include "cpu/isa/scalar/reference.h"
#include "expect.h"
#include "expect_refused.h"
#include "isa_is_here.h"
#include "pool.h"
#include "qlora_native/qlora_native.h"
#include "tensor.h"

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

// ---- gram ----

struct GramShape {
  std::int64_t T, K, gap;
};
// They have one panel of rows and several, whole and ragged; one chunk of columns, several tiles, and ragged chunks.
constexpr GramShape kGramShapes[] = {{0, 7, 0},     {1, 1, 0},    {5, 3, 2},     {17, 64, 0},
                                     {256, 100, 0}, {257, 65, 1}, {600, 193, 0}, {70, 700, 4}};

std::vector<float> start_of(std::int64_t K) {
  std::vector<float> start(static_cast<std::size_t>(K * K));
  for (std::int64_t i = 0; i < K; ++i)
    for (std::int64_t j = 0; j < K; ++j)
      start[static_cast<std::size_t>(i * K + j)] = i <= j ? static_cast<float>((i * 31 + j * 17) % 8) : kNan;
  return start;
}

void test_gram(DType dtype, const GramShape& shape) {
  const std::int64_t T = shape.T, K = shape.K;
  Tensor x(dtype, T, K, shape.gap);
  Random random(static_cast<std::uint64_t>(T + K));
  x.fill(random, 1.0f);
  std::vector<float> gram = start_of(K);
  qn::gram({x.in(), gram.data()});
  // Chains of 256 terms, in fp32, are added to what stands in gram. A term is rounded once with its addition.
  const double roundings = 256.0 + std::ceil(static_cast<double>(T) / 256.0) + 2.0;
  const std::vector<double> values = x.values();
  const std::vector<float> start = start_of(K);
  std::int64_t wrong = 0, not_symmetric = 0;
  for (std::int64_t i = 0; i < K; ++i)
    for (std::int64_t j = i; j < K; ++j) {
      double exact = start[static_cast<std::size_t>(i * K + j)], norm = exact;
      for (std::int64_t t = 0; t < T; ++t) {
        const double term = values[static_cast<std::size_t>(t * K + i)] * values[static_cast<std::size_t>(t * K + j)];
        exact += term;
        norm += std::fabs(term);
      }
      const float got = gram[static_cast<std::size_t>(i * K + j)];
      wrong += !(std::fabs(got - exact) <= roundings * 0x1p-24 * norm);
      not_symmetric += gram[static_cast<std::size_t>(j * K + i)] != got;
    }
  EXPECT(wrong == 0);
  EXPECT(not_symmetric == 0);
  for (const int threads : {2, 3, 16}) {  // also fewer tasks than threads
    std::vector<float> again = start_of(K);
    use_pool(threads);
    qn::gram({x.in(), again.data()});
    use_pool(1);
    EXPECT(again == gram);
  }
}

// ---- formats ----

struct Format {
  const char* name;
  int bits;
  std::vector<float> code;
};
std::vector<Format> formats() {
  const auto named = [](const char* name, const std::array<float, 16>& code) {
    return Format{name, 4, {code.begin(), code.end()}};
  };
  std::vector<float> wide;  // midpoints beyond 1, and none at 0
  for (int i = 0; i < 16; ++i) wide.push_back(static_cast<float>(i) * 0.3f - 1.7f);
  std::vector<float> bordering = wide;  // the last midpoint is 1, beyond which elements are bounded
  bordering[14] = 0.9f, bordering[15] = 1.1f;
  for (int i = 0; i < 14; ++i) bordering[static_cast<std::size_t>(i)] = static_cast<float>(i - 13) / 14.0f;
  return {named("nf4", qn::kNf4), named("fp4", qn::kFp4),      named("int4", qn::kInt4),
          {"wide", 4, wide},      {"bordering", 4, bordering}, {"int8", 8, {}}};
}

struct WeightShape {
  std::int64_t N, K;
  int blocksize;
};
// Their blocks straddle rows or do not, are many, one or ragged; rows are odd, and fewer or more than a strip; columns
// are fewer or more than what is packed at once.
constexpr WeightShape kWeightShapes[] = {{1, 1, 64},     {1, 33, 16},     {3, 5, 32},    {65, 67, 64},
                                         {130, 300, 64}, {17, 640, 4096}, {257, 31, 32}, {7, 513, 128}};

struct Weight {
  WeightShape shape;
  std::vector<float> values, importance;
  explicit Weight(const WeightShape& s, Random& random) : shape(s) {
    for (std::int64_t i = 0; i < s.N * s.K; ++i) values.push_back(0.1f * random.normal());
    for (std::int64_t i = 0; i < s.K; ++i) importance.push_back(std::fabs(random.normal()));
  }
  std::int64_t elements() const { return shape.N * shape.K; }
  std::int64_t blocks() const { return qn::ceil_div(elements(), shape.blocksize); }
};

// ---- weighted_scales ----

qn::WeightedScalesArgs args_of(const Weight& weight, const Format& format, std::vector<float>& scales) {
  qn::WeightedScalesArgs args;
  args.weight = weight.values.data();
  args.N = weight.shape.N;
  args.K = weight.shape.K;
  args.importance = weight.importance.data();
  args.bits = format.bits;
  args.blocksize = weight.shape.blocksize;
  args.code = format.code.data();
  scales.assign(static_cast<std::size_t>(weight.blocks()), kNan);
  args.scales = scales.data();
  return args;
}

void expect_scales_of_reference(const qn::WeightedScalesArgs& args, const std::vector<float>& scales) {
  std::vector<float> expected(scales.size());
  qn::WeightedScalesArgs reference = args;
  reference.scales = expected.data();
  qn::reference::weighted_scales(reference, {});
  for (const int threads : {1, 2, 3}) {
    use_pool(threads);
    qn::weighted_scales(args);
    use_pool(1);
    EXPECT(scales == expected);
  }
}

void test_weighted_scales(const WeightShape& shape, const Format& format) {
  Random random(static_cast<std::uint64_t>(shape.N * shape.K));
  Weight weight(shape, random);
  const auto first_block = std::min<std::int64_t>(shape.blocksize, weight.elements());
  std::vector<float> scales;
  const qn::WeightedScalesArgs args = args_of(weight, format, scales);
  expect_scales_of_reference(args, scales);
  for (const int steps : {1, 17}) {
    qn::WeightedScalesArgs other = args;
    other.steps = steps;
    other.lo = 0.2f;
    other.hi = 3.0f;
    expect_scales_of_reference(other, scales);
  }

  // A block without important elements takes all as equally important, and the unit of neither operand matters.
  std::vector<float> equal(weight.importance.size(), 2.0f);
  weight.importance.swap(equal);
  expect_scales_of_reference(args_of(weight, format, scales), scales);
  const std::vector<float> of_equal = scales;
  std::fill(weight.importance.begin(), weight.importance.end(), 0.0f);
  expect_scales_of_reference(args_of(weight, format, scales), scales);
  EXPECT(scales == of_equal);
  std::fill(weight.importance.begin(), weight.importance.end(), 0x1p120f);
  for (float& value : weight.values) value *= 0x1p-90f;
  expect_scales_of_reference(args_of(weight, format, scales), scales);
  for (std::size_t i = 0; i < scales.size(); ++i) EXPECT(scales[i] == of_equal[i] * 0x1p-90f);

  std::fill(weight.values.begin(), weight.values.begin() + first_block, 0.0f);
  expect_scales_of_reference(args_of(weight, format, scales), scales);
  EXPECT(scales[0] == 0.0f);
}

TEST(column_that_matters_decides_the_scale) {
  const Format format{"nf4", 4, {qn::kNf4.begin(), qn::kNf4.end()}};
  Random random(3);
  Weight weight({1, 64, 64}, random);
  weight.values[5] = 0.5f;  // absmax is 0.5 or more; the element that matters is a level of 0.8 times that
  weight.values[9] = 0.8f * 0.5f * qn::kNf4[13];
  for (std::size_t i = 0; i < 64; ++i) {
    weight.importance[i] = i == 9 ? 1.0f : 0.0f;
    if (i != 5 && i != 9) weight.values[i] *= 0.1f;
  }
  std::vector<float> scales;
  qn::WeightedScalesArgs args = args_of(weight, format, scales);
  args.lo = 0.75f, args.hi = 0.85f, args.steps = 3;
  qn::weighted_scales(args);
  EXPECT(std::fabs(scales[0] - 0.4f) < 1e-6f);
}

TEST(first_of_equal_errors_wins) {
  Format format{"halves", 4, {}};
  for (int i = 0; i < 16; ++i) format.code.push_back(static_cast<float>(i - 7) / 8.0f);  // 1/2 and 1 among them
  Random random(1);
  Weight weight({1, 1, 64}, random);
  weight.values[0] = 0.25f;
  std::vector<float> scales;
  qn::WeightedScalesArgs args = args_of(weight, format, scales);
  args.lo = 1.0f, args.hi = 2.0f, args.steps = 2;  // both decode to 0.25
  qn::weighted_scales(args);
  EXPECT(scales[0] == 0.25f);
}

// ---- quantize_with_feedback ----

struct Feedback {
  Weight weight;
  Format format;
  std::vector<std::int64_t> order;
  std::vector<float> factor, scales;
  std::vector<std::uint8_t> codes;

  Feedback(const WeightShape& shape, const Format& chosen, Random& random) : weight(shape, random), format(chosen) {
    const auto K = shape.K;
    for (std::int64_t i = 0; i < K; ++i) order.push_back(i);
    for (std::int64_t i = K - 1; i > 0; --i) {
      const auto j = static_cast<std::int64_t>((random.uniform() + 1.0f) * 0.5f * static_cast<float>(i + 1));
      std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(std::min(i, j))]);
    }
    factor.assign(static_cast<std::size_t>(K * K), kNan);  // nothing below the diagonal is read
    for (std::int64_t i = 0; i < K; ++i)
      for (std::int64_t j = i; j < K; ++j)
        factor[static_cast<std::size_t>(i * K + j)] =
            i == j ? 1.0f + 0.5f * random.uniform() : 0.3f * random.normal() / std::sqrt(static_cast<float>(K));
    for (std::int64_t b = 0; b < weight.blocks(); ++b)  // negative ones and zeros among them
      scales.push_back(b % 7 == 3 ? 0.0f : (b % 5 == 2 ? -0.2f : 0.25f) + 0.05f * random.uniform());
    codes.assign(static_cast<std::size_t>(qn::bytes_of_codes(weight.elements(), format.bits)) + 1, 0xA5);
  }
  qn::QuantizeWithFeedbackArgs args() {
    qn::QuantizeWithFeedbackArgs args;
    args.weight = weight.values.data();
    args.N = weight.shape.N;
    args.K = weight.shape.K;
    args.order = order.data();
    args.factor = factor.data();
    args.scales = scales.data();
    args.bits = format.bits;
    args.blocksize = weight.shape.blocksize;
    args.code = format.code.data();
    args.codes = codes.data();
    return args;
  }
};

void test_feedback(const WeightShape& shape, const Format& format) {
  Random random(static_cast<std::uint64_t>(shape.N * shape.K + format.bits));
  Feedback problem(shape, format, random);
  qn::QuantizeWithFeedbackArgs reference = problem.args();
  std::vector<std::uint8_t> expected = problem.codes;
  reference.codes = expected.data();
  qn::reference::quantize_with_feedback(reference, {});
  for (const int threads : {1, 2, 3}) {
    std::fill(problem.codes.begin(), problem.codes.end() - 1, std::uint8_t{0x5A});
    use_pool(threads);
    qn::quantize_with_feedback(problem.args());
    use_pool(1);
    EXPECT(problem.codes == expected);  // the byte behind them too
    if (problem.codes != expected) std::printf("  %s [%d, %d]\n", format.name, int(shape.N), int(shape.K));
  }
}

// With a factor that is diagonal nothing is fed back, and the levels are those of `quantize`.
void test_diagonal_factor_gives_the_nearest_levels(const WeightShape& shape, const Format& format) {
  if (shape.blocksize < 32 || format.code == formats()[4].code) return;
  Random random(5);
  Feedback problem(shape, format, random);
  const std::int64_t K = shape.K;
  for (std::int64_t i = 0; i < K; ++i)
    for (std::int64_t j = i + 1; j < K; ++j) problem.factor[static_cast<std::size_t>(i * K + j)] = 0.0f;
  // Elements in the middle between two levels may differ, because `quantize` multiplies by 1 / absmax. So each is near
  // a level.
  qn::QuantizeArgs plain;
  std::vector<std::uint8_t> expected = problem.codes;
  qn::NonFinite found;
  plain.weight = problem.weight.values.data();
  plain.elements = problem.weight.elements();
  plain.bits = format.bits;
  plain.blocksize = shape.blocksize;
  plain.code = format.code.data();
  plain.codes = expected.data();
  plain.absmax = problem.scales.data();
  plain.non_finite = &found;
  qn::quantize(plain);
  qn::QuantizedWeightView view;
  view.N = shape.N;
  view.K = K;
  view.bits = format.bits;
  view.blocksize = shape.blocksize;
  view.code = format.code.data();
  view.codes = expected.data();
  view.absmax = problem.scales.data();
  const auto value_at = [&](std::int64_t e) {
    return qn::value_of_element(view, e, problem.scales[static_cast<std::size_t>(e / shape.blocksize)], -0.0f);
  };
  std::vector<float> nearest;
  for (std::int64_t e = 0; e < problem.weight.elements(); ++e) nearest.push_back(value_at(e));
  problem.weight.values = nearest;
  qn::quantize_with_feedback(problem.args());
  view.codes = problem.codes.data();
  std::int64_t different = 0;  // in value: fp4 has two codes of 0
  for (std::int64_t e = 0; e < problem.weight.elements(); ++e)
    different += value_at(e) != nearest[static_cast<std::size_t>(e)];
  EXPECT(different == 0);
}

// ---- bad input ----

// A call of an operation with arguments that differ from `args` by an edit.
template <class Args, class Operation, class Edit>
auto change(Args args, Operation operation, Edit edit) {
  return [=] {
    Args changed = args;
    edit(changed);
    operation(changed, qn::Stream{});
  };
}

TEST(bad_arguments_are_refused) {
  const Format format{"nf4", 4, {qn::kNf4.begin(), qn::kNf4.end()}};
  Random random(7);
  Weight weight({4, 70, 64}, random);
  std::vector<float> scales;
  {
    Tensor x(DType::f32, 3, 5);
    x.fill(random, 1.0f);
    std::vector<float> sums(25);
    const qn::GramArgs args{x.in(), sums.data()};
    expect_refused("x.cols", change(args, qn::gram, [](auto& a) { a.x.cols = 0; }));
    expect_refused("x.rows", change(args, qn::gram, [](auto& a) { a.x.rows = -1; }));
    expect_refused("x.stride", change(args, qn::gram, [](auto& a) { a.x.stride = 4; }));
    expect_refused("x.data", change(args, qn::gram, [](auto& a) { a.x.data = nullptr; }));
    expect_refused("gram", change(args, qn::gram, [](auto& a) { a.gram = nullptr; }));
  }
  const auto on_weight = [](const auto& args, auto operation) {
    expect_refused("N", change(args, operation, [](auto& a) { a.N = 0; }));
    expect_refused("K", change(args, operation, [](auto& a) { a.K = 0; }));
    expect_refused("bits", change(args, operation, [](auto& a) { a.bits = 5; }));
    expect_refused("blocksize", change(args, operation, [](auto& a) { a.blocksize = 48; }));
    expect_refused("code", change(args, operation, [](auto& a) { a.code = nullptr; }));
    expect_refused("weight", change(args, operation, [](auto& a) { a.weight = nullptr; }));
    expect_refused("scales", change(args, operation, [](auto& a) { a.scales = nullptr; }));
    std::vector<float> bad(args.weight, args.weight + args.N * args.K);
    for (const float value : {kNan, kInfinity, -kInfinity}) {
      bad[70] = value;
      expect_refused("weight", change(args, operation, [&](auto& a) { a.weight = bad.data(); }));
    }
  };
  {
    const qn::WeightedScalesArgs args = args_of(weight, format, scales);
    on_weight(args, qn::weighted_scales);
    expect_refused("importance", change(args, qn::weighted_scales, [](auto& a) { a.importance = nullptr; }));
    for (const float value : {kNan, kInfinity, -0.5f}) {
      std::vector<float> bad = weight.importance;
      bad[69] = value;
      expect_refused("importance", change(args, qn::weighted_scales, [&](auto& a) { a.importance = bad.data(); }));
    }
    for (const float value : {kNan, kInfinity, 0.0f, -1.0f})
      expect_refused("lo", change(args, qn::weighted_scales, [&](auto& a) { a.lo = value; }));
    for (const float value : {kNan, kInfinity, 0.4f})
      expect_refused("hi", change(args, qn::weighted_scales, [&](auto& a) { a.hi = value; }));
    for (const int value : {0, 1025})
      expect_refused("steps", change(args, qn::weighted_scales, [&](auto& a) { a.steps = value; }));
    std::vector<float> large(weight.values.size(), 3.3e38f);
    expect_refused("weight", change(args, qn::weighted_scales, [&](auto& a) {
                     a.weight = large.data();
                     a.lo = 1.1f;
                   }));
  }
  {
    Feedback problem({4, 70, 64}, format, random);
    const qn::QuantizeWithFeedbackArgs args = problem.args();
    constexpr auto operation = qn::quantize_with_feedback;
    on_weight(args, operation);
    expect_refused("order", change(args, operation, [](auto& a) { a.order = nullptr; }));
    expect_refused("factor", change(args, operation, [](auto& a) { a.factor = nullptr; }));
    expect_refused("codes", change(args, operation, [](auto& a) { a.codes = nullptr; }));
    for (const std::int64_t column : {std::int64_t{-1}, std::int64_t{70}, problem.order[3]}) {
      std::vector<std::int64_t> bad = problem.order;
      bad[5] = column;
      expect_refused("order", change(args, operation, [&](auto& a) { a.order = bad.data(); }));
    }
    for (const float value : {0.0f, -1.0f, kNan, kInfinity}) {
      std::vector<float> bad = problem.factor;
      bad[70 * 69 + 69] = value;
      expect_refused("factor", change(args, operation, [&](auto& a) { a.factor = bad.data(); }));
    }
    std::vector<float> unstable = problem.factor;  // what is fed back grows beyond fp32
    for (std::int64_t i = 0; i < 70; ++i)
      for (std::int64_t j = i + 1; j < 70; ++j) unstable[static_cast<std::size_t>(i * 70 + j)] = 1e30f;
    expect_refused("factor", change(args, operation, [&](auto& a) { a.factor = unstable.data(); }));
    std::vector<float> bad = problem.scales;
    bad[1] = kNan;
    expect_refused("scales", change(args, operation, [&](auto& a) { a.scales = bad.data(); }));
  }
}

template <class Operation, class Args>
void expect_unavailable(Operation operation, const Args& args) {
  bool refused = false;
  try {
    operation(args, qn::Stream{.device = qn::Device::cuda});
  } catch (const qn::Unavailable&) {
    refused = true;
  }
  EXPECT(refused);
}

TEST(gram_is_near_its_definition_in_float64_and_symmetric) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const GramShape& shape : kGramShapes) test_gram(dtype, shape);
}

TEST(scales_and_codes_have_the_bits_of_the_scalar_backend) {
  for (const Format& format : formats())
    for (const WeightShape& shape : kWeightShapes) {
      test_weighted_scales(shape, format);
      test_feedback(shape, format);
      test_diagonal_factor_gives_the_nearest_levels(shape, format);
    }
}

TEST(device_without_the_operations_is_named) {
  expect_unavailable(qn::gram, qn::GramArgs{});
  expect_unavailable(qn::weighted_scales, qn::WeightedScalesArgs{});
  expect_unavailable(qn::quantize_with_feedback, qn::QuantizeWithFeedbackArgs{});
}

}  // namespace

int main() {
  if (!isa_is_here()) return kSkipped;
  use_pool(1);
  return run_tests();
}
