// Guards every operation of the instruction set in use: a decoded weight and a step of an optimizer have the bits that
// the headers define, and products are near sums in float64. ctest runs this test once for each instruction set; it
// exits 1 on a failure.
//
// A sum of K products in fp32, rounded once to a dtype with unit roundoff u, may be off by
//
//   u * |y|  +  kSumFactor * sqrt(K) * r * |x_m| * |w_n|              (element y[m,n] of X . W^T; norms of the rows)
//
// where r is the largest relative error of a single rounding in the sum. The roundings are independent, so their sum
// grows with the root of K, and the product of the norms bounds every partial sum (python/qlora_native/testing.py says
// more).
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "common/codebook.h"
#include "common/float16.h"
#include "common/layout.h"
#include "common/optimizer.h"
#include "common/philox.h"
#include "expect.h"
#include "isa_is_here.h"
#include "pool.h"
#include "qlora_native/qlora_native.h"
#include "quantized.h"
#include "tensor.h"

namespace qn = qlora_native;
using qn::DType;

namespace {

constexpr int kBlocksizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};

// ---- quantized weights ----

// A user's codebook: no level is 0, two levels are equal, and all distances differ.
constexpr float kOwnCodebook[16] = {-1.0f, -0.83f, -0.61f, -0.47f, -0.36f, -0.21f, -0.13f, -0.04f,
                                    0.02f, 0.09f,  0.17f,  0.29f,  0.29f,  0.52f,  0.71f,  1.0f};
const std::vector<Format>& formats() {
  static const std::vector<Format> all = {
      format_named("nf4"), format_named("fp4"), format_named("int4"), format_named("int8"), {"own", 4, kOwnCodebook}};
  return all;
}

// The formats that products are tested with: first those of any blocksize, then those with a fixed blocksize and scales
// of 8 bits.
const std::vector<Format>& product_formats() {
  static const std::vector<Format> all = [] {
    std::vector<Format> both = formats();
    for (const char* name : {"mxfp4", "nvfp4"}) both.push_back(format_named(name));
    return both;
  }();
  return all;
}

struct Shape {
  std::int64_t N, K;
};
// The shapes have one element, less than a block, K of one less and one more than 64, odd sizes (two rows share a
// byte), rows of one element, a K that 4 does not divide, and rows of whole chunks, an odd and an even number of them.
constexpr Shape kShapes[] = {{1, 1}, {1, 64}, {5, 63}, {3, 65}, {7, 1}, {48, 96}, {65, 128}, {19, 342}, {18, 192}};

// Rows differ in size, and there are some outliers, so that scales differ.
Tensor random_weight(Shape shape, DType dtype) {
  Random random(static_cast<std::uint64_t>(shape.N * 10000 + shape.K));
  Tensor weight(dtype, shape.N, shape.K);
  for (std::int64_t n = 0; n < shape.N; ++n) {
    const float scale = 0.05f * (1.3f + random.uniform());
    for (std::int64_t k = 0; k < shape.K; ++k)
      weight.set(n, k, scale * random.normal() * ((n * shape.K + k) % 97 == 0 ? 4.0f : 1.0f));
  }
  return weight;
}

// The decoded weight as common/layout.h defines it, rounded once.
Tensor decoded_by_definition(const Quantized& quantized, DType dtype) {
  const qn::QuantizedWeightView w = quantized.view();
  Tensor values(dtype, w.count * w.N, w.K);
  for (std::int64_t e = 0; e < w.elements(); ++e)
    values.set(e / w.K, e % w.K, qn::value_of_element(w, e, qn::scale_of_block(w, e / w.blocksize)));
  return values;
}

template <class Name>
void expect_same_bits(const Tensor& actual, const Tensor& expected, const Name& name) {
  const bool same = actual.bytes() == expected.bytes();
  EXPECT(same);
  for (std::int64_t i = 0; i < actual.rows() && !same; ++i)
    for (std::int64_t j = 0; j < actual.cols(); ++j)
      if (actual.at(i, j) != expected.at(i, j)) {
        std::printf("  %s of [%d, %d] %s: [%d, %d] is %a, not %a\n", name().c_str(), static_cast<int>(actual.rows()),
                    static_cast<int>(actual.cols()), qn::name_of(actual.dtype()), static_cast<int>(i),
                    static_cast<int>(j), static_cast<double>(actual.at(i, j)), static_cast<double>(expected.at(i, j)));
        return;
      }
}

template <class F>
void for_each_quantization(const F& f) {
  for (const Format& format : formats())
    for (const int blocksize : kBlocksizes)
      for (const bool double_quant : {false, true}) f(format, blocksize, double_quant);
}

void decoded_weight_is_level_times_scale_rounded_once() {
  for (const Shape shape : kShapes) {
    const Tensor weight = random_weight(shape, DType::f32);
    for_each_quantization([&](const Format& format, int blocksize, bool double_quant) {
      const Quantized quantized(weight.in(), format, blocksize, double_quant);
      for (const DType dtype : kDTypes) {
        Tensor decoded(dtype, shape.N, shape.K);
        qn::dequantize({.weight = quantized.view(), .dtype = dtype, .out = decoded.data()});
        expect_same_bits(decoded, decoded_by_definition(quantized, dtype), [&] {
          return std::string(format.name) + " blocksize " + std::to_string(blocksize) + (double_quant ? " dq" : "");
        });
      }
    });
  }
}

// Looks up rows as an embedding does: in any order, some more than once, and in all weights that lie one below the
// other.
void decoded_rows_are_those_of_the_decoded_weight() {
  for (const Shape shape : kShapes) {
    const std::int64_t count = shape.N % 3 == 0 ? 3 : 1;
    const Tensor weight = random_weight(shape, DType::f32);
    std::vector<std::int64_t> rows{shape.N - 1, 0, shape.N / 2, 0};
    for (std::int64_t i = 0; i < 40; ++i) rows.push_back(i * 7 % shape.N);
    const auto row_count = static_cast<std::int64_t>(rows.size());
    for_each_quantization([&](const Format& format, int blocksize, bool double_quant) {
      const Quantized quantized(weight.in(), format, blocksize, double_quant, count);
      for (const DType dtype : kDTypes) {
        const Tensor whole = decoded_by_definition(quantized, dtype);
        Tensor expected(dtype, row_count, shape.K), decoded(dtype, row_count, shape.K);
        for (std::int64_t i = 0; i < row_count; ++i)
          for (std::int64_t k = 0; k < shape.K; ++k) expected.set(i, k, whole.at(rows[static_cast<std::size_t>(i)], k));
        qn::dequantize({.weight = quantized.view(),
                        .dtype = dtype,
                        .rows = rows.data(),
                        .row_count = row_count,
                        .out = decoded.data()});
        expect_same_bits(decoded, expected,
                         [&] { return std::string(format.name) + " rows, blocksize " + std::to_string(blocksize); });
      }
    });
  }
}

void decoded_microscaled_weight_is_level_times_scale_rounded_once() {
  for (const Shape shape : kShapes) {
    const Tensor weight = random_weight(shape, DType::f32);
    for (const auto& [format, blocksize] : {std::pair{5, 32}, std::pair{6, 16}}) {
      const Quantized quantized(weight.in(), product_formats()[static_cast<std::size_t>(format)], blocksize, false);
      for (const DType dtype : kDTypes) {
        Tensor decoded(dtype, shape.N, shape.K);
        qn::dequantize({.weight = quantized.view(), .dtype = dtype, .out = decoded.data()});
        expect_same_bits(decoded, decoded_by_definition(quantized, dtype),
                         [&] { return "blocksize " + std::to_string(blocksize); });
      }
    }
  }
}

// A file may hold scales that are not finite. A NaN whose last bits are all set must not become another value when it
// is rounded.
void scale_that_is_not_finite_decodes_as_defined() {
  const Tensor weight = random_weight({7, 65}, DType::f32);
  for (const Format& format : formats())
    for (const DType dtype : kDTypes) {
      Quantized quantized(weight.in(), format, 32, false);
      quantized.absmax[0] = std::bit_cast<float>(0x7FFFFFFFu);
      quantized.absmax[2] = std::bit_cast<float>(0xFFFFFFFFu);
      quantized.absmax[3] = INFINITY;
      quantized.absmax[5] = std::numeric_limits<float>::max();
      const Tensor expected = decoded_by_definition(quantized, dtype);
      Tensor decoded(dtype, 7, 65);
      qn::dequantize({.weight = quantized.view(), .dtype = dtype, .out = decoded.data()});
      for (std::int64_t e = 0; e < 7 * 65; ++e) {
        const float actual = decoded.at(e / 65, e % 65), wanted = expected.at(e / 65, e % 65);
        EXPECT(std::isnan(wanted) ? std::isnan(actual) : actual == wanted);
      }
    }
}

double distance_to_nearest(const std::vector<double>& levels, double value) {  // levels ascend
  const auto above = std::lower_bound(levels.begin(), levels.end(), value);
  const double to_above = above == levels.end() ? INFINITY : *above - value;
  return std::min(to_above, above == levels.begin() ? INFINITY : value - above[-1]);
}

// If two levels are nearly equally near, either is right, because midpoints are rounded to fp32.
void code_is_that_of_the_nearest_level() {
  for (const Format& format : formats()) {
    std::vector<double> levels;
    for (int i = 0; i < 255 && format.bits == 8; ++i) levels.push_back((i - 127) / 127.0);
    for (int i = 0; i < 16 && format.bits == 4; ++i) levels.push_back(format.code[i]);
    std::sort(levels.begin(), levels.end());
    for (const Shape shape : kShapes)
      for (const DType dtype : kDTypes)
        for (const int blocksize : kBlocksizes) {
          const Tensor weight = random_weight(shape, dtype);
          const Quantized quantized(weight.in(), format, blocksize, false);
          EXPECT(quantized.non_finite.count == 0 && quantized.non_finite.first == -1);
          qn::QuantizedWeightView unscaled = quantized.view();
          const std::int64_t elements = shape.N * shape.K;
          std::int64_t wrong = 0;
          for (std::int64_t first = 0; first < elements; first += blocksize) {
            const std::int64_t end = std::min(elements, first + blocksize);
            const auto at = [&](std::int64_t e) { return weight.at(e / shape.K, e % shape.K); };
            float absmax = 0.0f;
            for (std::int64_t e = first; e < end; ++e) absmax = std::max(absmax, std::fabs(at(e)));
            wrong += quantized.absmax[static_cast<std::size_t>(first / blocksize)] != absmax;
            for (std::int64_t e = first; e < end; ++e) {
              const double scaled = double{at(e)} * double{1.0f / absmax};
              const double chosen = qn::value_of_element(unscaled, e, 1.0f);
              wrong += !(std::fabs(chosen - scaled) <= distance_to_nearest(levels, scaled) + 0x1p-23);
            }
          }
          EXPECT(wrong == 0);
        }
  }
}

void scale_in_8_bits_is_the_nearest() {
  const std::vector<double> levels(qn::dynamic_map().begin(), qn::dynamic_map().end());
  for (const Shape shape : {Shape{1, 1}, Shape{3, 65}, Shape{48, 96}, Shape{65, 1024}}) {
    const Quantized q(random_weight(shape, DType::f32).in(), formats()[0], 32, true);
    double mean = 0.0;
    for (float scale : q.absmax) mean += double{scale} / static_cast<double>(q.absmax.size());
    EXPECT(std::fabs(q.offset - mean) <= 0x1p-22 * mean);
    std::int64_t wrong = 0;
    for (std::size_t first = 0; first < q.absmax.size(); first += 256) {
      const std::size_t end = std::min(q.absmax.size(), first + 256);
      float absmax = 0.0f;
      for (std::size_t i = first; i < end; ++i) absmax = std::max(absmax, std::fabs(q.absmax[i] - q.offset));
      wrong += q.nested_absmax[first / 256] != absmax;
      for (std::size_t i = first; i < end; ++i) {
        const double scaled = absmax > 0.0f ? double{q.absmax[i] - q.offset} / absmax : 0.0;
        wrong += !(std::fabs(levels[q.absmax_codes[i]] - scaled) <= distance_to_nearest(levels, scaled) + 0x1p-23);
      }
    }
    EXPECT(wrong == 0);
  }
}

void values_that_are_not_finite_are_counted() {
  for (const DType dtype : kDTypes)
    for (const Format& format : formats()) {
      Tensor weight = random_weight({9, 171}, dtype);
      weight.set(1, 2, NAN);
      weight.set(1, 3, INFINITY);
      weight.set(8, 170, -INFINITY);
      const Quantized quantized(weight.in(), format, 64, false);
      EXPECT(quantized.non_finite.count == 3 && quantized.non_finite.first == 171 + 2);
    }
}

// ---- products ----

struct Case {
  std::int64_t M, N, K;
  DType dtype;
  int format = 0, blocksize = 64;
  bool double_quant = true, bias = false;
  std::int64_t rank = 0;
  float dropout = 0.0f;
  DType lora_dtype = DType::f32;
  std::int64_t gap = 0;                    // elements between rows, in all matrices with a stride
  std::vector<std::int64_t> offsets = {};  // the offsets of groups, each with its own adapter
  bool group_weights = false;              // whether each group has its own weight
  bool shared_adapter = false;             // whether all groups share one adapter

  std::int64_t groups() const { return offsets.empty() ? 0 : static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t weights() const { return group_weights ? groups() : 1; }
  std::int64_t adapters() const { return groups() > 0 && !shared_adapter ? groups() : 1; }

  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof(text), "M=%d N=%d K=%d %s %s blocksize %d%s%s rank %d %s dropout %g gap %d",
                  static_cast<int>(M), static_cast<int>(N), static_cast<int>(K), qn::name_of(dtype),
                  product_formats()[static_cast<std::size_t>(format)].name, blocksize, double_quant ? " dq" : "",
                  bias ? " bias" : "", static_cast<int>(rank), qn::name_of(lora_dtype), static_cast<double>(dropout),
                  static_cast<int>(gap));
    std::string name = text;
    if (!offsets.empty()) name += group_weights ? ", weights of groups" : ", adapters of groups";
    for (const std::int64_t offset : offsets) name += " " + std::to_string(offset);
    return name;
  }
};

// A layer with all of its results.
class Layer {
 public:
  explicit Layer(const Case& c)
      : c_(c),
        weight_(random_weight({c.weights() * c.N, c.K}, DType::f32).in(),
                product_formats()[static_cast<std::size_t>(c.format)], c.blocksize, c.double_quant, c.weights()),
        x_(c.dtype, c.M, c.K, c.gap),
        dy_(c.dtype, c.M, c.N, c.gap),
        bias_(c.dtype, c.weights(), c.N),
        a_(c.lora_dtype, c.adapters() * c.rank, c.K),
        b_(c.lora_dtype, c.adapters() * c.N, c.rank),
        y_(c.dtype, c.M, c.N, c.gap),
        u_(c.dtype, c.M, c.rank, c.gap),
        dx_(c.dtype, c.M, c.K, c.gap),
        v_(c.dtype, c.M, c.rank, c.gap),
        da_(c.lora_dtype, c.adapters() * c.rank, c.K),
        db_(c.lora_dtype, c.adapters() * c.N, c.rank) {
    Random random(static_cast<std::uint64_t>(c.M + 1000 * c.N + c.K));
    x_.fill(random, 1.0f);
    dy_.fill(random, 1.0f);
    bias_.fill(random, 1.0f);
    a_.fill(random, 1.0f / std::sqrt(static_cast<float>(c.K)));
    b_.fill(random, 0.1f);
  }

  void run() {
    const qn::RowGroups groups{.count = c_.groups(), .offsets = c_.offsets.data()};
    const qn::LoraView lora{.rank = c_.rank,
                            .count = c_.adapters(),
                            .dtype = c_.lora_dtype,
                            .a = a_.data(),
                            .b = b_.data(),
                            .scaling = kScaling,
                            .dropout = c_.dropout,
                            .seed = kSeed};
    qn::linear_forward({.weight = weight_.view(),
                        .lora = lora,
                        .groups = groups,
                        .x = x_.in(),
                        .bias = c_.bias ? bias_.data() : nullptr,
                        .y = y_.out(),
                        .u = u_.out()});
    qn::linear_backward_input(
        {.weight = weight_.view(), .lora = lora, .groups = groups, .dy = dy_.in(), .dx = dx_.out(), .v = v_.out()});
    if (c_.rank > 0)
      qn::lora_gradients({.lora = lora,
                          .groups = groups,
                          .x = x_.in(),
                          .dy = dy_.in(),
                          .u = u_.in(),
                          .v = v_.in(),
                          .da = da_.data(),
                          .db = db_.data()});
  }

  // The bytes of all results.
  std::vector<char> bytes() const {
    std::vector<char> all(weight_.codes.begin(), weight_.codes.end());
    for (const Tensor* tensor : {&y_, &u_, &dx_, &v_, &da_, &db_})
      all.insert(all.end(), tensor->bytes().begin(), tensor->bytes().end());
    return all;
  }

  void check() const {
    for (const Tensor* tensor : {&y_, &u_, &dx_, &v_}) EXPECT(tensor->keeps_to_its_columns());
    const Tensor decoded = decoded_by_definition(weight_, c_.dtype);
    if (c_.groups() == 0) return check_rows(decoded, 0, c_.M, 0, 0);
    if (c_.offsets[0] > 0) check_rows(decoded, 0, c_.offsets[0], 0, -1);
    for (std::int64_t g = 0; g < c_.groups(); ++g) {
      const auto i = static_cast<std::size_t>(g);
      check_rows(decoded, c_.offsets[i], c_.offsets[i + 1], c_.group_weights ? g : 0, g);
    }
    if (c_.shared_adapter) check_gradients(c_.offsets[0], c_.M, 0);
  }

 private:
  static constexpr float kScaling = 1.7f;
  static constexpr std::uint64_t kSeed = 0x123456789ABCDEF;

  static std::vector<double> transposed(const std::vector<double>& m, std::int64_t rows, std::int64_t cols) {
    std::vector<double> result(m.size());
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < cols; ++j)
        result[static_cast<std::size_t>(j * rows + i)] = m[static_cast<std::size_t>(i * cols + j)];
    return result;
  }

  // Rows begin ... end-1 of a matrix.
  static std::vector<double> rows_of(const Tensor& m, std::int64_t begin, std::int64_t end) {
    std::vector<double> values;
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t j = 0; j < m.cols(); ++j) values.push_back(m.at(i, j));
    return values;
  }
  std::vector<double> mask_of(std::int64_t begin, std::int64_t end) const {
    const std::uint32_t threshold = qn::dropout_threshold(c_.dropout);
    std::vector<double> mask;
    for (std::int64_t i = begin * c_.K; i < end * c_.K; ++i)
      mask.push_back(c_.rank == 0 || qn::dropout_keeps(kSeed, i / c_.K, i % c_.K, threshold) ? 1.0 : 0.0);
    return mask;
  }

  // Checks rows of x that are multiplied by weight number `weight` of `decoded`, and by adapter number `adapter`, or by
  // none if that is -1.
  void check_rows(const Tensor& decoded, std::int64_t begin, std::int64_t end, std::int64_t weight,
                  std::int64_t adapter) const {
    const bool own = !c_.shared_adapter;
    if (c_.shared_adapter && adapter > 0) adapter = 0;
    const std::int64_t M = end - begin, N = c_.N, K = c_.K, R = adapter < 0 ? 0 : c_.rank;
    const std::vector<double> w = rows_of(decoded, weight * N, (weight + 1) * N);
    const std::vector<double> x = rows_of(x_, begin, end), dy = rows_of(dy_, begin, end);
    const std::vector<double> u = rows_of(u_, begin, end), v = rows_of(v_, begin, end), mask = mask_of(begin, end);
    std::vector<double> dropped = x;
    for (std::size_t i = 0; i < x.size(); ++i) dropped[i] *= mask[i];
    const double keep = double{1.0f / (1.0f - c_.dropout)}, s = double{kScaling};

    Sums y(M, N), dx(M, K);
    y.add_product(x, transposed(w, N, K), K);
    if (c_.bias)
      for (std::int64_t i = 0; i < M * N; ++i) y.add(i, bias_.at(weight, i % N));
    dx.add_product(dy, w, N);
    if (R > 0) {
      // The adapter as the products use it: A, B and s*B are rounded to the dtype of x.
      std::vector<double> a, b, sb;
      for (double value : rows_of(a_, adapter * R, (adapter + 1) * R))
        a.push_back(rounded(c_.dtype, static_cast<float>(value)));
      for (double value : rows_of(b_, adapter * N, (adapter + 1) * N)) {
        b.push_back(rounded(c_.dtype, static_cast<float>(value)));
        sb.push_back(rounded(c_.dtype, kScaling * static_cast<float>(value)));
      }
      Sums u_sums(M, R), v_sums(M, R), low_rank(M, K);
      u_sums.add_product(dropped, transposed(a, R, K), K);
      u_sums.scale(keep);
      expect_close("u", u, u_sums, c_.dtype, c_.dtype);
      v_sums.add_product(dy, b, N);
      v_sums.scale(s * keep);
      expect_close("v", v, v_sums, c_.dtype, c_.dtype);
      y.add_product(u, transposed(sb, N, R), R);
      low_rank.add_product(v, a, R);
      low_rank.multiply(mask);
      dx.add(low_rank);
      if (own) check_gradients(begin, end, adapter);
    }
    expect_close("y", rows_of(y_, begin, end), y, c_.dtype, c_.dtype);
    expect_close("dx", rows_of(dx_, begin, end), dx, c_.dtype, c_.dtype);
  }
  // Checks dA and dB of an adapter, which are sums over its rows.
  void check_gradients(std::int64_t begin, std::int64_t end, std::int64_t adapter) const {
    const std::int64_t M = end - begin, N = c_.N, K = c_.K, R = c_.rank;
    if (R == 0) return;
    const std::vector<double> mask = mask_of(begin, end);
    std::vector<double> dropped = rows_of(x_, begin, end);
    for (std::size_t i = 0; i < dropped.size(); ++i) dropped[i] *= mask[i];
    Sums da(R, K), db(N, R);
    da.add_product(transposed(rows_of(v_, begin, end), M, R), dropped, M);
    expect_close("da", rows_of(da_, adapter * R, (adapter + 1) * R), da, c_.dtype, c_.lora_dtype);
    db.add_product(transposed(rows_of(dy_, begin, end), M, N), rows_of(u_, begin, end), M);
    db.scale(double{kScaling});
    expect_close("db", rows_of(db_, adapter * N, (adapter + 1) * N), db, c_.dtype, c_.lora_dtype);
  }

  // A matrix of sums in float64. Beside each sum lies sqrt(terms) * |row| * |column| of the products in it.
  struct Sums {
    std::int64_t rows, cols;
    std::vector<double> value, norms;
    Sums(std::int64_t rows, std::int64_t cols)
        : rows(rows), cols(cols), value(static_cast<std::size_t>(rows * cols)), norms(value) {}

    void add(std::int64_t i, double addend) { value[static_cast<std::size_t>(i)] += addend; }
    // Adds left[rows, inner] . right[inner, cols].
    void add_product(const std::vector<double>& left, const std::vector<double>& right, std::int64_t inner) {
      std::vector<double> of_row(static_cast<std::size_t>(rows)), of_column(static_cast<std::size_t>(cols));
      for (std::int64_t j = 0; j < inner * cols; ++j) {
        const double factor = right[static_cast<std::size_t>(j)];
        of_column[static_cast<std::size_t>(j % cols)] += factor * factor;
      }
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < inner; ++j) {
          const double factor = left[static_cast<std::size_t>(i * inner + j)];
          of_row[static_cast<std::size_t>(i)] += factor * factor;
          for (std::int64_t k = 0; k < cols; ++k)
            value[static_cast<std::size_t>(i * cols + k)] += factor * right[static_cast<std::size_t>(j * cols + k)];
        }
      for (std::int64_t i = 0; i < rows * cols; ++i)
        norms[static_cast<std::size_t>(i)] +=
            std::sqrt(static_cast<double>(inner) * of_row[static_cast<std::size_t>(i / cols)] *
                      of_column[static_cast<std::size_t>(i % cols)]);
    }
    void scale(double factor) {
      for (double& each : value) each *= factor;
      for (double& each : norms) each *= std::fabs(factor);
    }
    void multiply(const std::vector<double>& factor) {
      for (std::size_t i = 0; i < value.size(); ++i) value[i] *= factor[i];
    }
    void add(const Sums& other) {
      for (std::size_t i = 0; i < value.size(); ++i) {
        value[i] += other.value[i];
        norms[i] += other.norms[i];
      }
    }
  };

  // `multiplied` is the dtype of the operands, which decides how a sum rounds; `dtype` is that of the results.
  void expect_close(const char* name, const std::vector<double>& values, const Sums& expected, DType multiplied,
                    DType dtype) const {
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
      std::printf("  %s: %s[%d, %d]: expected %.9g, got %.9g, %.3g times what is allowed\n", c_.name().c_str(), name,
                  static_cast<int>(static_cast<std::int64_t>(where) / expected.cols),
                  static_cast<int>(static_cast<std::int64_t>(where) % expected.cols), expected.value[where],
                  values[where], worst);
  }

  Case c_;
  Quantized weight_;
  Tensor x_, dy_, bias_, a_, b_;
  Tensor y_, u_, dx_, v_, da_, db_;
};

// A chunk of 64 elements has two or four of these blocks.
struct SmallBlocks {
  int format, blocksize;
};
constexpr SmallBlocks kSmallBlocks[] = {{0, 32}, {5, 32}, {6, 16}};
constexpr std::int64_t kRows[] = {0, 1, 7, 8, 9, 16, 17, 33, 129};
constexpr std::int64_t kRanks[] = {0, 1, 16, 70};

// Every shape with every number of rows; every format with every blocksize; every rank with and without dropout; and
// the sizes that a kernel takes at a time, exactly and one off: 64 rows of W, K = 1024, and more rows of X than one
// strip packs.
std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : kDTypes) {
    for (const std::int64_t M : kRows)
      for (const Shape shape : kShapes)
        all.push_back({.M = M, .N = shape.N, .K = shape.K, .dtype = dtype, .bias = shape.K % 2 == 1, .gap = M % 3});
    for (const std::int64_t rank : kRanks)
      for (const float dropout : {0.0f, 0.3f})
        for (const DType lora_dtype : {DType::f32, dtype})
          for (const auto& [M, N, K] :
               {std::array<std::int64_t, 3>{0, 5, 9}, {1, 80, 96}, {3, 20, 96}, {9, 3, 65}, {33, 40, 200}})
            all.push_back({.M = M,
                           .N = N,
                           .K = K,
                           .dtype = dtype,
                           .bias = M == 9,
                           .rank = rank,
                           .dropout = dropout,
                           .lora_dtype = lora_dtype,
                           .gap = M == 33 ? 5 : 0});
    for (const auto& [M, N, K] : {std::array<std::int64_t, 3>{2, 64, 1024},
                                  {4, 66, 1025},
                                  {8, 70, 1088},
                                  {17, 70, 1088},
                                  {33, 66, 1100},
                                  {129, 136, 128},
                                  {257, 130, 96}})
      for (const int format : {0, 3})
        all.push_back({.M = M,
                       .N = N,
                       .K = K,
                       .dtype = dtype,
                       .format = format,
                       .bias = true,
                       .rank = format == 0 ? 16 : 0,
                       .dropout = 0.125f});
    // More panels, at few rows, than go into one total.
    all.push_back({.M = 8, .N = 1700, .K = 70, .dtype = dtype});
  }
  // More rows of X, and more ranks of U, than are packed at once.
  for (const DType dtype : {DType::f32, DType::bf16})
    all.push_back({.M = 40'000, .N = 3, .K = 5, .dtype = dtype, .rank = 70, .dropout = 0.3f});
  std::size_t i = 0;
  for (int format = 0; format < static_cast<int>(formats().size()); ++format)
    for (const int blocksize : kBlocksizes)
      for (const bool double_quant : {false, true})
        for (const auto& [M, N, K] :
             {std::array<std::int64_t, 3>{1, 34, 190}, {9, 37, 333}, {17, 20, 256}, {3, 10, 320}})
          all.push_back({.M = M,
                         .N = N,
                         .K = K,
                         .dtype = kDTypes[i++ % 3],
                         .format = format,
                         .blocksize = blocksize,
                         .double_quant = double_quant});
  for (const SmallBlocks& small : kSmallBlocks)
    for (const DType dtype : {DType::f32, DType::bf16})
      for (const std::int64_t M : {1, 3, 8, 9, 48, 300})
        for (const auto& [N, K] : {Shape{70, 320}, Shape{19, 1088}, Shape{37, 333}, Shape{20, 200}})
          all.push_back({.M = M,
                         .N = N,
                         .K = K,
                         .dtype = dtype,
                         .format = small.format,
                         .blocksize = small.blocksize,
                         .rank = M % 2 * 4});
  return all;
}

// Groups of no row, of one row and of all rows; groups that end inside a vector, a strip or a group of rows; weights
// whose blocks and bytes straddle experts; and rows before the first group, which have no adapter.
std::vector<Case> grouped_cases() {
  struct Groups {
    std::int64_t M;
    std::vector<std::int64_t> offsets;
  };
  const Groups experts[] = {{1, {0, 1}},       {5, {0, 0, 5, 5}}, {70, {0, 1, 1, 10, 61, 70}},
                            {40, {0, 40, 40}}, {0, {0, 0, 0}},    {131, {0, 8, 17, 33, 50, 99, 99, 131}}};
  const Groups adapters[] = {{7, {2, 2, 3, 7}}, {6, {0, 1, 2, 3, 4, 5, 6}}, {150, {5, 13, 21, 22, 22, 64, 96, 150}},
                             {33, {33, 33}},    {48, {0, 16, 48}},          {200, {0, 96, 200}}};
  std::vector<Case> all;
  for (const DType dtype : kDTypes)
    for (const bool group_weights : {true, false})
      for (const Groups& groups : group_weights ? std::span<const Groups>(experts) : std::span<const Groups>(adapters))
        for (const Shape shape : {Shape{66, 192}, Shape{35, 65}, Shape{7, 1}})
          for (const std::int64_t rank : {0, 5, 70}) {
            if (rank == 70 && shape.K != 192) continue;
            const std::size_t i = all.size();
            all.push_back({.M = groups.M,
                           .N = shape.N,
                           .K = shape.K,
                           .dtype = dtype,
                           .format = i % 5 == 0 ? 3 : 0,
                           .double_quant = i % 3 != 0,
                           .bias = i % 2 == 0,
                           .rank = rank,
                           .dropout = i % 4 == 1 ? 0.3f : 0.0f,
                           .lora_dtype = i % 2 == 0 ? dtype : DType::f32,
                           .gap = static_cast<std::int64_t>(i % 3),
                           .offsets = groups.offsets,
                           .group_weights = group_weights && groups.offsets.size() > 2,
                           .shared_adapter = i % 7 == 3});
          }
  // More groups than a warp searches at once.
  std::vector<std::int64_t> ends;
  for (std::int64_t g = 0; g <= 70; ++g) ends.push_back(g * g * 100 / (70 * 70));
  for (const bool group_weights : {true, false})
    for (const auto& [N, K] : {std::array<std::int64_t, 2>{16, 64}, {3, 33}})
      all.push_back(
          {.M = 100, .N = N, .K = K, .dtype = DType::bf16, .rank = 4, .offsets = ends, .group_weights = group_weights});
  // Rows that vectors can reach, with groups of sizes for each tile of a GPU.
  const Groups single = {21, {0, 1, 1, 18, 19, 20, 21}}, fewest = {70, {0, 1, 1, 10, 61, 70}},
               few = {131, {0, 8, 17, 33, 50, 99, 99, 131}}, many = {290, {0, 200, 200, 290}};
  const Groups most = {2050, {0, 2049, 2050}}, behind_others = {290, {10, 100, 100, 201, 290}};
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const bool group_weights : {true, false})
      for (const auto& [groups, N, K] : {std::tuple{single, 40, 320},
                                         {fewest, 72, 192},
                                         {few, 72, 192},
                                         {many, 136, 128},
                                         {most, 72, 64},
                                         {behind_others, 136, 128}})
        for (const std::int64_t rank : {0, 16, 70}) {
          if ((group_weights && groups.offsets[0] > 0) || (groups.M > 1000 && (rank != 16 || !group_weights))) continue;
          const std::size_t i = all.size();
          all.push_back({.M = groups.M,
                         .N = N,
                         .K = K,
                         .dtype = dtype,
                         .bias = true,
                         .rank = rank,
                         .dropout = i % 2 == 0 ? 0.3f : 0.0f,
                         .lora_dtype = i % 3 == 0 ? dtype : DType::f32,
                         .gap = i % 4 == 0 ? 8 : 0,
                         .offsets = groups.offsets,
                         .group_weights = group_weights,
                         .shared_adapter = i % 5 == 4});
        }
  return all;
}

void products_of_groups_are_the_sums_of_float64() {
  for (const Case& each : grouped_cases()) {
    Layer layer(each);
    layer.run();
    layer.check();
  }
}

void products_are_the_sums_of_float64() {
  for (const Case& each : cases()) {
    Layer layer(each);
    layer.run();
    layer.check();
  }
}

// ---- the loss ----

struct LossCase {
  std::int64_t rows, V;
  DType dtype;
  float scale = 1.0f, softcap = 0.0f, label_smoothing = 0.0f, z_loss = 0.0f;
  bool factors = false;
  std::int64_t gap = 0;
};

// Compares each row's loss, log-probability and gradient with their definition in float64. The sum of V exponentials in
// fp32 may be off by kSumFactor * sqrt(V) roundings of 1.5 units each; a loss is the sum of a few numbers of the size
// of z.
void losses_and_gradients_are_those_of_float64() {
  constexpr std::int64_t kIgnored = -100;
  std::vector<LossCase> all;
  for (const DType dtype : kDTypes)
    for (const std::int64_t V : {1, 5, 16, 63, 1030, 5000}) {
      all.push_back({.rows = 3, .V = V, .dtype = dtype});
      all.push_back({.rows = 4, .V = V, .dtype = dtype, .label_smoothing = 0.1f, .factors = true, .gap = 3});
      all.push_back({.rows = 5, .V = V, .dtype = dtype, .scale = 0.5f, .softcap = 3.0f, .z_loss = 0.01f});
    }
  for (const LossCase& c : all) {
    Random random(static_cast<std::uint64_t>(c.V));
    Tensor logits(c.dtype, c.rows, c.V, c.gap);
    logits.fill(random, 4.0f);
    const std::vector<double> l = logits.values();
    std::vector<std::int64_t> labels;
    std::vector<float> factors, loss(static_cast<std::size_t>(c.rows)), log_probability = loss;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      labels.push_back(row == 1 ? kIgnored : row * 7919 % c.V);
      factors.push_back(c.factors ? 0.25f * static_cast<float>(row + 1) : 1.0f);
    }
    qn::CrossEntropyArgs args{.logits = logits.out(),
                              .labels = labels.data(),
                              .scale = c.scale,
                              .softcap = c.softcap,
                              .label_smoothing = c.label_smoothing,
                              .z_loss = c.z_loss,
                              .row_gradients = c.factors ? factors.data() : nullptr,
                              .loss = loss.data(),
                              .log_probability = log_probability.data()};
    qn::cross_entropy(args);
    EXPECT(logits.values() == l);
    args.gradient = true;
    const std::vector<float> before = loss;
    qn::cross_entropy(args);
    EXPECT(loss == before && logits.keeps_to_its_columns());
    const double sums = kSumFactor * std::sqrt(static_cast<double>(c.V)) * 0x1p-23;
    double worst = 0.0;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      const auto r = static_cast<std::size_t>(row);
      std::vector<double> z;
      double largest = -INFINITY, sum = 0.0, exponentials = 0.0, size = 1.0;
      for (std::int64_t i = 0; i < c.V; ++i) {
        double value = double{c.scale} * l[static_cast<std::size_t>(row * c.V + i)];
        if (c.softcap > 0.0f) value = double{c.softcap} * std::tanh(value / double{c.softcap});
        z.push_back(value);
        largest = std::max(largest, value);
        size = std::max(size, std::fabs(value));
        sum += value;
      }
      for (const double value : z) exponentials += std::exp(value - largest);
      const double lse = largest + std::log(exponentials), smoothing = double{c.label_smoothing};
      const bool kept = labels[r] != kIgnored;
      const double target = kept ? z[static_cast<std::size_t>(labels[r])] : 0.0, V = static_cast<double>(c.V);
      const double expected = lse - (1.0 - smoothing) * target - smoothing / V * sum + double{c.z_loss} * lse * lse;
      // The tanh of a soft cap is off by a few units in the last place of 1, times the cap.
      const double allowed =
          sums * (1.0 + 2.0 * double{c.z_loss} * std::fabs(lse)) + 8.0 * 0x1p-24 * (size + lse * lse);
      worst = std::max(worst, std::fabs(loss[r] - (kept ? expected : 0.0)) / allowed);
      worst = std::max(worst, std::fabs(log_probability[r] - (kept ? target - lse : 0.0)) / allowed);
      for (std::int64_t i = 0; i < c.V; ++i) {
        const double p = std::exp(z[static_cast<std::size_t>(i)] - lse) * (1.0 + 2.0 * double{c.z_loss} * lse);
        double gradient = p - smoothing / V - (i == labels[r] ? 1.0 - smoothing : 0.0);
        double scale = double{c.scale} * double{factors[r]};
        if (c.softcap > 0.0f) {
          const double t = z[static_cast<std::size_t>(i)] / double{c.softcap};
          scale *= 1.0 - t * t;
        }
        gradient *= kept ? scale : 0.0;
        const double off = std::fabs(logits.at(row, i) - gradient);
        worst = std::max(worst, off / (unit_roundoff(c.dtype) * std::fabs(gradient) + allowed * std::fabs(scale) +
                                       smallest_normal(c.dtype)));
      }
    }
    EXPECT(worst <= 1.0);
    if (!(worst <= 1.0))
      std::printf("  loss of %d x %d %s, softcap %g: %.3g times what is allowed\n", static_cast<int>(c.rows),
                  static_cast<int>(c.V), qn::name_of(c.dtype), static_cast<double>(c.softcap), worst);
  }
}

// ---- determinism ----

void expect_same_bits_for_any_number_of_threads(const Case& each) {
  std::vector<char> expected;
  for (const int threads : {1, 1, 2, 3, 3}) {
    use_pool(threads);
    Layer layer(each);
    layer.run();
    if (expected.empty()) expected = layer.bytes();
    EXPECT(layer.bytes() == expected);
  }
}

void bits_are_the_same_in_every_run_and_for_any_number_of_threads() {
  for (const DType dtype : kDTypes)
    for (const auto& [M, N, K] :
         {std::array<std::int64_t, 3>{1, 320, 512}, {4, 100, 513}, {16, 129, 1100}, {64, 70, 320}, {130, 48, 200}}) {
      const Case each{
          .M = M, .N = N, .K = K, .dtype = dtype, .bias = true, .rank = 16, .dropout = 0.25f, .lora_dtype = dtype};
      expect_same_bits_for_any_number_of_threads(each);
    }
  for (const DType dtype : kDTypes)
    for (const bool group_weights : {true, false})
      expect_same_bits_for_any_number_of_threads({.M = 140,
                                                  .N = 100,
                                                  .K = 320,
                                                  .dtype = dtype,
                                                  .bias = true,
                                                  .rank = 16,
                                                  .dropout = 0.25f,
                                                  .offsets = {0, 3, 12, 80, 140},
                                                  .group_weights = group_weights});
  for (const SmallBlocks& small : kSmallBlocks)
    for (const DType dtype : {DType::f32, DType::bf16})
      for (const std::int64_t M : {1, 9, 130})
        expect_same_bits_for_any_number_of_threads(
            {.M = M, .N = 140, .K = 1088, .dtype = dtype, .format = small.format, .blocksize = small.blocksize});
}

// ---- the optimizer ----

std::uint8_t nearest(const std::array<float, 256>& map, double value) {  // a tie takes the lower level
  int code = 0;
  while (code < 255 &&
         value > (double{map[static_cast<std::size_t>(code)]} + double{map[static_cast<std::size_t>(code) + 1]}) / 2.0)
    ++code;
  return static_cast<std::uint8_t>(code);
}

// One parameter with its state, and the step of it that common/optimizer.h defines.
struct Parameter {
  Tensor param, grad;
  bool in_8_bits;
  std::vector<std::uint8_t> codes[qn::kMaxMoments];
  std::vector<float> absmax[qn::kMaxMoments], moments[qn::kMaxMoments];
  std::int64_t step = 0;

  Parameter(std::int64_t elements, DType param_dtype, DType grad_dtype, bool in_8_bits)
      : param(param_dtype, 1, elements), grad(grad_dtype, 1, elements), in_8_bits(in_8_bits) {
    Random random(static_cast<std::uint64_t>(elements));
    param.fill(random, 1.0f);
    const auto count = static_cast<std::size_t>(elements);
    for (int k = 0; k < qn::kMaxMoments; ++k) {
      codes[k] = std::vector<std::uint8_t>(count, qn::zero_code(k));
      absmax[k] = std::vector<float>((count + 255) / 256);
      moments[k] = std::vector<float>(count);
    }
  }
  qn::Optimizer8bitTensor view(int group) {
    qn::Optimizer8bitTensor tensor{.param = param.data(),
                                   .grad = grad.data(),
                                   .param_dtype = param.dtype(),
                                   .grad_dtype = grad.dtype(),
                                   .elements = param.cols(),
                                   .step = &step,
                                   .group = group};
    for (int k = 0; k < qn::kMaxMoments; ++k) {
      qn::state_of(tensor, k) = in_8_bits ? static_cast<void*>(codes[k].data()) : moments[k].data();
      qn::absmax_of(tensor, k) = in_8_bits ? absmax[k].data() : nullptr;
    }
    return tensor;
  }
  template <class Rule>
  void step_by_definition(const qn::Optimizer8bitGroup& group, float inv_scale) {
    const qn::StepCoefficients c = Rule::coefficients(group, ++step, inv_scale);
    const std::size_t elements = moments[0].size();
    for (std::size_t first = 0; first < elements; first += 256) {
      const std::size_t end = std::min(elements, first + 256);
      float kept[Rule::kMoments], most[Rule::kMoments] = {};
      for (int k = 0; k < Rule::kMoments; ++k) kept[k] = absmax[k][first / 256] * Rule::decode_factor(c, k);
      for (std::size_t i = first; i < end; ++i) {
        float m[Rule::kMoments];
        for (int k = 0; k < Rule::kMoments; ++k) {
          m[k] = in_8_bits ? map_of(k)[codes[k][i]] * kept[k] : moments[k][i] * Rule::decode_factor(c, k);
        }
        const auto at = static_cast<std::int64_t>(i);
        param.set(0, at, Rule::template update<qn::FloatMath>(c, param.at(0, at), grad.at(0, at), m));
        for (int k = 0; k < Rule::kMoments; ++k) {
          moments[k][i] = m[k];
          most[k] = std::max(most[k], std::fabs(m[k]));
        }
      }
      for (int k = 0; k < Rule::kMoments && in_8_bits; ++k) {
        absmax[k][first / 256] = most[k];
        for (std::size_t i = first; i < end; ++i) {
          codes[k][i] = nearest(map_of(k), moments[k][i] * qn::inverse_absmax(most[k]));
        }
      }
    }
  }
  bool same_as(const Parameter& other) const {
    if (param.bytes() != other.param.bytes() || step != other.step) return false;
    for (int k = 0; k < qn::kMaxMoments; ++k) {
      if (in_8_bits && (codes[k] != other.codes[k] || absmax[k] != other.absmax[k])) return false;
      if (!in_8_bits && moments[k] != other.moments[k]) return false;
    }
    return true;
  }

 private:
  static const std::array<float, 256>& map_of(int moment) {
    return qn::is_signed(moment) ? qn::kDynamicMap : qn::kUnsignedDynamicMap;
  }
};

void optimizer_steps_to_the_bit(qn::Algorithm algorithm) {
  const qn::Optimizer8bitGroup groups[2] = {
      {.lr = 0.01, .weight_decay = 0.1},
      {.lr = 3e-4, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.0, .t_alpha = 2.0, .t_beta3 = 3.0}};
  const float inv_scale = 0.37f;
  std::vector<Parameter> actual;
  for (const std::int64_t elements : {1, 255, 256, 257, 4099})
    for (const DType param_dtype : kDTypes)
      for (const DType grad_dtype : {DType::f32, param_dtype})
        for (const bool in_8_bits : {true, false}) actual.emplace_back(elements, param_dtype, grad_dtype, in_8_bits);
  // More tensors than a GPU's kernels take at once.
  for (int i = 0; i < 600; ++i) actual.emplace_back(3, DType::f32, DType::f32, true);
  std::vector<Parameter> expected = actual;
  std::int64_t skipped = 0;
  for (int round = 0; round < 3; ++round) {
    use_pool(round + 1);
    std::vector<qn::Optimizer8bitTensor> tensors;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      Random random(i + 100 * static_cast<std::size_t>(round));
      // From step to step the gradients shrink by orders of magnitude, so that moments get codes near 0.
      actual[i].grad.fill(random, std::pow(0.03f, static_cast<float>(round)));
      expected[i].grad = actual[i].grad;
      tensors.push_back(actual[i].view(static_cast<int>(i % 2)));
      qn::with_rule(algorithm, [&]<class Rule>() { expected[i].step_by_definition<Rule>(groups[i % 2], inv_scale); });
    }
    qn::optimizer_8bit_step({.tensors = tensors.data(),
                             .count = static_cast<std::int64_t>(tensors.size()),
                             .groups = groups,
                             .group_count = 2,
                             .inv_scale = &inv_scale,
                             .skipped = &skipped,
                             .algorithm = algorithm});
    for (std::size_t i = 0; i < actual.size(); ++i) EXPECT(actual[i].same_as(expected[i]));
  }
  EXPECT(skipped == 0);
}

// If beta1 m + (1 - beta1) g is 0 or -0, an element keeps its value, even -0. If it is the smallest float, the element
// moves by all of lr.
void lion_moves_by_the_sign_of_the_smallest_numbers() {
  const float smallest = std::numeric_limits<float>::denorm_min();
  const float grads[] = {smallest, -smallest, 0.0f, -0.0f, 1.8e19f, -1.8e19f, 0.0f, -0.0f};
  const float params[] = {1.0f, 1.0f, -0.0f, -0.0f, 1.0f, 1.0f, 0.0f, 0.0f};
  const float expected[] = {0.5f, 1.5f, -0.0f, -0.0f, 0.5f, 1.5f, 0.0f, 0.0f};
  std::vector<float> param, grad, m(64, -0.0f);
  for (int i = 0; i < 64; ++i) {
    param.push_back(params[i % 8]);
    grad.push_back(grads[i % 8]);
  }
  std::int64_t step = 0, skipped = 0;
  const qn::Optimizer8bitGroup group{.lr = 0.5, .beta1 = 0.0, .beta2 = 0.0, .weight_decay = 0.0};
  const qn::Optimizer8bitTensor tensor{
      .param = param.data(), .grad = grad.data(), .elements = 64, .state1 = m.data(), .step = &step};
  qn::optimizer_8bit_step({.tensors = &tensor,
                           .count = 1,
                           .groups = &group,
                           .group_count = 1,
                           .skipped = &skipped,
                           .algorithm = qn::Algorithm::lion});
  for (std::size_t i = 0; i < 64; ++i) {
    EXPECT(std::bit_cast<std::uint32_t>(param[i]) == std::bit_cast<std::uint32_t>(expected[i % 8]));
  }
}

// ---- bad input ----

// Each bad argument of each operation is an Error that names it, and the results are then not touched. (test_core.cpp
// has the arguments of linear_forward and of optimizer_8bit_step.)
void bad_input_is_named_in_the_error() {
  const Tensor weight = random_weight({5, 63}, DType::f32);
  const Quantized quantized(weight.in(), formats()[0], 64, true);
  std::vector<std::uint8_t> codes(512, 9);
  std::vector<float> scales(512, 9.0f), out(512, 9.0f);
  qn::NonFinite non_finite;
  const qn::QuantizeArgs q{.weight = weight.data(),
                           .elements = 315,
                           .code = formats()[0].code,
                           .codes = codes.data(),
                           .absmax = scales.data(),
                           .non_finite = &non_finite};
  using Q = qn::QuantizeArgs;
  expect_refused("elements", change(q, qn::quantize, [](Q& args) { args.elements = -1; }));
  expect_refused("bits", change(q, qn::quantize, [](Q& args) { args.bits = 5; }));
  expect_refused("blocksize", change(q, qn::quantize, [](Q& args) { args.blocksize = 16; }));
  expect_refused("blocksize", change(q, qn::quantize, [](Q& args) { args.blocksize = 96; }));
  expect_refused("weight", change(q, qn::quantize, [](Q& args) { args.weight = nullptr; }));
  expect_refused("codes", change(q, qn::quantize, [](Q& args) { args.codes = nullptr; }));
  expect_refused("absmax", change(q, qn::quantize, [](Q& args) { args.absmax = nullptr; }));
  expect_refused("code", change(q, qn::quantize, [](Q& args) { args.code = nullptr; }));
  static float not_finite[16] = {0.0f, NAN};
  expect_refused("code", change(q, qn::quantize, [](Q& args) { args.code = not_finite; }));

  const qn::QuantizeAbsmaxArgs n{.absmax = quantized.absmax.data(),
                                 .blocks = 5,
                                 .nested_code = qn::dynamic_map().data(),
                                 .codes = codes.data(),
                                 .nested_absmax = scales.data(),
                                 .offset = out.data()};
  using A = qn::QuantizeAbsmaxArgs;
  expect_refused("blocks", change(n, qn::quantize_absmax, [](A& args) { args.blocks = -1; }));
  expect_refused("nested_blocksize", change(n, qn::quantize_absmax, [](A& args) { args.nested_blocksize = 0; }));
  expect_refused("nested_code", change(n, qn::quantize_absmax, [](A& args) { args.nested_code = nullptr; }));
  expect_refused("offset", change(n, qn::quantize_absmax, [](A& args) { args.offset = nullptr; }));

  const qn::DequantizeArgs d{.weight = quantized.view(), .out = out.data()};
  using D = qn::DequantizeArgs;
  expect_refused("weight.K", change(d, qn::dequantize, [](D& args) { args.weight.K = 0; }));
  expect_refused("weight.N", change(d, qn::dequantize, [](D& args) { args.weight.N = std::int64_t{1} << 61; }));
  expect_refused("weight.nested_blocksize",
                 change(d, qn::dequantize, [](D& args) { args.weight.nested_blocksize = 0; }));
  expect_refused("weight.nested_code", change(d, qn::dequantize, [](D& args) { args.weight.nested_code = nullptr; }));
  expect_refused("out", change(d, qn::dequantize, [](D& args) { args.out = nullptr; }));
  static const std::int64_t beyond[] = {0, 4096};
  expect_refused("row_count", change(d, qn::dequantize, [](D& args) { args.rows = beyond, args.row_count = -1; }));
  expect_refused("rows", change(d, qn::dequantize, [](D& args) { args.rows = beyond, args.row_count = 2; }));

  const Tensor x = Tensor(weight), dy(DType::f32, 5, 5), u(DType::f32, 5, 2);
  const qn::LoraView lora{.rank = 2, .a = scales.data(), .b = scales.data()};
  const qn::LinearBackwardInputArgs b{.weight = quantized.view(),
                                      .lora = lora,
                                      .dy = dy.in(),
                                      .dx = {out.data(), DType::f32, 5, 63, 63},
                                      .v = {out.data(), DType::f32, 5, 2, 2}};
  using B = qn::LinearBackwardInputArgs;
  expect_refused("dy", change(b, qn::linear_backward_input, [](B& args) { args.dy.cols = 6; }));
  expect_refused("dy.stride", change(b, qn::linear_backward_input, [](B& args) { args.dy.stride = 4; }));
  expect_refused("dx", change(b, qn::linear_backward_input, [](B& args) { args.dx.cols = 62; }));
  expect_refused("dx.dtype", change(b, qn::linear_backward_input, [](B& args) { args.dx.dtype = DType::bf16; }));
  expect_refused("v", change(b, qn::linear_backward_input, [](B& args) { args.v.rows = 4; }));
  expect_refused("lora.b", change(b, qn::linear_backward_input, [](B& args) { args.lora.b = nullptr; }));
  expect_refused("lora.rank", change(b, qn::linear_backward_input, [](B& args) { args.lora.rank = -1; }));

  std::vector<std::int64_t> labels = {0, 4};
  const qn::CrossEntropyArgs l{
      .logits = {out.data(), DType::f32, 2, 5, 5}, .labels = labels.data(), .loss = out.data()};
  using L = qn::CrossEntropyArgs;
  expect_refused("logits.cols", change(l, qn::cross_entropy, [](L& args) { args.logits.cols = 0; }));
  expect_refused("logits.stride", change(l, qn::cross_entropy, [](L& args) { args.logits.stride = 4; }));
  expect_refused("labels", change(l, qn::cross_entropy, [](L& args) { args.labels = nullptr; }));
  expect_refused("labels", change(l, qn::cross_entropy, [](L& args) { args.logits.cols = 4; }));
  expect_refused("loss", change(l, qn::cross_entropy, [](L& args) { args.loss = nullptr; }));
  expect_refused("scale", change(l, qn::cross_entropy, [](L& args) { args.scale = INFINITY; }));
  expect_refused("softcap", change(l, qn::cross_entropy, [](L& args) { args.softcap = -1.0f; }));
  expect_refused("label_smoothing", change(l, qn::cross_entropy, [](L& args) { args.label_smoothing = 1.5f; }));
  expect_refused("z_loss", change(l, qn::cross_entropy, [](L& args) { args.z_loss = -0.5f; }));

  static std::int64_t offsets[] = {0, 2, 5};
  const qn::RowGroups groups{.count = 2, .offsets = offsets};
  const auto groups_are = [&](std::int64_t weights, std::int64_t adapters, std::array<std::int64_t, 3> values) {
    return change(b, qn::linear_backward_input, [=](B& args) {
      std::copy(values.begin(), values.end(), offsets);
      args.groups = groups;
      args.weight.count = weights;
      args.weight.N = 5 / weights;  // the weight's memory holds 5 rows
      args.dy.cols = args.weight.N;
      args.lora.count = adapters;
    });
  };
  expect_refused("weight.count", groups_are(3, 1, {0, 2, 5}));
  expect_refused("lora.count", groups_are(1, 3, {0, 2, 5}));
  expect_refused("groups.offsets[0]", groups_are(2, 2, {1, 2, 5}));
  expect_refused("groups.offsets[0]", groups_are(1, 2, {-1, 2, 5}));
  expect_refused("groups.offsets[1]", groups_are(1, 2, {3, 2, 5}));
  expect_refused("groups.offsets[2]", groups_are(1, 2, {0, 2, 6}));
  expect_refused("groups.offsets[2]", groups_are(2, 2, {0, 2, 4}));
  expect_refused("groups.offsets", change(b, qn::linear_backward_input, [=](B& args) { args.groups = {2, nullptr}; }));
  expect_refused("groups.count", change(b, qn::linear_backward_input, [](B& args) { args.groups.count = -1; }));

  const qn::LoraGradientsArgs g{
      .lora = lora, .x = x.in(), .dy = dy.in(), .u = u.in(), .v = u.in(), .da = out.data(), .db = out.data()};
  using G = qn::LoraGradientsArgs;
  expect_refused("x.rows", change(g, qn::lora_gradients, [](G& args) { args.x.rows = -1; }));
  expect_refused("dy", change(g, qn::lora_gradients, [](G& args) { args.dy.rows = 4; }));
  expect_refused("u.data", change(g, qn::lora_gradients, [](G& args) { args.u.data = nullptr; }));
  expect_refused("v.stride", change(g, qn::lora_gradients, [](G& args) { args.v.stride = 1; }));
  expect_refused("lora.dropout", change(g, qn::lora_gradients, [](G& args) { args.lora.dropout = -0.1f; }));

  EXPECT(std::all_of(codes.begin(), codes.end(), [](std::uint8_t code) { return code == 9; }));
  EXPECT(std::all_of(scales.begin(), scales.end(), [](float scale) { return scale == 9.0f; }));
  EXPECT(std::all_of(out.begin(), out.end(), [](float value) { return value == 9.0f; }));
}

}  // namespace

int main() {
  if (!isa_is_here()) return kSkipped;
  use_pool(2);  // not OpenMP's: on a busy machine its threads would spin at the end of each of many small tasks
  decoded_weight_is_level_times_scale_rounded_once();
  decoded_rows_are_those_of_the_decoded_weight();
  decoded_microscaled_weight_is_level_times_scale_rounded_once();
  scale_that_is_not_finite_decodes_as_defined();
  code_is_that_of_the_nearest_level();
  scale_in_8_bits_is_the_nearest();
  values_that_are_not_finite_are_counted();
  products_are_the_sums_of_float64();
  products_of_groups_are_the_sums_of_float64();
  losses_and_gradients_are_those_of_float64();
  bits_are_the_same_in_every_run_and_for_any_number_of_threads();
  for (const qn::Algorithm algorithm : {qn::Algorithm::adamw, qn::Algorithm::lion, qn::Algorithm::ademamix}) {
    optimizer_steps_to_the_bit(algorithm);
  }
  lion_moves_by_the_sign_of_the_smallest_numbers();
  bad_input_is_named_in_the_error();
  return report();
}
