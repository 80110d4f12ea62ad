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
#include <thread>
#include <vector>

#include "death_message.h"
#include "layer.h"
#include "qlora_native/qlora_native.h"

namespace {

// The text that a product prints about its kernel.
std::string kernel_of(const Case& c, bool backward) {
  Layer layer(c);
  return death_message([&] {
    setenv("QLN_PRINT_CONFIG", "1", 1);
    backward ? layer.backward() : layer.forward();
    std::fflush(stderr);
    _exit(1);
  });
}

// The tiles of wgmma, and how its blocks share them.
const char* const kTiles[] = {"tiles of 16x128", "tiles of 32x128", "tiles of 64x128", "tiles of 128x128",
                              "tiles of 256x128"};
const char* const kSharings[] = {"with whole tiles", "in clusters of 2", "in clusters of 4", "in clusters of 8",
                                 "by stream-K"};
// Those of pairs are the first three: there is no stream-K, and there are no clusters of 16 blocks.
constexpr std::size_t kSharingsOfPairs = 3;
std::string sharing_of(const std::string& kernel) {
  for (const char* sharing : kSharings) {
    if (contains(kernel, sharing)) return sharing + std::string(contains(kernel, "in pairs") ? ", in pairs" : "");
  }
  return "";
}

// The cases have each tile, full and with missing rows and columns, shared by each means, by steps that divide evenly
// and unevenly; blocks with several tiles; the fewest steps; each codebook and kind of scale; and adapters of no, one
// and two steps, full and partial. Pairs have even and odd numbers of tiles of columns.
const struct {
  int num_sms;  // of the emulated device
  bool pairs;   // of blocks load rows of X for each other
  std::vector<Case> cases;
} kCases[] = {
    {3,
     false,
     {
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
         {.M = 270, .N = 104, .K = 320, .rank = 128, .lora_dtype = DType::bf16},
         {.M = 256, .N = 128, .K = 448, .blocksize = 4096, .bias = true},
         {.M = 200, .N = 192, .K = 576, .dtype = DType::f16, .format = "fp4", .bias = true, .rank = 24, .gap = 24},
         {.M = 513, .N = 136, .K = 192, .double_quant = false, .bias = true, .rank = 16},
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
     }},
    {16,
     false,
     {
         {.M = 97,
          .N = 257,
          .K = 704,
          .blocksize = 256,
          .bias = true,
          .rank = 16,
          .lora_dtype = DType::bf16,
          .gap = 16},
         {.M = 97, .N = 704, .K = 192, .blocksize = 256, .rank = 16, .lora_dtype = DType::bf16, .gap = 16},
         // in clusters of 8, 4 and 2, and by stream-K
         {.M = 7, .N = 72, .K = 2112, .bias = true, .rank = 8},
         {.M = 16, .N = 2112, .K = 64, .dtype = DType::f16, .rank = 16, .dropout = 0.5f},
         {.M = 20, .N = 136, .K = 2240, .dtype = DType::f16, .rank = 16, .gap = 8},
         {.M = 31, .N = 2200, .K = 192, .rank = 8},
         {.M = 50, .N = 72, .K = 2112, .bias = true},
         {.M = 64, .N = 2112, .K = 64, .rank = 16, .dropout = 0.25f, .gap = 8},
         {.M = 100, .N = 40, .K = 2112, .rank = 16},
         {.M = 70, .N = 2112, .K = 64, .dtype = DType::f16},
         {.M = 130, .N = 40, .K = 2112, .dtype = DType::f16, .bias = true},
         {.M = 140, .N = 2112, .K = 64, .rank = 8},
         {.M = 33, .N = 300, .K = 1088, .dtype = DType::f16, .bias = true, .rank = 16},
         {.M = 50, .N = 1096, .K = 320, .rank = 72, .dropout = 0.3f, .gap = 8},
         {.M = 100, .N = 136, .K = 1024, .bias = true},
         {.M = 128, .N = 1024, .K = 192, .dtype = DType::f16, .rank = 8},
         {.M = 100, .N = 600, .K = 704, .bias = true, .rank = 8},
         {.M = 70, .N = 704, .K = 576},
         {.M = 200, .N = 128, .K = 1152, .dtype = DType::f16, .bias = true, .rank = 24, .gap = 24},
         {.M = 250, .N = 1152, .K = 128, .rank = 16, .dropout = 0.25f},
         {.M = 9, .N = 300, .K = 1088, .dtype = DType::f16, .bias = true, .rank = 16},
         {.M = 12, .N = 1096, .K = 320, .rank = 72, .dropout = 0.3f, .gap = 8},
         {.M = 31, .N = 300, .K = 1088, .bias = true, .rank = 8, .gap = 8},
         {.M = 25, .N = 1096, .K = 320, .dtype = DType::f16, .rank = 16, .dropout = 0.5f},
         // fewer steps than the 8 blocks that would be done first
         {.M = 16, .N = 128, .K = 320},
         {.M = 12, .N = 448, .K = 128, .rank = 8},
     }},
    {3,
     true,
     {
         // in pairs: whole tiles, of which blocks have one or several
         {.M = 16, .N = 256, .K = 128, .rank = 8, .dropout = 0.5f},
         {.M = 1, .N = 1, .K = 64, .rank = 8},
         {.M = 30, .N = 392, .K = 448, .dtype = DType::f16, .bias = true, .rank = 72, .gap = 8},
         {.M = 270, .N = 104, .K = 320, .rank = 128, .dropout = 0.25f, .lora_dtype = DType::bf16},
         {.M = 513, .N = 136, .K = 192, .double_quant = false, .bias = true, .rank = 16},
         {.M = 256, .N = 384, .K = 384, .blocksize = 4096},
     }},
    {16,
     true,
     {
         // clusters of 4, forward and dX
         {.M = 9, .N = 131, .K = 1088, .bias = true, .rank = 16},
         {.M = 16, .N = 1096, .K = 192, .rank = 72, .dropout = 0.3f, .gap = 8},
         {.M = 32, .N = 256, .K = 1024, .dtype = DType::f16, .rank = 8},
         {.M = 20, .N = 1024, .K = 64},
         {.M = 60, .N = 384, .K = 1152, .bias = true, .rank = 8, .gap = 8},
         {.M = 64, .N = 1096, .K = 256, .dtype = DType::f16, .rank = 16, .dropout = 0.5f},
         {.M = 100, .N = 40, .K = 1088, .rank = 16},
         {.M = 128, .N = 1096, .K = 128, .dtype = DType::f16, .rank = 8},
         {.M = 200, .N = 256, .K = 1152, .dtype = DType::f16, .bias = true, .rank = 24},
         {.M = 250, .N = 1152, .K = 64, .rank = 16, .dropout = 0.25f},
         // clusters of 2
         {.M = 10, .N = 600, .K = 704, .dtype = DType::f16, .bias = true, .rank = 8},
         {.M = 15, .N = 704, .K = 576, .rank = 72, .dropout = 0.25f},
         {.M = 31, .N = 600, .K = 704, .bias = true},
         {.M = 17, .N = 704, .K = 192, .dtype = DType::f16, .rank = 128},
         {.M = 50, .N = 600, .K = 768, .rank = 16, .gap = 8},
         {.M = 60, .N = 712, .K = 256, .rank = 8, .dropout = 0.5f},
         {.M = 300, .N = 256, .K = 704, .bias = true, .rank = 16},
         {.M = 70, .N = 704, .K = 576, .dtype = DType::f16},
         {.M = 250, .N = 600, .K = 704, .rank = 8},
         {.M = 240, .N = 712, .K = 576, .dtype = DType::f16, .rank = 16, .dropout = 0.5f},
     }},
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
void for_each_case(const F& f) {
  for (const auto& [num_sms, pairs, cases] : kCases) {
    setenv("QLN_EMULATED_SMS", std::to_string(num_sms).c_str(), 1);
    for (const Case& c : cases) {
      force_tiles_of(tile_rows_of(c), pairs);
      f(c);
    }
  }
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
  setenv("QLN_EMULATED_SMS", "3", 1);
}

TEST(product_is_the_sum_of_float64) {
  std::set<std::string> found;
  for_each_case([&](const Case& c) {
    Layer layer(c);
    layer.forward();
    layer.backward();
    layer.check(/*with_gradients=*/false);
    for (const bool backward : {false, true}) {
      if (backward && !has_backward(c)) continue;
      const std::string kernel = kernel_of(c, backward);
      EXPECT(contains(kernel, "wgmma"));
      for (const char* tile : kTiles) {
        if (contains(kernel, tile)) found.insert(tile + sharing_of(kernel) + (backward ? ", dX" : ""));
      }
    }
  });
  EXPECT(found.size() == std::size(kTiles) * (std::size(kSharings) + kSharingsOfPairs) * 2);
}

TEST(bits_depend_on_no_order_of_threads_or_blocks) {
  for_each_case([](const Case& c) {
    const auto bytes_of_products = [&] {
      Layer layer(c);
      layer.forward();
      if (has_backward(c)) layer.backward();
      return layer.bytes();
    };
    const std::vector<char> expected = bytes_of_products();
    for (const char* schedule : {"reverse", "random:1", "random:2", "concurrent:1", "concurrent:2"}) {
      setenv("QLN_SCHEDULE", schedule, 1);
      const bool same = bytes_of_products() == expected;
      if (!same) std::printf("%s: %s\n", schedule, c.name().c_str());
      EXPECT(same);
    }
    unsetenv("QLN_SCHEDULE");
  });
}

// Four blocks of a cluster have partial sums of 1, 2^25, -2^25 and 1/2, and further ones have 0. In this order 1 is
// lost, and in others it is not, or 1/2 is, too. Rows and columns are as many as a tile has, so that each block adds a
// part of them; in the smallest tile two blocks share a vector.
void expect_partial_sums_in_order(std::int64_t rows, std::int64_t cluster, bool pairs) {
  constexpr std::int64_t kStep = 64;
  const std::int64_t cols = pairs ? 256 : 128;
  const std::int64_t steps = cluster == 4 ? 18 : 42;
  Tensor x(DType::bf16, rows, steps * kStep), y(DType::bf16, rows, cols), ones(DType::f32, cols, steps * kStep);
  for (std::int64_t n = 0; n < cols; ++n)
    for (std::int64_t k = 0; k < steps * kStep; ++k) ones.set(n, k, 1.0f);
  const Quantized weight(ones.in(), format_named("nf4"), 64, false);
  for (std::int64_t m = 0; m < rows; ++m) {
    const float values[] = {1.0f, 0x1p25f, -0x1p25f, 0.5f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (std::int64_t k = 0; k < steps * kStep; ++k) x.set(m, k, 0.0f);
    // In the last step of each block, because the blocks share them unevenly.
    for (std::int64_t rank = 0; rank < cluster; ++rank) {
      x.set(m, (rank + 1) * steps / cluster * kStep - 1 - m % kStep, values[rank]);
    }
  }
  setenv("QLN_EMULATED_SMS", "16", 1);
  force_tiles_of(rows, pairs);
  qn::linear_forward({.weight = weight.view(), .x = x.in(), .y = y.out()});
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
  bool all = true;
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t n = 0; n < cols; ++n) all = all && y.at(m, n) == 0.5;
  EXPECT(all);
}

TEST(partial_sums_of_a_cluster_are_added_in_the_order_of_the_inner_dimension) {
  for (const std::int64_t rows : {16, 32, 64}) {
    for (const std::int64_t cluster : {4, 8}) expect_partial_sums_in_order(rows, cluster, false);
    expect_partial_sums_in_order(rows, 4, true);
  }
}

// The result of the identity is the transpose of W, or with dX W itself.
TEST(decoded_weight_has_the_bits_of_dequantize) {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const bool backward : {false, true}) {
      const std::int64_t N = backward ? 136 : 130, K = 192, M = backward ? N : K;
      Layer layer({.M = M, .N = N, .K = K, .dtype = dtype});
      Tensor w(dtype, N, K);
      Tensor& identity = backward ? layer.dy : layer.x;
      for (std::int64_t i = 0; i < M * M; ++i) identity.set(i / M, i % M, i / M == i % M ? 1.0f : 0.0f);
      backward ? layer.backward() : layer.forward();
      qn::dequantize({.weight = layer.weight.view(), .dtype = dtype, .out = w.data()});
      int differences = 0;
      for (std::int64_t n = 0; n < N; ++n)
        for (std::int64_t k = 0; k < K; ++k) {
          differences += (backward ? layer.dx.at(n, k) : layer.y.at(k, n)) != w.at(n, k);
        }
      EXPECT(differences == 0);
    }
}

// As in a thread of autograd: pairs of blocks have no workspace, so nothing in the call needs a context before the
// maps.
TEST(product_can_be_the_first_call_of_a_thread) {
  force_tiles_of(16, true);
  Layer layer({.M = 16, .N = 128, .K = 320}), expected({.M = 16, .N = 128, .K = 320});
  std::thread([&] { layer.forward(); }).join();
  std::thread([&] { layer.backward(); }).join();
  expected.forward();
  expected.backward();
  EXPECT(layer.bytes() == expected.bytes());
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
}

// W ends within a step of dX, which multiplies what is beyond W by zeros.
TEST(scale_of_the_last_block_matters_to_its_columns_alone) {
  for (const char* kernel : {"wgmma", "gemm"}) {
    setenv("QLN_FORCE_KERNEL", kernel, 1);
    Layer layer({.M = 40, .N = 72, .K = 128, .double_quant = false});
    layer.backward();
    Layer infinite(layer.c);
    infinite.weight.absmax.back() = INFINITY;
    infinite.backward();
    int same = 0;
    for (std::int64_t m = 0; m < 40; ++m)
      for (std::int64_t k = 0; k < 64; ++k) same += infinite.dx.at(m, k) == layer.dx.at(m, k);
    EXPECT(same == 40 * 64);
    EXPECT(!std::isfinite(infinite.dx.at(0, 64)));
  }
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
}

TEST(other_operands_take_another_kernel) {
  const auto takes_another_kernel = [](const Case& c, bool backward) {
    const std::string kernel = kernel_of(c, backward);
    if (kernel.empty() || contains(kernel, "wgmma")) return false;
    Layer layer(c);
    layer.forward();
    layer.backward();
    layer.check(/*with_gradients=*/false);
    return true;
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
  EXPECT(!contains(kernel_of({.M = 64, .N = 128, .K = 64}, false), "wgmma"));
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
  setenv("QLN_EMULATED_SMEM", "166912", 1);
  EXPECT(!contains(kernel_of({.M = 64, .N = 128, .K = 64}, false), "wgmma"));
  unsetenv("QLN_EMULATED_SMEM");
}

}  // namespace

int main() {
  setenv("QLN_FORCE_KERNEL", "wgmma", 1);
  return run_tests();
}
