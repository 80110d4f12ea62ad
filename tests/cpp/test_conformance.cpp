// Guards every operation of the instruction set in use: a decoded weight and a step of an optimizer have the bits that
// the headers define, and products are near sums in float64. ctest runs this test once for each instruction set.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "common/codebook.h"
#include "common/layout.h"
#include "expect.h"
#include "isa_is_here.h"
#include "layer.h"
#include "parameter.h"
#include "pool.h"
#include "qlora_native/qlora_native.h"
#include "quantized.h"
#include "tensor.h"

namespace {

constexpr int kBlocksizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};

// ---- quantized weights ----

// Those of any blocksize, and those with one blocksize each and scales of 8 bits.
constexpr const char *kFormats[] = {"nf4", "fp4", "int4", "int8", "codebook"}, *kMicroscaled[] = {"mxfp4", "nvfp4"};
int microscaled_blocksize(const std::string& format) { return format == "mxfp4" ? 32 : 16; }

struct Shape {
  std::int64_t N, K;
};
// The shapes have one element, less than a block, K of one less and one more than 64, odd sizes (two rows share a
// byte), rows of one element, a K that 4 does not divide, and rows of whole chunks, an odd and an even number of them.
constexpr Shape kShapes[] = {{1, 1}, {1, 64}, {5, 63}, {3, 65}, {7, 1}, {48, 96}, {65, 128}, {19, 342}, {18, 192}};

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
  for (const char* format : kFormats)
    for (const int blocksize : kBlocksizes)
      for (const bool double_quant : {false, true}) f(format_named(format), blocksize, double_quant);
  for (const char* format : kMicroscaled) f(format_named(format), microscaled_blocksize(format), false);
  for (const Format& format : kFileFormats) f(format, format.file_blocksize, false);
}
std::string name_of(const Format& format, int blocksize, bool double_quant) {
  return std::string(format.name) + " blocksize " + std::to_string(blocksize) + (double_quant ? " dq" : "");
}

TEST(decoded_weight_is_level_times_scale_rounded_once) {
  for (const Shape shape : kShapes) {
    const Tensor weight = random_weight(shape.N, shape.K);
    for_each_quantization([&](const Format& format, int blocksize, bool double_quant) {
      const Quantized quantized(weight.in(), format, blocksize, double_quant);
      for (const DType dtype : kDTypes) {
        Tensor decoded(dtype, shape.N, shape.K);
        qn::dequantize({.weight = quantized.view(), .dtype = dtype, .out = decoded.data()});
        expect_same_bits(decoded, decoded_by_definition(quantized, dtype),
                         [&] { return name_of(format, blocksize, double_quant); });
      }
    });
  }
}

// Rows are looked up as by an embedding: in any order, some more than once, and in all weights that lie one below the
// other.
TEST(decoded_rows_are_those_of_the_decoded_weight) {
  for (const Shape shape : kShapes) {
    const std::int64_t count = shape.N % 3 == 0 ? 3 : 1;
    const Tensor weight = random_weight(shape.N, shape.K);
    std::vector<std::int64_t> rows{shape.N - 1, 0, shape.N / 2, 0};
    for (std::int64_t i = 0; i < 40; ++i) rows.push_back(i * 7 % shape.N);
    const auto row_count = static_cast<std::int64_t>(rows.size());
    for_each_quantization([&](const Format& format, int blocksize, bool double_quant) {
      const Quantized quantized(weight.in(), format, blocksize, double_quant, count);
      for (const DType dtype : kDTypes) {
        const Tensor whole = decoded_by_definition(quantized, dtype);
        Tensor expected(dtype, row_count, shape.K), decoded(dtype, row_count, shape.K);
        for (std::int64_t i = 0; i < row_count; ++i)
          for (std::int64_t k = 0; k < shape.K; ++k) expected.set(i, k, whole.at(rows[i], k));
        qn::dequantize({quantized.view(), dtype, rows.data(), row_count, decoded.data()});
        expect_same_bits(decoded, expected, [&] { return "rows, " + name_of(format, blocksize, double_quant); });
      }
    });
  }
}

TEST(scale_that_is_not_finite_decodes_as_defined) {
  const Tensor weight = random_weight(7, 65);
  for (const char* format : kFormats)
    for (const DType dtype : kDTypes) {
      Quantized quantized(weight.in(), format_named(format), 32, false);
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
TEST(code_is_that_of_the_nearest_level) {
  for (const char* name : kFormats) {
    const Format format = format_named(name);
    std::vector<double> levels;
    for (int i = 0; i < 255 && format.bits == 8; ++i) levels.push_back((i - 127) / 127.0);
    for (int i = 0; i < 16 && format.bits == 4; ++i) levels.push_back(format.code[i]);
    std::sort(levels.begin(), levels.end());
    for (const Shape shape : kShapes)
      for (const DType dtype : kDTypes)
        for (const int blocksize : kBlocksizes) {
          const Tensor weight = random_weight(shape.N, shape.K, dtype);
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
            wrong += quantized.absmax[first / blocksize] != absmax;
            for (std::int64_t e = first; e < end; ++e) {
              const double scaled = double{at(e)} * double{1.0f / absmax};
              const double chosen = qn::value_of_element(unscaled, e, 1.0f, -0.0f);
              wrong += !(std::fabs(chosen - scaled) <= distance_to_nearest(levels, scaled) + 0x1p-23);
            }
          }
          EXPECT(wrong == 0);
        }
  }
}

TEST(scale_in_8_bits_is_the_nearest) {
  const std::vector<double> levels(qn::dynamic_map().begin(), qn::dynamic_map().end());
  for (const Shape shape : {Shape{1, 1}, Shape{3, 65}, Shape{48, 96}, Shape{65, 1024}}) {
    const Quantized q(random_weight(shape.N, shape.K).in(), format_named("nf4"), 32, true);
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

TEST(values_that_are_not_finite_are_counted) {
  for (const DType dtype : kDTypes)
    for (const char* format : kFormats) {
      Tensor weight = random_weight(9, 171, dtype);
      weight.set(1, 2, NAN);
      weight.set(1, 3, INFINITY);
      weight.set(8, 170, -INFINITY);
      const Quantized quantized(weight.in(), format_named(format), 64, false);
      EXPECT(quantized.non_finite.count == 3 && quantized.non_finite.first == 171 + 2);
    }
}

// ---- products ----

// A chunk of 64 elements has two or four of these blocks.
struct SmallBlocks {
  const char* format;
  int blocksize;
};
constexpr SmallBlocks kSmallBlocks[] = {{"nf4", 32}, {"mxfp4", 32}, {"nvfp4", 16}};

// Every shape with every number of rows; every format with every blocksize; every rank with and without dropout; and
// the sizes that a kernel takes at a time, exactly and one off: 64 rows of W, K = 1024, 32 chunks of K, more rows of X
// than one strip packs, and rows that small_m takes in pieces.
using Sizes = std::initializer_list<std::array<std::int64_t, 3>>;

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : kDTypes) {
    for (const std::int64_t M : {0, 1, 7, 8, 9, 16, 17, 33, 129})
      for (const Shape shape : kShapes)
        all.push_back({.M = M, .N = shape.N, .K = shape.K, .dtype = dtype, .bias = shape.K % 2 == 1, .gap = M % 3});
    for (const std::int64_t rank : {0, 1, 16, 70})
      for (const float dropout : {0.0f, 0.3f})
        for (const DType lora_dtype : {DType::f32, dtype})
          for (const auto& [M, N, K] : Sizes{{0, 5, 9}, {1, 80, 96}, {3, 20, 96}, {9, 3, 65}, {33, 40, 200}}) {
            Case c{M, N, K, dtype};
            c.bias = M == 9, c.rank = rank, c.dropout = dropout, c.lora_dtype = lora_dtype, c.gap = M == 33 ? 5 : 0;
            all.push_back(c);
          }
    for (const auto& [M, N, K] : Sizes{{2, 64, 1024},
                                       {4, 66, 1025},
                                       {6, 131, 2176},
                                       {7, 37, 2368},
                                       {8, 70, 1088},
                                       {12, 192, 2112},
                                       {17, 70, 1088},
                                       {24, 34, 1601},
                                       {25, 37, 2176},
                                       {33, 66, 1100},
                                       {129, 136, 128},
                                       {257, 130, 96}}) {
      all.push_back({.M = M, .N = N, .K = K, .dtype = dtype, .bias = true, .rank = 16, .dropout = 0.125f});
      all.push_back({.M = M, .N = N, .K = K, .dtype = dtype, .format = "int8", .bias = true});
    }
    // More panels, at a small M, than go into one total.
    all.push_back({.M = 8, .N = 1700, .K = 70, .dtype = dtype});
    // More scales in a row than are decoded at once.
    all.push_back({.M = 5, .N = 3, .K = 16'448, .dtype = dtype});
  }
  // More rows of X, and more ranks of U, than are packed at once.
  for (const DType dtype : {DType::f32, DType::bf16})
    all.push_back({.M = 40'000, .N = 3, .K = 5, .dtype = dtype, .rank = 70, .dropout = 0.3f});
  std::size_t i = 0;
  for (const char* format : kFormats)
    for (const int blocksize : kBlocksizes)
      for (const bool double_quant : {false, true})
        for (const auto& [M, N, K] : Sizes{{1, 34, 190}, {9, 37, 333}, {17, 20, 1600}, {3, 10, 320}})
          all.push_back({M, N, K, kDTypes[i++ % 3], format, blocksize, double_quant});
  for (const auto& [format, blocksize] : kSmallBlocks)
    for (const DType dtype : {DType::f32, DType::bf16})
      for (const std::int64_t M : {1, 3, 8, 9, 48, 300})
        for (const auto& [N, K] : {Shape{70, 320}, Shape{19, 1600}, Shape{37, 333}, Shape{20, 200}}) {
          all.push_back({M, N, K, dtype, format, blocksize});
          all.back().rank = M % 2 * 4;
        }
  for (const Format& format : kFileFormats)
    for (const auto& [M, N, K] :
         Sizes{{1, 70, 320}, {3, 37, 333}, {5, 19, 1088}, {8, 20, 200}, {9, 70, 1600}, {48, 19, 512}})
      for (const DType dtype : kDTypes) {
        all.push_back({M, N, K, dtype, format.name, format.file_blocksize});
        all.back().rank = M % 2 * 4;
      }
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
            Case c{groups.M, shape.N, shape.K, dtype, i % 5 == 0 ? "int8" : i % 5 == 1 ? "q4_1" : "nf4"};
            if (i % 5 == 1) c.blocksize = 32;
            c.double_quant = i % 3 != 0, c.bias = i % 2 == 0, c.gap = static_cast<std::int64_t>(i % 3);
            c.rank = rank, c.dropout = i % 4 == 1 ? 0.3f : 0.0f, c.lora_dtype = i % 2 == 0 ? dtype : DType::f32;
            c.offsets = groups.offsets, c.group_weights = group_weights && groups.offsets.size() > 2;
            c.shared_adapter = i % 7 == 3;
            all.push_back(c);
          }
  // More groups than a warp searches at once.
  std::vector<std::int64_t> ends;
  for (std::int64_t g = 0; g <= 70; ++g) ends.push_back(g * g * 100 / (70 * 70));
  for (const bool group_weights : {true, false})
    for (const auto& [N, K] : {std::array<std::int64_t, 2>{16, 64}, {3, 33}})
      all.push_back(
          {.M = 100, .N = N, .K = K, .dtype = DType::bf16, .rank = 4, .offsets = ends, .group_weights = group_weights});
  // Rows that vectors can reach, with groups of sizes for each tile of a GPU.
  const Groups single_rows = {21, {0, 1, 1, 18, 19, 20, 21}}, tile_16 = {70, {0, 1, 1, 10, 61, 70}},
               tile_64 = {131, {0, 8, 17, 33, 50, 99, 99, 131}}, tile_256 = {290, {0, 200, 200, 290}};
  const Groups one_large = {2050, {0, 2049, 2050}}, behind_others = {290, {10, 100, 100, 201, 290}};
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const bool group_weights : {true, false})
      for (const auto& [groups, N, K] : {std::tuple{single_rows, 40, 320},
                                         {tile_16, 72, 192},
                                         {tile_64, 72, 192},
                                         {tile_256, 136, 128},
                                         {one_large, 72, 64},
                                         {behind_others, 136, 128}})
        for (const std::int64_t rank : {0, 16, 70}) {
          if ((group_weights && groups.offsets[0] > 0) || (groups.M > 1000 && (rank != 16 || !group_weights))) continue;
          const std::size_t i = all.size();
          Case c{groups.M, N, K, dtype};
          c.bias = true, c.rank = rank, c.dropout = i % 2 == 0 ? 0.3f : 0.0f, c.gap = i % 4 == 0 ? 8 : 0;
          c.lora_dtype = i % 3 == 0 ? dtype : DType::f32;
          c.offsets = groups.offsets, c.group_weights = group_weights, c.shared_adapter = i % 5 == 4;
          all.push_back(c);
        }
  return all;
}

TEST(products_are_the_sums_of_float64) {
  for (const auto& all : {cases(), grouped_cases()})
    for (const Case& each : all) {
      Layer layer(each);
      layer.run();
      layer.check();
    }
}

// A carry of rounding turns NaN into a number if its mantissa has only ones.
TEST(scale_that_is_nan_makes_its_part_of_products_nan) {
  constexpr float kNan = std::bit_cast<float>(0xFFFFFFFFu);
  constexpr std::uint16_t kHalfNan = 0x7FFF;
  struct Spoiled {
    const char* format;
    int blocksize;
    bool double_quant;
    void (*spoil)(Quantized&);
  };
  constexpr Spoiled kAll[] = {{"nf4", 64, false, [](Quantized& w) { w.absmax[6] = kNan; }},
                              {"nf4", 32, false, [](Quantized& w) { w.absmax[12] = kNan; }},
                              {"int8", 64, false, [](Quantized& w) { w.absmax[6] = kNan; }},
                              {"nf4", 64, true, [](Quantized& w) { w.nested_absmax[1] = kNan; }},
                              {"nvfp4", 16, false, [](Quantized& w) { w.nested_absmax[1] = kNan; }},
                              {"q4_0", 32, false, [](Quantized& w) { w.scales16[13] = kHalfNan; }},
                              {"q4_1", 32, false, [](Quantized& w) { w.minima16[13] = kHalfNan; }},
                              {"q4_k", 32, false, [](Quantized& w) { w.nested_minimum[1] = kNan; }}};
  constexpr std::int64_t N = 100, K = 192;
  for (const Spoiled& spoiled : kAll)
    for (const std::int64_t M : {1, 9, 70}) {
      Layer layer({M, N, K, DType::bf16, spoiled.format, spoiled.blocksize, spoiled.double_quant});
      spoiled.spoil(layer.weight);
      layer.run();
      const Tensor values = decoded_by_definition(layer.weight, DType::bf16);
      std::vector<bool> row(N), column(K);
      for (std::int64_t n = 0; n < N; ++n)
        for (std::int64_t k = 0; k < K; ++k)
          if (std::isnan(values.at(n, k))) row[n] = column[k] = true;
      EXPECT(std::ranges::count(row, true) > 0 && std::ranges::count(row, false) > 0);
      for (std::int64_t m = 0; m < M; ++m) {
        // A GPU may multiply zeros beyond a row of X by the first scale of W's next row.
        for (std::int64_t n = 0; n < N; ++n) EXPECT(std::isnan(layer.y.at(m, n)) || !row[n]);
        for (std::int64_t k = 0; k < K; ++k) EXPECT(std::isnan(layer.dx.at(m, k)) == column[k]);
      }
    }
}

// Zero times NaN is NaN, and rows of several groups lie in one vector, strip or tile.
TEST(adapter_that_is_not_finite_reaches_the_rows_of_its_groups_alone) {
  if (qn::cpu_tensors_backend() != "cpu") return;  // linear.h says so
  const auto expect_same_rows = [](const Tensor& actual, const Tensor& expected, std::int64_t begin, std::int64_t end) {
    std::int64_t different = 0;
    for (std::int64_t row = begin; row < end; ++row)
      for (std::int64_t col = 0; col < actual.cols(); ++col) different += actual.at(row, col) != expected.at(row, col);
    EXPECT(different == 0);
  };
  const auto has_nan = [](const Tensor& matrix, std::int64_t row) {
    for (std::int64_t col = 0; col < matrix.cols(); ++col)
      if (std::isnan(matrix.at(row, col))) return true;
    return false;
  };
  const std::vector<std::int64_t> few = {1, 4, 5, 7}, many = {3, 9, 40, 47, 150};
  for (const DType dtype : kDTypes)
    for (const std::int64_t rank : {5, 70})
      for (const auto& offsets : {few, many})
        for (const bool shared : {false, true}) {
          Case c{.M = offsets.back(), .N = 150, .K = 192, .dtype = dtype, .rank = rank, .offsets = offsets};
          c.dropout = rank == 5 ? 0.25f : 0.0f, c.lora_dtype = dtype, c.shared_adapter = shared;
          Layer finite(c);
          finite.run();
          for (std::int64_t adapter = 0; adapter < c.adapters(); ++adapter) {
            Layer layer(c);
            for (std::int64_t i = adapter * rank; i < (adapter + 1) * rank; ++i)
              for (std::int64_t k = 0; k < c.K; ++k) layer.a.set(i, k, k % 2 == 0 ? NAN : INFINITY);
            for (std::int64_t i = adapter * c.N; i < (adapter + 1) * c.N; ++i)
              for (std::int64_t r = 0; r < rank; ++r) layer.b.set(i, r, i % 2 == 0 ? NAN : INFINITY);
            layer.run();
            const std::int64_t begin = offsets[adapter], end = shared ? c.M : offsets[adapter + 1];
            EXPECT(has_nan(layer.y, begin) && has_nan(layer.dx, begin));
            EXPECT(has_nan(layer.y, end - 1) && has_nan(layer.dx, end - 1));
            for (const auto& [first, last] : {std::pair{std::int64_t{0}, begin}, {end, c.M}}) {
              expect_same_rows(layer.y, finite.y, first, last);
              expect_same_rows(layer.dx, finite.dx, first, last);
            }
            for (const auto& [first, last] : {std::pair{std::int64_t{0}, adapter}, {adapter + 1, c.adapters()}}) {
              expect_same_rows(layer.da, finite.da, first * rank, last * rank);
              expect_same_rows(layer.db, finite.db, first * c.N, last * c.N);
            }
          }
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
// fp32 may be off by kSumFactor * sqrt(V) roundings of 1.5 units each; a loss is the sum of four numbers of the size
// of z.
TEST(losses_and_gradients_are_those_of_float64) {
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
    std::vector<float> factors, loss(c.rows), log_probability = loss;
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
    const double sum_error = kSumFactor * std::sqrt(static_cast<double>(c.V)) * 0x1p-23;
    double worst = 0.0;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      const auto r = static_cast<std::size_t>(row);
      std::vector<double> z;
      double largest = -INFINITY, sum = 0.0, exponentials = 0.0, size = 1.0;
      for (std::int64_t i = 0; i < c.V; ++i) {
        double value = double{c.scale} * l[row * c.V + i];
        if (c.softcap > 0.0f) value = double{c.softcap} * std::tanh(value / double{c.softcap});
        z.push_back(value);
        largest = std::max(largest, value);
        size = std::max(size, std::fabs(value));
        sum += value;
      }
      for (const double value : z) exponentials += std::exp(value - largest);
      const double lse = largest + std::log(exponentials), smoothing = double{c.label_smoothing};
      const bool counts = labels[r] != kIgnored;
      const double target = counts ? z[labels[r]] : 0.0, V = static_cast<double>(c.V);
      const double expected = lse - (1.0 - smoothing) * target - smoothing / V * sum + double{c.z_loss} * lse * lse;
      // The tanh of a soft cap is off by up to 8 units in the last place of 1, times the cap.
      const double allowed =
          sum_error * (1.0 + 2.0 * double{c.z_loss} * std::fabs(lse)) + 8.0 * 0x1p-24 * (size + lse * lse);
      worst = std::max(worst, std::fabs(loss[r] - (counts ? expected : 0.0)) / allowed);
      worst = std::max(worst, std::fabs(log_probability[r] - (counts ? target - lse : 0.0)) / allowed);
      for (std::int64_t i = 0; i < c.V; ++i) {
        const double p = std::exp(z[i] - lse) * (1.0 + 2.0 * double{c.z_loss} * lse);
        double gradient = p - smoothing / V - (i == labels[r] ? 1.0 - smoothing : 0.0);
        double scale = double{c.scale} * double{factors[r]};
        if (c.softcap > 0.0f) {
          const double t = z[i] / double{c.softcap};
          scale *= 1.0 - t * t;
        }
        gradient *= counts ? scale : 0.0;
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

TEST(bits_are_the_same_in_every_run_and_for_any_number_of_threads) {
  for (const DType dtype : kDTypes) {
    for (const auto& [M, N, K] : Sizes{{1, 320, 512}, {4, 100, 513}, {16, 129, 1100}, {64, 70, 320}, {130, 48, 200}}) {
      Case c{.M = M, .N = N, .K = K, .dtype = dtype, .bias = true, .rank = 16, .dropout = 0.25f};
      c.lora_dtype = dtype;
      expect_same_bits_for_any_number_of_threads(c);
    }
    for (const bool group_weights : {true, false}) {
      Case c{.M = 140, .N = 100, .K = 320, .dtype = dtype, .bias = true, .rank = 16, .dropout = 0.25f};
      c.offsets = {0, 3, 12, 80, 140}, c.group_weights = group_weights;
      expect_same_bits_for_any_number_of_threads(c);
    }
  }
  for (const auto& [format, blocksize] : kSmallBlocks)
    for (const DType dtype : {DType::f32, DType::bf16})
      for (const std::int64_t M : {1, 9, 130})
        expect_same_bits_for_any_number_of_threads({M, 140, 1088, dtype, format, blocksize});
}

// ---- the optimizer ----

void expect_steps_to_the_bit(qn::Algorithm algorithm) {
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
  for (int i = 0; i < 600; ++i) actual.emplace_back(3);
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
    for (std::size_t i = 0; i < actual.size(); ++i) EXPECT(actual[i] == expected[i]);
  }
  EXPECT(skipped == 0);
}

TEST(optimizer_steps_to_the_bit) {
  for (const qn::Algorithm algorithm : kAlgorithms) expect_steps_to_the_bit(algorithm);
}

// If beta1 m + (1 - beta1) g is 0 or -0, an element keeps its value, even -0. If it is the smallest float, the element
// moves by all of lr.
TEST(lion_moves_by_the_sign_of_the_smallest_numbers) {
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

}  // namespace

int main() {
  if (!isa_is_here()) return kSkipped;
  use_pool(2);  // not OpenMP's: on a busy machine its threads would spin at the end of each of many small tasks
  return run_tests();
}
