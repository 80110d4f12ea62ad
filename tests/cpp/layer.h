// A layer of any shape, format and grouping of rows, with all that the library computes of it, and a check against sums
// in float64.
//
// A sum of K products in fp32, rounded once to a dtype with unit roundoff u, may be off by
//
//   u * |y|  +  kSumFactor * sqrt(K) * r * |x_m| * |w_n|              (element y[m,n] of X . W^T; norms of the rows)
//
// where r is the largest relative error of a single rounding in the sum. The roundings are independent, so their sum
// grows with the root of K, and the product of the norms bounds every partial sum (python/qlora_native/testing.py says
// more).
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "common/layout.h"
#include "common/philox.h"
#include "qlora_native/linear.h"
#include "quantized.h"
#include "tensor.h"

// Rows differ in size, and there are some outliers, so that scales differ.
inline Tensor random_weight(std::int64_t N, std::int64_t K, DType dtype = DType::f32) {
  Random random(static_cast<std::uint64_t>(N * 10000 + K));
  Tensor weight(dtype, N, K);
  for (std::int64_t n = 0; n < N; ++n) {
    const float scale = 0.05f * (1.3f + random.uniform());
    for (std::int64_t k = 0; k < K; ++k)
      weight.set(n, k, scale * random.normal() * ((n * K + k) % 97 == 0 ? 4.0f : 1.0f));
  }
  return weight;
}

// The decoded weight as common/layout.h defines it, rounded once.
inline Tensor decoded_by_definition(const Quantized& quantized, DType dtype) {
  const qn::QuantizedWeightView w = quantized.view();
  Tensor values(dtype, w.count * w.N, w.K);
  for (std::int64_t e = 0; e < w.elements(); ++e) values.set(e / w.K, e % w.K, qn::value_of_element(w, e));
  return values;
}

struct Case {
  std::int64_t M, N, K;
  DType dtype = DType::bf16;
  const char* format = "nf4";
  int blocksize = 64;
  bool double_quant = true, bias = false;
  std::int64_t rank = 0;
  float dropout = 0.0f;
  DType lora_dtype = DType::f32;
  std::int64_t gap = 0;                    // elements between rows, in all matrices with a stride
  std::vector<std::int64_t> offsets = {};  // the offsets of groups, each with an adapter
  bool group_weights = false;              // whether each group has a weight
  bool shared_adapter = false;             // whether all groups share one adapter

  std::int64_t groups() const { return offsets.empty() ? 0 : static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t weights() const { return group_weights ? groups() : 1; }
  std::int64_t adapters() const { return groups() > 0 && !shared_adapter ? groups() : 1; }

  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof(text), "M=%d N=%d K=%d %s %s blocksize %d%s%s rank %d %s dropout %g gap %d",
                  static_cast<int>(M), static_cast<int>(N), static_cast<int>(K), qn::name_of(dtype), format, blocksize,
                  double_quant ? " dq" : "", bias ? " bias" : "", static_cast<int>(rank), qn::name_of(lora_dtype),
                  static_cast<double>(dropout), static_cast<int>(gap));
    std::string name = text;
    if (!offsets.empty()) name += group_weights ? ", weights of groups" : ", adapters of groups";
    for (const std::int64_t offset : offsets) name += " " + std::to_string(offset);
    return name;
  }
};

class Layer {
 public:
  explicit Layer(const Case& c)
      : c(c),
        weight(random_weight(c.weights() * c.N, c.K).in(), format_named(c.format), c.blocksize, c.double_quant,
               c.weights()),
        x(c.dtype, c.M, c.K, c.gap),
        dy(c.dtype, c.M, c.N, c.gap),
        bias(c.dtype, c.weights(), c.N),
        a(c.lora_dtype, c.adapters() * c.rank, c.K),
        b(c.lora_dtype, c.adapters() * c.N, c.rank),
        y(c.dtype, c.M, c.N, c.gap),
        u(c.dtype, c.M, c.rank, c.gap),
        dx(c.dtype, c.M, c.K, c.gap),
        v(c.dtype, c.M, c.rank, c.gap),
        da(c.lora_dtype, c.adapters() * c.rank, c.K),
        db(c.lora_dtype, c.adapters() * c.N, c.rank) {
    Random random(static_cast<std::uint64_t>(c.M + 1000 * c.N + c.K));
    x.fill(random, 1.0f);
    dy.fill(random, 1.0f);
    bias.fill(random, 1.0f);
    a.fill(random, 1.0f / std::sqrt(static_cast<float>(c.K)));
    b.fill(random, 0.1f);
  }

  qn::RowGroups groups() const { return {.count = c.groups(), .offsets = c.offsets.data()}; }
  qn::LoraView lora() const {
    return {.rank = c.rank,
            .count = c.adapters(),
            .dtype = c.lora_dtype,
            .a = a.data(),
            .b = b.data(),
            .scaling = kScaling,
            .dropout = c.dropout,
            .seed = seed,
            .device_seed = device_seed};
  }
  qn::LinearForwardArgs forward_args() {
    return {.weight = weight.view(),
            .lora = lora(),
            .groups = groups(),
            .x = x.in(),
            .bias = c.bias ? bias.data() : nullptr,
            .y = y.out(),
            .u = u.out()};
  }
  qn::LinearBackwardInputArgs backward_args() {
    return {.weight = weight.view(), .lora = lora(), .groups = groups(), .dy = dy.in(), .dx = dx.out(), .v = v.out()};
  }
  qn::LoraGradientsArgs gradients_args() {
    return {.lora = lora(),
            .groups = groups(),
            .x = x.in(),
            .dy = dy.in(),
            .u = u.in(),
            .v = v.in(),
            .da = da.data(),
            .db = db.data()};
  }
  void forward() { qn::linear_forward(forward_args()); }
  void backward() { qn::linear_backward_input(backward_args()); }
  void gradients() {
    if (c.rank > 0) qn::lora_gradients(gradients_args());
  }
  void run() {
    forward();
    backward();
    gradients();
  }

  // The bytes of the quantized weight and of all results.
  std::vector<char> bytes() const {
    std::vector<char> all(weight.codes.begin(), weight.codes.end());
    all.insert(all.end(), weight.absmax_codes.begin(), weight.absmax_codes.end());
    const char* const nested = reinterpret_cast<const char*>(weight.nested_absmax.data());
    all.insert(all.end(), nested, nested + weight.nested_absmax.size() * sizeof(float));
    for (const Tensor* tensor : {&y, &u, &dx, &v, &da, &db})
      all.insert(all.end(), tensor->bytes().begin(), tensor->bytes().end());
    return all;
  }

  // Whether gradients() ran decides whether dA and dB are checked.
  void check(bool with_gradients = true) const {
    for (const Tensor* tensor : {&y, &u, &dx, &v}) EXPECT(tensor->keeps_to_its_columns());
    const Tensor decoded = decoded_by_definition(weight, c.dtype);
    if (c.groups() == 0) check_rows(decoded, 0, c.M, 0, 0);
    if (c.groups() > 0 && c.offsets[0] > 0) check_rows(decoded, 0, c.offsets[0], 0, -1);
    for (std::int64_t g = 0; g < c.groups(); ++g)
      check_rows(decoded, c.offsets[g], c.offsets[g + 1], c.group_weights ? g : 0, c.shared_adapter ? 0 : g);
    if (!with_gradients || c.rank == 0) return;
    if (c.groups() == 0) check_gradients(0, c.M, 0);
    if (c.groups() > 0 && c.shared_adapter) check_gradients(c.offsets[0], c.M, 0);
    for (std::int64_t g = 0; g < c.groups() && !c.shared_adapter; ++g)
      check_gradients(c.offsets[g], c.offsets[g + 1], g);
  }

  static constexpr float kScaling = 1.7f;
  Case c;
  Quantized weight;
  Tensor x, dy, bias, a, b;
  Tensor y, u, dx, v, da, db;
  std::uint64_t seed = 0x123456789ABCDEF;
  const std::uint64_t* device_seed = nullptr;
  bool rounds_adapter_part = false;  // whether s*B is rounded for V, and a part of Y or dX before W's is added

 private:
  using Values = std::vector<double>;

  static Values transposed(const Values& m, std::int64_t rows, std::int64_t cols) {
    Values result(m.size());
    for (std::int64_t i = 0; i < rows * cols; ++i) result[i % cols * rows + i / cols] = m[i];
    return result;
  }
  // Rows begin ... end-1 of a matrix.
  static Values rows_of(const Tensor& m, std::int64_t begin, std::int64_t end) {
    Values values;
    for (std::int64_t i = begin * m.cols(); i < end * m.cols(); ++i) values.push_back(m.at(i / m.cols(), i % m.cols()));
    return values;
  }
  Values mask_of(std::int64_t begin, std::int64_t end) const {
    const std::uint32_t threshold = qn::dropout_threshold(c.dropout);
    Values mask;
    for (std::int64_t i = begin * c.K; i < end * c.K; ++i)
      mask.push_back(c.rank == 0 || qn::dropout_keeps(seed, i / c.K, i % c.K, threshold) ? 1.0 : 0.0);
    return mask;
  }
  static Values product(Values a, const Values& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] *= b[i];
    return a;
  }

  // Checks rows of x that are multiplied by weight number `weight` of `decoded`, and by adapter number `adapter`, or by
  // none if that is -1.
  void check_rows(const Tensor& decoded, std::int64_t begin, std::int64_t end, std::int64_t weight_index,
                  std::int64_t adapter) const {
    const std::int64_t M = end - begin, N = c.N, K = c.K, R = adapter < 0 ? 0 : c.rank;
    const Values w = rows_of(decoded, weight_index * N, (weight_index + 1) * N), mask = mask_of(begin, end);
    const Values x_rows = rows_of(x, begin, end), dy_rows = rows_of(dy, begin, end);
    const double keep = double{1.0f / (1.0f - c.dropout)}, s = double{kScaling};

    Sums y_sums(M, N), dx_sums(M, K);
    y_sums.add_product(x_rows, transposed(w, N, K), K);
    Sums y_part(M, N);
    for (std::int64_t i = 0; i < M * N && c.bias; ++i) y_part.value[i] += bias.at(weight_index, i % N);
    dx_sums.add_product(dy_rows, w, N);
    if (R > 0) {
      // The adapter as the products use it: A, B and s*B are rounded to the dtype of x.
      Values a_rows, b_rows, scaled_b;
      for (double value : rows_of(a, adapter * R, (adapter + 1) * R))
        a_rows.push_back(rounded(c.dtype, static_cast<float>(value)));
      for (double value : rows_of(b, adapter * N, (adapter + 1) * N)) {
        b_rows.push_back(rounded(c.dtype, static_cast<float>(value)));
        scaled_b.push_back(rounded(c.dtype, kScaling * static_cast<float>(value)));
      }
      const Values u_rows = rows_of(u, begin, end), v_rows = rows_of(v, begin, end);
      Sums u_sums(M, R), v_sums(M, R), dx_part(M, K);
      u_sums.add_product(product(x_rows, mask), transposed(a_rows, R, K), K);
      u_sums.scale(keep);
      expect_close("u", u_rows, u_sums, c.dtype, c.dtype);
      v_sums.add_product(dy_rows, rounds_adapter_part ? scaled_b : b_rows, N);
      v_sums.scale(rounds_adapter_part ? keep : s * keep);
      expect_close("v", v_rows, v_sums, c.dtype, c.dtype);
      y_part.add_product(u_rows, transposed(scaled_b, N, R), R);
      dx_part.add_product(v_rows, a_rows, R);
      dx_part.value = product(dx_part.value, mask);
      if (rounds_adapter_part) y_part.add_rounding(c.dtype), dx_part.add_rounding(c.dtype);
      dx_sums.add(dx_part);
    }
    y_sums.add(y_part);
    expect_close("y", rows_of(y, begin, end), y_sums, c.dtype, c.dtype);
    expect_close("dx", rows_of(dx, begin, end), dx_sums, c.dtype, c.dtype);
  }
  // Checks dA and dB of an adapter, which are sums over its rows.
  void check_gradients(std::int64_t begin, std::int64_t end, std::int64_t adapter) const {
    const std::int64_t M = end - begin, N = c.N, K = c.K, R = c.rank;
    Sums da_sums(R, K), db_sums(N, R);
    da_sums.add_product(transposed(rows_of(v, begin, end), M, R), product(rows_of(x, begin, end), mask_of(begin, end)),
                        M);
    expect_close("da", rows_of(da, adapter * R, (adapter + 1) * R), da_sums, c.dtype, c.lora_dtype);
    db_sums.add_product(transposed(rows_of(dy, begin, end), M, N), rows_of(u, begin, end), M);
    db_sums.scale(double{kScaling});
    expect_close("db", rows_of(db, adapter * N, (adapter + 1) * N), db_sums, c.dtype, c.lora_dtype);
  }

  // A matrix of sums in float64. Beside each sum lies sqrt(terms) * |row| * |column| of the products in it.
  struct Sums {
    std::int64_t rows, cols;
    Values value, norms;
    Sums(std::int64_t rows, std::int64_t cols) : rows(rows), cols(cols), value(rows * cols), norms(value) {}

    // Adds x[rows, inner] . w[inner, cols].
    void add_product(const Values& x, const Values& w, std::int64_t inner) {
      Values row_squares(rows), col_squares(cols);
      for (std::int64_t j = 0; j < inner * cols; ++j) col_squares[j % cols] += w[j] * w[j];
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < inner; ++j) {
          const double factor = x[i * inner + j];
          row_squares[i] += factor * factor;
          for (std::int64_t k = 0; k < cols; ++k) value[i * cols + k] += factor * w[j * cols + k];
        }
      for (std::int64_t i = 0; i < rows * cols; ++i)
        norms[i] += std::sqrt(static_cast<double>(inner) * row_squares[i / cols] * col_squares[i % cols]);
    }
    void scale(double factor) {
      for (double& each : value) each *= factor;
      for (double& each : norms) each *= std::fabs(factor);
    }
    // The sums are rounded to the dtype in between.
    void add_rounding(DType dtype) {
      for (std::size_t i = 0; i < value.size(); ++i)
        norms[i] += unit_roundoff(dtype) / (kSumFactor * sum_roundoff(dtype)) * std::fabs(value[i]);
    }
    void add(const Sums& other) {
      for (std::size_t i = 0; i < value.size(); ++i) {
        value[i] += other.value[i];
        norms[i] += other.norms[i];
      }
    }
  };

  // `multiplied` is the dtype of the operands, which decides how a sum rounds; `dtype` is that of the results.
  void expect_close(const char* name, const Values& values, const Sums& expected, DType multiplied, DType dtype) const {
    const double smallest = std::max(smallest_normal(multiplied), smallest_normal(dtype));
    double worst = 0.0;
    std::size_t where = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double allowed = unit_roundoff(dtype) * std::fabs(expected.value[i]) +
                             kSumFactor * sum_roundoff(multiplied) * expected.norms[i] + smallest;
      const double excess = std::fabs(values[i] - expected.value[i]) / allowed;
      if (!(excess <= worst)) {  // true for NaN, too
        worst = excess;
        where = i;
      }
    }
    EXPECT(worst <= 1.0);
    if (!(worst <= 1.0))
      std::printf("  %s: %s[%d, %d]: expected %.9g, got %.9g, %.3g times what is allowed\n", c.name().c_str(), name,
                  static_cast<int>(where / expected.cols), static_cast<int>(where % expected.cols),
                  expected.value[where], values[where], worst);
  }
};
