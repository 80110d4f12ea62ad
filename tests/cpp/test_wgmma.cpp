// Guards the product by wgmma (cuda/product/wgmma/), on the emulator: its errors are within the bound of its sums, its
// results have the same bits under each order of threads and blocks, and it is not chosen for products that it cannot
// compute. QLN_FORCE_KERNEL=wgmma makes the emulated device a Hopper.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "common/philox.h"
#include "death_message.h"
#include "expect.h"
#include "qlora_native/qlora_native.h"
#include "quantized.h"
#include "tensor.h"

namespace {

struct Case {
  std::int64_t M, N, K;
  DType dtype = DType::bf16;
  const char* format = "nf4";
  int blocksize = 64;
  bool double_quant = true, bias = false;
  std::int64_t rank = 0;
  DType lora_dtype = DType::f32;
  float dropout = 0.0f;
  std::int64_t gap = 0;  // elements between rows of X, U and Y
  int num_sms = 3;       // of the emulated device
  bool pairs = false;    // of blocks load rows of X for each other
};

// Scales differ from block to block, so that a wrong scale shows.
Tensor weight_with_many_scales(const Case& c) {
  Random random(static_cast<std::uint64_t>(c.N * 1009 + c.K));
  Tensor weight(DType::f32, c.N, c.K);
  for (std::int64_t n = 0; n < c.N; ++n) {
    for (std::int64_t k = 0; k < c.K; ++k) {
      const std::int64_t block = (n * c.K + k) / c.blocksize;
      weight.set(n, k, random.uniform() * (0.2f + static_cast<float>(block * 7 % 11) / 11.0f));
    }
  }
  return weight;
}

// The forward product of a layer or, with V instead of U and A instead of B, the backward product.
class Layer {
 public:
  Layer(const Case& c, bool backward)
      : c_(c),
        backward_(backward),
        inner_(backward ? c.N : c.K),
        cols_(backward ? c.K : c.N),
        x_(c.dtype, c.M, inner_, c.gap),
        u_(c.dtype, c.M, c.rank, c.gap),
        out_(c.dtype, c.M, cols_, c.gap),
        bias_(c.dtype, 1, c.N),
        a_(c.lora_dtype, c.rank, c.K),
        b_(c.lora_dtype, c.N, c.rank),
        weight_(weight_with_many_scales(c).in(), format_named(c.format), c.blocksize, c.double_quant),
        w_(c.dtype, c.N, c.K) {
    Random random(static_cast<std::uint64_t>(c.M));
    x_.fill(random, 1.0f);
    bias_.fill(random, 1.0f);
    a_.fill(random, 1.0f / std::sqrt(static_cast<float>(c.K)));
    b_.fill(random, 0.1f);
    qn::dequantize({.weight = weight_.view(), .dtype = c.dtype, .out = w_.data()});
  }

  const std::vector<char>& run() {
    setenv("QLN_EMULATED_SMS", std::to_string(c_.num_sms).c_str(), 1);
    const qn::LoraView lora{.rank = c_.rank,
                            .dtype = c_.lora_dtype,
                            .a = a_.data(),
                            .b = b_.data(),
                            .scaling = kScaling,
                            .dropout = c_.dropout,
                            .seed = kSeed};
    const qn::Matrix u = c_.rank > 0 ? u_.out() : qn::Matrix{};
    if (backward_) {
      qn::linear_backward_input({.weight = weight_.view(), .lora = lora, .dy = x_.in(), .dx = out_.out(), .v = u});
    } else {
      qn::linear_forward({.weight = weight_.view(),
                          .lora = lora,
                          .x = x_.in(),
                          .bias = c_.bias ? bias_.data() : nullptr,
                          .y = out_.out(),
                          .u = u});
    }
    return out_.bytes();
  }

  // How many elements differ from float64 by more than fp32 sums of so many products, rounded once, may differ.
  int wrong() const {
    const double of_rounding = unit_roundoff(c_.dtype);
    const double of_sum = static_cast<double>(inner_ + c_.rank + 4) * 0x1p-24;
    int wrong = 0;
    for (std::int64_t col = 0; col < cols_; ++col) {
      std::vector<double> weight, right;
      for (std::int64_t i = 0; i < inner_; ++i) weight.push_back(backward_ ? w_.at(i, col) : w_.at(col, i));
      for (std::int64_t r = 0; r < c_.rank; ++r) {
        const float value = backward_ ? a_.at(r, col) : b_.at(col, r);
        right.push_back(rounded(c_.dtype, backward_ ? value : kScaling * value));
      }
      for (std::int64_t m = 0; m < c_.M; ++m) {
        double sum = c_.bias && !backward_ ? double{bias_.at(0, col)} : 0.0, size = std::fabs(sum);
        const auto add = [&](double product) {
          sum += product;
          size += std::fabs(product);
        };
        for (std::int64_t i = 0; i < inner_; ++i) add(x_.at(m, i) * weight[static_cast<std::size_t>(i)]);
        // In the forward product dropout is part of U; in dX it applies to the adapter's part.
        const bool is_unmasked = !backward_ || qn::dropout_keeps(kSeed, m, col, qn::dropout_threshold(c_.dropout));
        for (std::int64_t r = 0; r < c_.rank && is_unmasked; ++r) {
          add(u_.at(m, r) * right[static_cast<std::size_t>(r)]);
        }
        const double bound = of_sum * size + of_rounding * std::fabs(sum) + 0x1p-24;  // 2^-24 for fp16 below 2^-14
        wrong += !(std::fabs(out_.at(m, col) - sum) <= bound);
      }
    }
    return wrong;
  }
  // With the identity as the left operand, counts the elements of the result's transpose that differ from W.
  int differences_from_the_weight() {
    for (std::int64_t i = 0; i < c_.M; ++i) {
      for (std::int64_t j = 0; j < inner_; ++j) x_.set(i, j, i == j ? 1.0f : 0.0f);
    }
    run();
    int differences = 0;
    for (std::int64_t n = 0; n < c_.N; ++n) {
      for (std::int64_t k = 0; k < c_.K; ++k) differences += (backward_ ? out_.at(n, k) : out_.at(k, n)) != w_.at(n, k);
    }
    return differences;
  }
  bool keeps_to_its_columns() const { return out_.keeps_to_its_columns(); }

 private:
  static constexpr float kScaling = 1.7f;
  static constexpr std::uint64_t kSeed = 0x123456789;
  const Case c_;
  const bool backward_;
  const std::int64_t inner_, cols_;
  Tensor x_, u_, out_, bias_, a_, b_;
  const Quantized weight_;
  Tensor w_;  // weight_, decoded
};

// The text that a product prints about its kernel.
std::string kernel_of(const Case& c, bool backward) {
  Layer layer(c, backward);
  return death_message([&] {
    setenv("QLN_PRINT_CONFIG", "1", 1);
    layer.run();
    std::fflush(stderr);
    _exit(1);
  });
}

// The tiles of wgmma, and how its blocks share them.
const char* const kTiles[] = {"tiles of 16x128", "tiles of 32x128", "tiles of 64x128", "tiles of 128x128",
                              "tiles of 256x128"};
const char* const kSharings[] = {"with whole tiles", "in clusters of 2", "in clusters of 4", "in clusters of 8",
                                 "by stream-K"};
constexpr std::size_t kSharingsOfPairs =
    3;  // the first three; there is no stream-K, and there are no clusters of 16 blocks
std::string sharing_of(const std::string& kernel) {
  for (const char* sharing : kSharings) {
    if (contains(kernel, sharing)) return sharing + std::string(contains(kernel, "in pairs") ? ", in pairs" : "");
  }
  return "";
}

// The cases have each tile, full and with missing rows and columns, shared by each means, by steps that divide evenly
// and unevenly; blocks with several tiles; the fewest steps; each codebook and kind of scale; and adapters of no, one
// and two steps, full and partial. Pairs have even and odd numbers of tiles of columns.
const Case kCases[] = {
    {.M = 64, .N = 128, .K = 64},
    {.M = 32, .N = 128, .K = 64},
    {.M = 16, .N = 64, .K = 128, .rank = 8, .dropout = 0.5f},
    {.M = 1, .N = 1, .K = 64, .rank = 8},
    {.M = 33, .N = 131, .K = 256, .dtype = DType::f16, .bias = true, .rank = 16, .lora_dtype = DType::f16},
    {.M = 60, .N = 304, .K = 1088, .bias = true, .rank = 64, .gap = 8},
    {.M = 60, .N = 300, .K = 128, .bias = true, .rank = 64, .dropout = 0.3f, .gap = 8},
    {.M = 64, .N = 64, .K = 128, .rank = 8, .dropout = 0.5f},
    {.M = 100, .N = 320, .K = 192, .dtype = DType::f16, .rank = 16, .dropout = 0.125f},
    {.M = 250, .N = 256, .K = 320, .rank = 72, .dropout = 0.75f, .gap = 8},
    {.M = 40, .N = 72, .K = 2048, .format = "fp4", .double_quant = false, .rank = 72},
    {.M = 128, .N = 128, .K = 128, .dtype = DType::f16, .format = "int4", .blocksize = 128},
    {.M = 97,
     .N = 257,
     .K = 704,
     .blocksize = 256,
     .bias = true,
     .rank = 16,
     .lora_dtype = DType::bf16,
     .gap = 16,
     .num_sms = 16},
    {.M = 97, .N = 704, .K = 192, .blocksize = 256, .rank = 16, .lora_dtype = DType::bf16, .gap = 16, .num_sms = 16},
    {.M = 270, .N = 104, .K = 320, .rank = 128, .lora_dtype = DType::bf16},
    {.M = 256, .N = 128, .K = 448, .blocksize = 4096, .bias = true},
    {.M = 200, .N = 192, .K = 576, .dtype = DType::f16, .format = "fp4", .bias = true, .rank = 24, .gap = 24},
    {.M = 513, .N = 136, .K = 192, .double_quant = false, .bias = true, .rank = 16},
    // in clusters of 8, 4 and 2, and by stream-K
    {.M = 7, .N = 72, .K = 2112, .bias = true, .rank = 8, .num_sms = 16},
    {.M = 16, .N = 2112, .K = 64, .dtype = DType::f16, .rank = 16, .dropout = 0.5f, .num_sms = 16},
    {.M = 20, .N = 136, .K = 2240, .dtype = DType::f16, .rank = 16, .gap = 8, .num_sms = 16},
    {.M = 31, .N = 2200, .K = 192, .rank = 8, .num_sms = 16},
    {.M = 50, .N = 72, .K = 2112, .bias = true, .num_sms = 16},
    {.M = 64, .N = 2112, .K = 64, .rank = 16, .dropout = 0.25f, .gap = 8, .num_sms = 16},
    {.M = 100, .N = 40, .K = 2112, .rank = 16, .num_sms = 16},
    {.M = 70, .N = 2112, .K = 64, .dtype = DType::f16, .num_sms = 16},
    {.M = 130, .N = 40, .K = 2112, .dtype = DType::f16, .bias = true, .num_sms = 16},
    {.M = 140, .N = 2112, .K = 64, .rank = 8, .num_sms = 16},
    {.M = 33, .N = 300, .K = 1088, .dtype = DType::f16, .bias = true, .rank = 16, .num_sms = 16},
    {.M = 50, .N = 1096, .K = 320, .rank = 72, .dropout = 0.3f, .gap = 8, .num_sms = 16},
    {.M = 100, .N = 136, .K = 1024, .bias = true, .num_sms = 16},
    {.M = 128, .N = 1024, .K = 192, .dtype = DType::f16, .rank = 8, .num_sms = 16},
    {.M = 100, .N = 600, .K = 704, .bias = true, .rank = 8, .num_sms = 16},
    {.M = 70, .N = 704, .K = 576, .num_sms = 16},
    {.M = 200, .N = 128, .K = 1152, .dtype = DType::f16, .bias = true, .rank = 24, .gap = 24, .num_sms = 16},
    {.M = 250, .N = 1152, .K = 128, .rank = 16, .dropout = 0.25f, .num_sms = 16},
    {.M = 9, .N = 300, .K = 1088, .dtype = DType::f16, .bias = true, .rank = 16, .num_sms = 16},
    {.M = 12, .N = 1096, .K = 320, .rank = 72, .dropout = 0.3f, .gap = 8, .num_sms = 16},
    {.M = 31, .N = 300, .K = 1088, .bias = true, .rank = 8, .gap = 8, .num_sms = 16},
    {.M = 25, .N = 1096, .K = 320, .dtype = DType::f16, .rank = 16, .dropout = 0.5f, .num_sms = 16},
    {.M = 1, .N = 72, .K = 704, .bias = true, .rank = 8},
    {.M = 15, .N = 704, .K = 64, .dtype = DType::f16, .rank = 72, .dropout = 0.25f},
    {.M = 20, .N = 72, .K = 704, .dtype = DType::f16, .bias = true, .rank = 8},
    {.M = 17, .N = 704, .K = 64, .rank = 128, .lora_dtype = DType::bf16},
    {.M = 50, .N = 704, .K = 64, .rank = 128, .lora_dtype = DType::bf16},
    {.M = 256, .N = 128, .K = 768},
    {.M = 240, .N = 712, .K = 64, .dtype = DType::f16, .rank = 16, .dropout = 0.5f},
    {.M = 16, .N = 500, .K = 768, .bias = true, .rank = 16},
    {.M = 10, .N = 768, .K = 512, .rank = 16, .dropout = 0.5f},
    {.M = 32, .N = 500, .K = 768, .dtype = DType::f16},
    {.M = 30, .N = 768, .K = 512, .bias = true, .rank = 16, .dropout = 0.25f},
    {.M = 60, .N = 500, .K = 768, .bias = true, .rank = 16},
    {.M = 64, .N = 768, .K = 512, .rank = 16, .dropout = 0.5f},
    {.M = 70, .N = 500, .K = 832, .dtype = DType::f16},
    {.M = 70, .N = 832, .K = 512},
    {.M = 250, .N = 500, .K = 768, .rank = 8},
    {.M = 250, .N = 768, .K = 512, .dtype = DType::f16, .bias = true, .rank = 16},
    // fewer steps than the 8 blocks that would be done first
    {.M = 16, .N = 128, .K = 320, .num_sms = 16},
    {.M = 12, .N = 448, .K = 128, .rank = 8, .num_sms = 16},
    // in pairs: whole tiles, of which blocks have one or several
    {.M = 16, .N = 256, .K = 128, .rank = 8, .dropout = 0.5f, .pairs = true},
    {.M = 1, .N = 1, .K = 64, .rank = 8, .pairs = true},
    {.M = 30, .N = 392, .K = 448, .dtype = DType::f16, .bias = true, .rank = 72, .gap = 8, .pairs = true},
    {.M = 270, .N = 104, .K = 320, .rank = 128, .lora_dtype = DType::bf16, .dropout = 0.25f, .pairs = true},
    {.M = 513, .N = 136, .K = 192, .double_quant = false, .bias = true, .rank = 16, .pairs = true},
    {.M = 256, .N = 384, .K = 384, .blocksize = 4096, .pairs = true},
    // clusters of 4, forward and dX
    {.M = 9, .N = 131, .K = 1088, .bias = true, .rank = 16, .num_sms = 16, .pairs = true},
    {.M = 16, .N = 1096, .K = 192, .rank = 72, .dropout = 0.3f, .gap = 8, .num_sms = 16, .pairs = true},
    {.M = 32, .N = 256, .K = 1024, .dtype = DType::f16, .rank = 8, .num_sms = 16, .pairs = true},
    {.M = 20, .N = 1024, .K = 64, .num_sms = 16, .pairs = true},
    {.M = 60, .N = 384, .K = 1152, .bias = true, .rank = 8, .gap = 8, .num_sms = 16, .pairs = true},
    {.M = 64, .N = 1096, .K = 256, .dtype = DType::f16, .rank = 16, .dropout = 0.5f, .num_sms = 16, .pairs = true},
    {.M = 100, .N = 40, .K = 1088, .rank = 16, .num_sms = 16, .pairs = true},
    {.M = 128, .N = 1096, .K = 128, .dtype = DType::f16, .rank = 8, .num_sms = 16, .pairs = true},
    {.M = 200, .N = 256, .K = 1152, .dtype = DType::f16, .bias = true, .rank = 24, .num_sms = 16, .pairs = true},
    {.M = 250, .N = 1152, .K = 64, .rank = 16, .dropout = 0.25f, .num_sms = 16, .pairs = true},
    // clusters of 2
    {.M = 10, .N = 600, .K = 704, .dtype = DType::f16, .bias = true, .rank = 8, .num_sms = 16, .pairs = true},
    {.M = 15, .N = 704, .K = 576, .rank = 72, .dropout = 0.25f, .num_sms = 16, .pairs = true},
    {.M = 31, .N = 600, .K = 704, .bias = true, .num_sms = 16, .pairs = true},
    {.M = 17, .N = 704, .K = 192, .dtype = DType::f16, .rank = 128, .num_sms = 16, .pairs = true},
    {.M = 50, .N = 600, .K = 768, .rank = 16, .gap = 8, .num_sms = 16, .pairs = true},
    {.M = 60, .N = 712, .K = 256, .rank = 8, .dropout = 0.5f, .num_sms = 16, .pairs = true},
    {.M = 300, .N = 256, .K = 704, .bias = true, .rank = 16, .num_sms = 16, .pairs = true},
    {.M = 70, .N = 704, .K = 576, .dtype = DType::f16, .num_sms = 16, .pairs = true},
    {.M = 250, .N = 600, .K = 704, .rank = 8, .num_sms = 16, .pairs = true},
    {.M = 240, .N = 712, .K = 576, .dtype = DType::f16, .rank = 16, .dropout = 0.5f, .num_sms = 16, .pairs = true},
};
// Whether dX can be computed so: the rows of dY must consist of whole vectors.
bool has_backward(const Case& c) { return c.N % 8 == 0; }

void force_tiles_of(std::int64_t rows, bool pairs) {
  setenv("QLN_FORCE_KERNEL", ("wgmma:" + std::to_string(rows) + (pairs ? ",pairs" : ",alone")).c_str(), 1);
}
// Each case takes the smallest tile that holds its rows, or several of 128 rows.
std::int64_t tile_rows_of(const Case& c) {
  for (const std::int64_t rows : {16, 32, 64, 128, 256}) {
    if (c.M <= rows) return rows;
  }
  return 128;
}
template <class F>
void for_each_product(const F& f) {
  for (const Case& c : kCases) {
    force_tiles_of(tile_rows_of(c), c.pairs);
    f(c, false);
    if (has_backward(c)) f(c, true);
  }
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
}
void print(const char* what, const Case& c, bool backward) {
  std::printf("%s: M=%d N=%d K=%d%s%s\n", what, static_cast<int>(c.M), static_cast<int>(c.N), static_cast<int>(c.K),
              backward ? ", dX" : "", c.pairs ? ", in pairs" : "");
}

void product_is_the_sum_of_float64() {
  std::set<std::string> found;
  for_each_product([&](const Case& c, bool backward) {
    Layer layer(c, backward);
    layer.run();
    const bool is_right = layer.wrong() == 0;
    if (!is_right) print("wrong", c, backward);
    EXPECT(is_right);
    EXPECT(layer.keeps_to_its_columns());
    const std::string kernel = kernel_of(c, backward);
    EXPECT(contains(kernel, "wgmma"));
    for (const char* tile : kTiles) {
      if (contains(kernel, tile)) found.insert(tile + sharing_of(kernel) + (backward ? ", dX" : ""));
    }
  });
  EXPECT(found.size() == std::size(kTiles) * (std::size(kSharings) + kSharingsOfPairs) * 2);
}

void bits_depend_on_no_order_of_threads_or_blocks() {
  for_each_product([](const Case& c, bool backward) {
    Layer layer(c, backward);
    const std::vector<char> expected = layer.run();
    for (const char* schedule : {"reverse", "random:1", "random:2", "concurrent:1", "concurrent:2"}) {
      setenv("QLN_SCHEDULE", schedule, 1);
      Layer other(c, backward);
      const bool same = other.run() == expected;
      if (!same) print(schedule, c, backward);
      EXPECT(same);
    }
    unsetenv("QLN_SCHEDULE");
  });
}

// Four blocks of a cluster have sums of 1, 2^25, -2^25 and 1/2, and further ones have 0. In this order 1 is lost, and
// in others it is not, or 1/2 is, too. Rows and columns are as many as a tile has, so that each block adds a part of
// them; in the smallest tile two blocks share a vector.
void sums_of_a_cluster_are_added_in_the_order_of_the_inner_dimension(std::int64_t rows, std::int64_t cluster,
                                                                     bool pairs) {
  constexpr std::int64_t kStep = 64;
  const std::int64_t cols = pairs ? 256 : 128;
  const std::int64_t steps = cluster == 4 ? 18 : 42;
  Tensor x(DType::bf16, rows, steps * kStep), y(DType::bf16, rows, cols), ones(DType::f32, cols, steps * kStep);
  for (std::int64_t n = 0; n < cols; ++n) {
    for (std::int64_t k = 0; k < steps * kStep; ++k) ones.set(n, k, 1.0f);
  }
  const Quantized weight(ones.in(), format_named("nf4"), 64, false);
  for (std::int64_t m = 0; m < rows; ++m) {
    const float of_rank[] = {1.0f, 0x1p25f, -0x1p25f, 0.5f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (std::int64_t k = 0; k < steps * kStep; ++k) x.set(m, k, 0.0f);
    for (std::int64_t rank = 0; rank < cluster;
         ++rank) {  // in the last step of each, because the blocks share them unevenly
      x.set(m, (rank + 1) * steps / cluster * kStep - 1 - m % kStep, of_rank[rank]);
    }
  }
  setenv("QLN_EMULATED_SMS", "16", 1);
  force_tiles_of(rows, pairs);
  qn::linear_forward({.weight = weight.view(), .x = x.in(), .y = y.out()});
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
  bool all = true;
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t n = 0; n < cols; ++n) all = all && y.at(m, n) == 0.5;
  }
  EXPECT(all);
}

void decoded_weight_has_the_bits_of_dequantize() {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    EXPECT(Layer({.M = 192, .N = 130, .K = 192, .dtype = dtype}, false).differences_from_the_weight() == 0);
    EXPECT(Layer({.M = 136, .N = 136, .K = 192, .dtype = dtype}, true).differences_from_the_weight() == 0);
  }
}

void other_operands_take_another_kernel() {
  const auto takes_another_kernel = [](const Case& c, bool backward) {
    const std::string kernel = kernel_of(c, backward);
    if (kernel.empty() || contains(kernel, "wgmma")) return false;
    Layer layer(c, backward);
    layer.run();
    return c.dtype == DType::f32 || layer.wrong() == 0;
  };
  const Case others[] = {
      {.M = 64, .N = 128, .K = 96},                    // K is not whole steps
      {.M = 64, .N = 128, .K = 100},                   // K is not even whole vectors
      {.M = 64, .N = 128, .K = 128, .blocksize = 32},  // a step has two scales
      {.M = 64, .N = 128, .K = 128, .dtype = DType::f32},
      {.M = 64, .N = 128, .K = 128, .format = "int8", .double_quant = false},
      {.M = 64, .N = 128, .K = 128, .rank = 12},  // rows of U are not whole vectors
      {.M = 64, .N = 128, .K = 128, .gap = 1},    // rows of X are not aligned for vectors
  };
  for (const Case& c : others) {
    EXPECT(takes_another_kernel(c, false));
    EXPECT(takes_another_kernel(c, true));
  }
  EXPECT(takes_another_kernel({.M = 64, .N = 132, .K = 128}, true));  // rows of dY are not whole vectors
  unsetenv("QLN_FORCE_KERNEL");                                       // the device is not a Hopper
  EXPECT(!contains(kernel_of(kCases[0], false), "wgmma"));
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
  setenv("QLN_EMULATED_SMEM", "166912", 1);
  EXPECT(!contains(kernel_of(kCases[0], false), "wgmma"));
  unsetenv("QLN_EMULATED_SMEM");
}

}  // namespace

int main() {
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
  product_is_the_sum_of_float64();
  for (const std::int64_t rows : {16, 32, 64}) {
    for (const std::int64_t cluster : {4, 8}) {
      sums_of_a_cluster_are_added_in_the_order_of_the_inner_dimension(rows, cluster, false);
    }
    sums_of_a_cluster_are_added_in_the_order_of_the_inner_dimension(rows, 4, true);
  }
  decoded_weight_has_the_bits_of_dequantize();
  other_operands_take_another_kernel();
  bits_depend_on_no_order_of_threads_or_blocks();
  return report();
}
