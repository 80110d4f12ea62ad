// Guards attention of the instruction set in use: results and gradients are near their definition in float64, for every
// dtype, ragged shapes, shared key heads and all kinds of key ranges. ctest runs this test once for each instruction
// set.
//
// Errors that are allowed: a probability and the gradient of a score are rounded once to the dtype, the result is too,
// and a sum of n products in fp32 is off by the root of n, times its operands' norms.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "expect.h"
#include "isa_is_here.h"
#include "pool.h"
#include "qlora_native/qlora_native.h"
#include "tensor.h"

namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kUnits = 8.0;  // of an exponential, and of what is added to its argument

enum class Ranges { all, causal, window, padded, packed };

struct Shape {
  std::int64_t batch, heads, key_heads, queries, keys, head_dim;
  Ranges ranges;
  float scale;
};
// They have blocks that are whole, ragged and of one row; one query whose heads fill a block or more; one dimension and
// several chunks of them; no key, no query and no sequence; and scores so large that a row has one probability.
constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, Ranges::all, 1.0f},           {2, 4, 2, 33, 40, 24, Ranges::all, 0.2f},
    {1, 3, 1, 130, 130, 64, Ranges::causal, 0.125f}, {2, 2, 2, 64, 64, 128, Ranges::causal, 0.1f},
    {1, 2, 1, 70, 200, 80, Ranges::window, 0.1f},    {1, 1, 1, 200, 7, 17, Ranges::all, 0.3f},
    {2, 6, 2, 100, 100, 16, Ranges::padded, 0.25f},  {1, 2, 2, 129, 129, 40, Ranges::packed, 0.15f},
    {1, 2, 1, 65, 66, 32, Ranges::causal, 20.0f},    {1, 2, 1, 257, 330, 72, Ranges::causal, 0.1f},
    {1, 4, 2, 150, 300, 24, Ranges::window, 0.2f},   {1, 2, 1, 5, 0, 8, Ranges::all, 1.0f},
    {1, 2, 1, 0, 5, 8, Ranges::all, 1.0f},           {0, 2, 1, 5, 5, 8, Ranges::all, 1.0f},
    {2, 6, 2, 1, 200, 64, Ranges::all, 0.125f},      {1, 70, 1, 1, 140, 24, Ranges::all, 0.2f},
    {1, 4, 2, 16, 150, 80, Ranges::causal, 0.1f},    {1, 2, 1, 17, 150, 40, Ranges::window, 0.15f},
    {2, 4, 2, 1, 200, 16, Ranges::padded, 0.2f},     {1, 4, 2, 1, 0, 8, Ranges::all, 1.0f}};

// What each query sees, [batch, queries, 2].
std::vector<std::int32_t> ranges_of(const Shape& s) {
  std::vector<std::int32_t> ranges;
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t i = 0; i < s.queries; ++i) {
      std::int64_t begin = 0, end = s.keys;
      if (s.ranges != Ranges::all) end = std::min(i + 1, s.keys);
      if (s.ranges == Ranges::window) begin = std::max<std::int64_t>(0, std::min(i - 9, s.keys));
      if (s.ranges == Ranges::padded) begin = 3 + 70 * b;  // the first queries see nothing
      if (s.ranges == Ranges::packed) begin = i / 50 * 50;
      ranges.push_back(static_cast<std::int32_t>(begin));
      ranges.push_back(static_cast<std::int32_t>(end));
    }
  return ranges;
}

struct Problem {
  Shape shape;
  DType dtype;
  std::vector<std::int32_t> ranges;
  Tensor q, k, v, dout, out, dq, dk, dv;
  std::vector<float> lse;

  Problem(const Shape& s, DType type)
      : shape(s),
        dtype(type),
        ranges(ranges_of(s)),
        q(type, s.batch * s.queries, s.heads * s.head_dim, 2),
        k(type, s.batch * s.keys, s.key_heads * s.head_dim, 4),
        v(type, s.batch * s.keys, s.key_heads * s.head_dim),
        dout(type, s.batch * s.queries, s.heads * s.head_dim, 6),
        out(type, s.batch * s.queries, s.heads * s.head_dim, 2),
        dq(type, s.batch * s.queries, s.heads * s.head_dim, 1),
        dk(type, s.batch * s.keys, s.key_heads * s.head_dim, 3),
        dv(type, s.batch * s.keys, s.key_heads * s.head_dim),
        lse(s.batch * s.heads * s.queries) {
    Random random(static_cast<std::uint64_t>(s.queries + s.keys));
    q.fill(random, 1.0f), k.fill(random, 1.0f), v.fill(random, 1.0f), dout.fill(random, 1.0f);
  }

  // Tokens [batch * rows, heads * head_dim] as heads.
  qn::ConstHeads read(const Tensor& x, std::int64_t heads, std::int64_t rows) const {
    return {x.data(), heads, rows, rows * x.in().stride, shape.head_dim, x.in().stride};
  }
  qn::Heads write(Tensor& x, std::int64_t heads, std::int64_t rows) const {
    return {x.data(), heads, rows, rows * x.in().stride, shape.head_dim, x.in().stride};
  }
  qn::AttentionInputs inputs() const {
    return {.dtype = dtype,
            .batch = shape.batch,
            .head_dim = shape.head_dim,
            .q = read(q, shape.heads, shape.queries),
            .k = read(k, shape.key_heads, shape.keys),
            .v = read(v, shape.key_heads, shape.keys),
            .scale = shape.scale,
            .key_ranges = shape.ranges == Ranges::all ? nullptr : ranges.data(),
            .key_ranges_stride = 2 * shape.queries};
  }
  qn::AttentionArgs forward() { return {inputs(), write(out, shape.heads, shape.queries), lse.data()}; }
  qn::AttentionBackwardArgs backward() {
    return {inputs(),
            read(out, shape.heads, shape.queries),
            lse.data(),
            read(dout, shape.heads, shape.queries),
            write(dq, shape.heads, shape.queries),
            write(dk, shape.key_heads, shape.keys),
            write(dv, shape.key_heads, shape.keys)};
  }
  void run() {
    qn::attention(forward());
    qn::attention_backward(backward());
  }
};

// A sum in float64, and the error that a sum in the library's arithmetic may have.
struct Sum {
  double value = 0.0, error = 0.0;
  void add(double a, double error_of_a, double b) {
    value += a * b;
    error += error_of_a * std::fabs(b);
  }
};

class Expected {
 public:
  explicit Expected(const Problem& problem) : p_(problem), s_(problem.shape) {
    gradients_k_.resize(s_.batch * s_.keys * s_.key_heads * s_.head_dim);
    gradients_v_ = gradients_k_;
    for (std::int64_t b = 0; b < s_.batch; ++b)
      for (std::int64_t h = 0; h < s_.heads; ++h)
        for (std::int64_t i = 0; i < s_.queries; ++i) see_query(b, h, i);
    for (std::int64_t row = 0; row < s_.batch * s_.keys; ++row)
      for (std::int64_t col = 0; col < s_.key_heads * s_.head_dim; ++col) {
        const auto at = static_cast<std::size_t>(row * s_.key_heads * s_.head_dim + col);
        see("dk", p_.dk.at(row, col), gradients_k_[at], double{s_.scale});
        see("dv", p_.dv.at(row, col), gradients_v_[at], 1.0);
      }
  }
  double worst() const { return worst_; }
  const std::string& what() const { return what_; }

 private:
  void see(const char* name, double actual, const Sum& sum, double factor) {
    const double expected = factor * sum.value;
    const double allowed =
        unit_roundoff(p_.dtype) * std::fabs(expected) + factor * sum.error + smallest_normal(p_.dtype);
    const double off = std::fabs(actual - expected) / allowed, ratio = std::isnan(off) ? INFINITY : off;
    if (ratio > worst_) worst_ = ratio, what_ = name;
  }
  double norm(const Tensor& x, std::int64_t row, std::int64_t col) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < s_.head_dim; ++d) sum += double{x.at(row, col + d)} * double{x.at(row, col + d)};
    return std::sqrt(sum);
  }
  double dot(const Tensor& x, std::int64_t x_row, std::int64_t x_col, const Tensor& y, std::int64_t y_row,
             std::int64_t y_col) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < s_.head_dim; ++d)
      sum += double{x.at(x_row, x_col + d)} * double{y.at(y_row, y_col + d)};
    return sum;
  }

  void see_query(std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t row = b * s_.queries + i, col = h * s_.head_dim;
    const std::int64_t key_col = h / (s_.heads / s_.key_heads) * s_.head_dim;
    const std::int64_t begin = p_.ranges[2 * row], end = p_.ranges[2 * row + 1];
    // This is the error of a sum of n products of rounded numbers, relative to the norms.
    const auto of_sum = [&](std::int64_t n) {
      return sum_roundoff(p_.dtype) * kSumFactor * std::sqrt(static_cast<double>(n));
    };
    const double u = unit_roundoff(p_.dtype), of_inner = of_sum(s_.head_dim), key_ats = of_sum(end - begin);
    // Small numbers of float16 are rounded to multiples of 2^-24, and exponentials below about e^-88 are 0 (exp-inl.h).
    const double smallest = p_.dtype == DType::f16 ? 0x1p-25 : 1e-38;

    std::vector<double> scores;
    double largest = -INFINITY, size = 0.0, error_of_score = 0.0;
    for (std::int64_t key = begin; key < end; ++key) {
      const std::int64_t k_row = b * s_.keys + key;
      scores.push_back(double{s_.scale} * dot(p_.q, row, col, p_.k, k_row, key_col));
      largest = std::max(largest, scores.back());
      size = std::max(size, std::fabs(scores.back()));
      error_of_score =
          std::max(error_of_score, of_inner * double{s_.scale} * norm(p_.q, row, col) * norm(p_.k, k_row, key_col));
    }
    // The relative error of a probability: of its score, of those that the sum has, and of the exponential.
    const double of_p = 2.0 * error_of_score + kUnits * kUnit * (1.0 + size);
    double sum = 0.0;
    for (const double score : scores) sum += std::exp(score - largest);
    const double lse = begin < end ? largest + std::log(sum) : -INFINITY;
    const float given = p_.lse[(b * s_.heads + h) * s_.queries + i];
    if (begin < end)
      see("lse", given, {lse, error_of_score + kUnits * kUnit * (1.0 + size)}, 1.0);
    else
      EXPECT(given == -INFINITY);

    const double delta = dot(p_.out, row, col, p_.dout, row, col);
    const double error_of_delta = kUnit * kSumFactor * std::sqrt(static_cast<double>(s_.head_dim)) *
                                  norm(p_.out, row, col) * norm(p_.dout, row, col);
    std::vector<Sum> out(s_.head_dim), dq = out;
    for (std::int64_t key = begin; key < end; ++key) {
      const std::int64_t k_row = b * s_.keys + key;
      const double exact = std::exp(scores[key - begin] - lse);
      const double p = std::exp(scores[key - begin] - double{given});  // what backward has
      const double dp = dot(p_.dout, row, col, p_.v, k_row, key_col), ds = p * (dp - delta);
      const double error_of_ds =
          (std::fabs(ds) * (u + of_p) +
           p * (of_inner * norm(p_.dout, row, col) * norm(p_.v, k_row, key_col) + error_of_delta)) *
              (1.0 + u) +
          smallest * (1.0 + std::fabs(dp - delta));
      const double error_of_p = p * (u + of_p) + smallest;
      for (std::int64_t d = 0; d < s_.head_dim; ++d) {
        const std::int64_t at = d, key_at = k_row * s_.key_heads * s_.head_dim + key_col + d;
        const double q = p_.q.at(row, col + d), k = p_.k.at(k_row, key_col + d), v = p_.v.at(k_row, key_col + d),
                     dout = p_.dout.at(row, col + d);
        out[at].add(exact, exact * (u + of_p + key_ats) + smallest, v);
        dq[at].add(ds, error_of_ds + key_ats * std::fabs(ds), k);
        const double of_queries = of_sum(s_.queries * s_.heads / s_.key_heads);
        gradients_k_[key_at].add(ds, error_of_ds + of_queries * std::fabs(ds), q);
        gradients_v_[key_at].add(p, error_of_p + of_queries * p, dout);
      }
    }
    for (std::int64_t d = 0; d < s_.head_dim; ++d) {
      see("out", p_.out.at(row, col + d), out[d], 1.0);
      see("dq", p_.dq.at(row, col + d), dq[d], double{s_.scale});
    }
  }

  const Problem& p_;
  const Shape& s_;
  std::vector<Sum> gradients_k_, gradients_v_;
  double worst_ = 0.0;
  std::string what_;
};

TEST(results_and_gradients_are_those_of_float64) {
  for (const DType dtype : kDTypes)
    for (const Shape& shape : kShapes) {
      Problem problem(shape, dtype);
      problem.run();
      EXPECT(problem.out.keeps_to_its_columns() && problem.dq.keeps_to_its_columns());
      EXPECT(problem.dk.keeps_to_its_columns() && problem.dv.keeps_to_its_columns());
      const Expected expected(problem);
      EXPECT(expected.worst() <= 1.0);
      if (!(expected.worst() <= 1.0))
        std::printf("  %s of %d x %d x %d over %d keys, %s: %.3g times what is allowed\n", expected.what().c_str(),
                    static_cast<int>(shape.heads), static_cast<int>(shape.queries), static_cast<int>(shape.head_dim),
                    static_cast<int>(shape.keys), qn::name_of(dtype), expected.worst());
    }
}

// Two heads on 16 threads take other tasks than on one thread.
TEST(bits_are_the_same_for_any_number_of_threads) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    std::vector<std::vector<char>> expected;
    for (const int threads : {1, 2, 3, 3, 16}) {
      use_pool(threads);
      Problem problem({1, 4, 2, 200, 210, 72, Ranges::causal, 0.1f}, dtype);
      problem.run();
      const std::vector<std::vector<char>> bytes = {problem.out.bytes(), problem.dq.bytes(), problem.dk.bytes(),
                                                    problem.dv.bytes()};
      if (expected.empty()) expected = bytes;
      EXPECT(bytes == expected);
    }
  }
  use_pool(2);
}

TEST(query_that_is_not_finite_spoils_its_own_row) {
  for (const DType dtype : kDTypes)
    for (const float value : {NAN, INFINITY}) {
      Problem problem({1, 1, 1, 70, 70, 20, Ranges::causal, 0.2f}, dtype);
      problem.q.set(66, 3, value);
      problem.run();
      for (std::int64_t i = 0; i < 70; ++i)
        for (std::int64_t d = 0; d < 20; ++d) EXPECT(std::isnan(problem.out.at(i, d)) == (i == 66));
      EXPECT(std::isnan(problem.lse[66]) && std::isnan(problem.dv.at(0, 0)));
    }
}

// A thread keeps the memory of a call for its next one, in which a block may have fewer queries.
TEST(nothing_of_an_earlier_call_enters_gradients) {
  use_pool(1);
  for (const DType dtype : kDTypes) {
    Problem before({1, 1, 1, 64, 64, 20, Ranges::all, 0.2f}, dtype),
        after({1, 1, 1, 5, 70, 20, Ranges::all, 0.2f}, dtype);
    for (std::int64_t i = 0; i < 64; ++i) before.q.set(i, 0, NAN);
    before.run();
    after.run();
    bool finite = true;
    for (std::int64_t i = 0; i < 70; ++i)
      for (std::int64_t d = 0; d < 20; ++d)
        finite = finite && std::isfinite(after.dk.at(i, d)) && std::isfinite(after.dv.at(i, d));
    EXPECT(finite);
  }
  use_pool(2);
}

TEST(all_sequences_may_share_the_ranges_of_the_first) {
  Problem each({2, 2, 1, 40, 40, 16, Ranges::causal, 0.25f}, DType::f32), shared = each;
  each.run();
  qn::AttentionArgs args = shared.forward();
  args.in.key_ranges_stride = 0;
  qn::attention(args);
  EXPECT(each.out.bytes() == shared.out.bytes());
}

TEST(rotation_and_its_gradient_are_those_of_float64) {
  for (const DType dtype : kDTypes)
    for (const std::int64_t half : {1, 7, 16, 40})
      for (const bool shared : {false, true})
        for (const bool transposed : {false, true}) {
          const std::int64_t batch = 2, heads = 3, rows = 5, D = 2 * half;
          Random random(static_cast<std::uint64_t>(half));
          Tensor x(dtype, batch * rows, heads * D, 2), y(dtype, batch * rows, heads * D, 1);
          Tensor cos(dtype, batch * rows, D), sin(dtype, batch * rows, D);
          x.fill(random, 1.0f), cos.fill(random, 0.5f), sin.fill(random, 0.5f);
          qn::rotary({.dtype = dtype,
                      .batch = batch,
                      .head_dim = D,
                      .x = {x.data(), heads, rows, rows * x.in().stride, D, x.in().stride},
                      .cos = cos.data(),
                      .sin = sin.data(),
                      .shared = shared,
                      .transposed = transposed,
                      .y = {y.data(), heads, rows, rows * y.in().stride, D, y.in().stride}});
          EXPECT(y.keeps_to_its_columns());
          bool near = true;
          for (std::int64_t token = 0; token < batch * rows; ++token)
            for (std::int64_t i = 0; i < heads * D; ++i) {
              const std::int64_t angle = shared ? token % rows : token, d = i % D;
              const std::int64_t other = d < half ? i + half : i - half, of_other = d < half ? d + half : d - half;
              const double sign = (d < half) == transposed ? 1.0 : -1.0;
              const double sine = sign * double{sin.at(angle, transposed ? of_other : d)};
              const double a = double{x.at(token, i)} * double{cos.at(angle, d)}, b = double{x.at(token, other)} * sine;
              const double allowed =
                  unit_roundoff(dtype) * std::fabs(a + b) + 2.0 * kUnit * (std::fabs(a) + std::fabs(b));
              near = near && std::fabs(double{y.at(token, i)} - (a + b)) <= allowed + smallest_normal(dtype);
            }
          EXPECT(near);
        }
}

}  // namespace

int main() {
  if (!isa_is_here()) return kSkipped;
  use_pool(2);
  return run_tests();
}
