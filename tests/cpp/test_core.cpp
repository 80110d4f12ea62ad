// Guards what the core, without torch or Python, promises for every backend. ctest runs this test once for each
// instruction set.
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/runtime/blocking.h"
#include "isa_is_here.h"
#include "layer.h"
#include "parameter.h"
#include "pool.h"
#include "qlora_native/qlora_native.h"

namespace {

// Blocks straddle rows, and K is odd.
Case ragged(DType dtype) {
  return {.M = 37, .N = 53, .K = 131, .dtype = dtype, .blocksize = 32, .bias = true, .rank = 5, .dropout = 0.25f};
}
std::vector<char> results_of(Layer layer) {
  layer.run();
  return layer.bytes();
}

TEST(seed_in_memory_gives_the_mask_of_the_number) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Layer layer(ragged(dtype));
    layer.seed = 77;
    const std::vector<char> expected = results_of(layer);
    layer.seed = 70;
    EXPECT(results_of(layer) != expected);
    const std::uint64_t rest = 7;
    layer.device_seed = &rest;
    EXPECT(results_of(layer) == expected);
  }
}

// Codes and results lie at odd addresses, and nested_blocksize is not always a power of two.
TEST(dequantize_reaches_any_address) {
  const Layer layer(ragged(DType::f32));
  const std::int64_t elements = layer.c.N * layer.c.K;
  constexpr int nested_blocksize = 100;
  const float nested[3] = {1.0f, -2.0f, 0.5f};
  qn::QuantizedWeightView view = layer.weight.view();
  view.nested_absmax = nested;
  view.nested_blocksize = nested_blocksize;
  std::vector<float> expected(elements);
  for (std::int64_t i = 0; i < elements; ++i) {
    expected[i] = qn::value_of_element(view, i);
  }
  std::vector<std::uint8_t> codes(layer.weight.codes.size() + 1);
  std::copy(layer.weight.codes.begin(), layer.weight.codes.end(), codes.begin() + 1);
  std::vector<float> out(elements + 1);
  for (const int shift : {0, 1}) {
    view.codes = shift == 0 ? layer.weight.codes.data() : codes.data() + 1;
    qn::dequantize({.weight = view, .out = out.data() + shift});
    EXPECT(std::memcmp(out.data() + shift, expected.data(), elements * sizeof(float)) == 0);
  }
}

// 40 rows of so many logits are multiplied in several parts of their columns (cpu/product/backward-inl.h).
TEST(input_gradient_of_a_vocabulary_has_the_same_bits_where_v_is_not_wanted) {
  if (std::getenv("QLN_BACKEND") != nullptr) return;  // only on the cpu
  Layer layer({.M = 40, .N = 131'075, .K = 3, .rank = 70});
  layer.backward();
  const Tensor wanted = layer.dx;
  qn::LinearBackwardInputArgs args = layer.backward_args();
  args.v = {};
  qn::linear_backward_input(args);
  EXPECT(layer.dx.bytes() == wanted.bytes());
}

// A large output bypasses the caches if it has an aligned address, in memory whose pages exist already.
TEST(large_output_has_the_bits_of_a_small_one) {
  if (std::getenv("QLN_BACKEND") != nullptr) return;  // only on the cpu
  constexpr std::int64_t N = 2053, K = 4096, elements = N * K;
  std::vector<std::uint8_t> codes(elements / 2);
  std::vector<float> absmax(elements / 64);
  std::uint32_t random = 1;
  for (auto& byte : codes) byte = static_cast<std::uint8_t>((random = random * 1664525 + 1013904223) >> 24);
  for (auto& scale : absmax) scale = static_cast<float>((random = random * 1664525 + 1013904223) >> 16);
  const qn::QuantizedWeightView view{
      .N = N, .K = K, .codes = codes.data(), .absmax = absmax.data(), .code = qn::codebook("nf4").data()};
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    const std::size_t size = qn::size_of(dtype), bytes = elements * size;
    std::vector<char> memory(2 * bytes + 128);  // its pages exist, because the vector clears them
    void* aligned = memory.data();
    std::size_t space = memory.size();
    EXPECT(std::align(64, bytes, aligned, space) != nullptr);
    char* const shifted = static_cast<char*>(aligned) + bytes + size;
    EXPECT(qn::wants_streaming_stores(aligned, bytes) && !qn::wants_streaming_stores(shifted, bytes));
    EXPECT(!qn::wants_streaming_stores(aligned, qn::stream_bytes(qn::caches()) - 1));
    qn::dequantize({.weight = view, .dtype = dtype, .out = aligned});
    qn::dequantize({.weight = view, .dtype = dtype, .out = shifted});
    EXPECT(std::memcmp(aligned, shifted, bytes) == 0);
  }
}

TEST(codebooks_and_maps_have_their_published_levels) {
  EXPECT(qn::codebook("nf4")[0] == -1.0f && qn::codebook("nf4")[7] == 0.0f && qn::codebook("nf4")[15] == 1.0f);
  EXPECT(qn::codebook("int4")[8] == 0.0f && qn::codebook("int4")[15] == 1.0f);
  EXPECT(qn::codebook("fp4")[3] == 1.0f && qn::codebook("fp4")[11] == -1.0f && qn::codebook("fp4")[1] == 0.0625f / 12);
  const auto& map = qn::dynamic_map();
  for (int i = 0; i < 255; ++i) EXPECT(map[i] < map[i + 1]);
  EXPECT(map[127] == 0.0f && map[255] == 1.0f && map[0] == -map[254]);
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a of the bits; expected: that of bitsandbytes' create_dynamic_map()
  for (float level : map) hash = (hash ^ std::bit_cast<std::uint32_t>(level)) * 0x100000001b3;
  EXPECT(hash == 0x690ca6ad558a2475);

  for (const char* format : {"nf4", "fp4", "int4"}) {
    const float* code = qn::codebook(format).data();
    const qn::SortedCodebook sorted = qn::sort_codebook(code);
    for (int c = 0; c < 16; ++c) EXPECT(code[qn::nearest_code(sorted, code[c])] == code[c]);
    for (int i = 0; i < 15; ++i) EXPECT(code[qn::nearest_code(sorted, sorted.midpoint[i])] == sorted.value[i]);  // ties
  }
  EXPECT(qn::nearest_code(qn::sort_codebook(qn::codebook("nf4").data()), 0.0f) == 7);
  EXPECT(qn::nearest_code(qn::sort_codebook(qn::codebook("fp4").data()), 0.0f) == 0);
}

TEST(sixteen_bit_numbers_round_to_nearest_even) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float f = qn::f32_from_f16(half), b = qn::f32_from_bf16(half);
    EXPECT(f != f ? std::isnan(qn::f32_from_f16(qn::f16_from_f32(f))) : qn::f16_from_f32(f) == half);
    EXPECT(b != b ? std::isnan(qn::f32_from_bf16(qn::bf16_from_f32(b))) : qn::bf16_from_f32(b) == half);
    if ((half & 0x7FFF) >= 0x7BFF) continue;  // from the last finite number on there is no next one
    const float above = qn::f32_from_f16(static_cast<std::uint16_t>(half + 1)), midpoint = (f + above) / 2;
    EXPECT(qn::f16_from_f32(midpoint) == half + (half & 1));  // a tie goes to the even number
    EXPECT(qn::f16_from_f32(std::nextafterf(midpoint, f)) == half);
    EXPECT(qn::f16_from_f32(std::nextafterf(midpoint, above)) == half + 1);
  }
  EXPECT(qn::f16_from_f32(65519.996f) == 0x7BFF && qn::f16_from_f32(65520.0f) == 0x7C00);
}

TEST(known_weights_quantize_to_known_codes) {
  std::vector<float> w = {0.5f, -0.5f, 0.0f};  // the last low nibble is the code of 0
  std::uint8_t codes[2];
  float absmax;
  qn::NonFinite non_finite;
  qn::QuantizeArgs args{.weight = w.data(),
                        .elements = 3,
                        .code = qn::codebook("nf4").data(),
                        .codes = codes,
                        .absmax = &absmax,
                        .non_finite = &non_finite};
  qn::quantize(args);
  EXPECT(codes[0] == 0xF0 && codes[1] == 0x77 && absmax == 0.5f);
  w = {0.0f, 0.0f, 0.0f};
  qn::quantize(args);
  EXPECT(codes[0] == 0x77 && codes[1] == 0x77 && absmax == 0.0f);
}

TEST(microscaled_weights_are_quantized_by_their_rules) {
  const std::array<float, 16>& levels = qn::codebook("mxfp4");
  constexpr std::int64_t N = 3, K = 32;
  std::vector<float> weight(N * K), nested_code(256);
  for (std::size_t e = 0; e < weight.size(); ++e) weight[e] = 0.25f * levels[e % 16];
  for (const int blocksize : {32, 16}) {
    std::vector<std::uint8_t> codes(N * K / 2), scales(N * K / blocksize);
    qn::NonFinite non_finite;
    qn::quantize_microscaled({.weight = weight.data(),
                              .elements = N * K,
                              .blocksize = blocksize,
                              .codes = codes.data(),
                              .scales = scales.data(),
                              .nested_code = nested_code.data(),
                              .non_finite = &non_finite});
    EXPECT(non_finite.count == 0 && non_finite.first == -1);
    for (std::size_t i = 0; i < codes.size(); ++i) EXPECT(codes[i] == 0x01 + 0x22 * (i % 8));
    // Every block's largest element is 1.5, which is 6 times 2^-2; so the scales of NVFP4 are E4M3's largest number.
    for (const std::uint8_t scale : scales) EXPECT(scale == (blocksize == 32 ? 125 : 126));
    EXPECT(std::isnan(nested_code[255]) && std::isfinite(nested_code[126]));
    EXPECT(nested_code[0] == (blocksize == 32 ? 0x1p-127f : 0.0f));
  }
}

TEST(adamw_steps_or_skips_as_a_whole) {
  Optimizer optimizer;
  const Parameter before[2] = {optimizer.parameters[0], optimizer.parameters[1]};
  qn::optimizer_8bit_step(optimizer.args());
  // The first step moves by lr against the sign of the gradient, because with bias corrections m / sqrt(v) is +-1.
  double worst = 0.0;
  for (int i = 0; i < 2; ++i) {
    EXPECT(optimizer.parameters[i].step == 1);
    for (std::int64_t j = 0; j < before[i].param.cols(); ++j) {
      const double expected =
          before[i].param.at(0, j) * (1.0 - 0.01 * 0.1) - std::copysign(0.01, before[i].grad.at(0, j));
      worst = std::max(worst, std::fabs(optimizer.parameters[i].param.at(0, j) - expected));
    }
  }
  EXPECT(worst < 1e-6);  // values of about 1, eps = 1e-8 beside gradients of 1e-3 and more

  const Parameter after = optimizer.parameters[0];
  Tensor& grad = optimizer.parameters[1].grad;
  for (float bad : {NAN, INFINITY, -INFINITY, 2e19f}) {
    grad.set(0, 69, bad);
    qn::optimizer_8bit_step(optimizer.args());
  }
  grad.set(0, 69, 0.5f);
  const float found_inf = 1.0f;
  qn::Optimizer8bitArgs args = optimizer.args();
  args.found_inf = &found_inf;
  qn::optimizer_8bit_step(args);
  EXPECT(optimizer.skipped == 5 && optimizer.parameters[0] == after);

  Optimizer large;
  large.parameters[1].grad.set(0, 69, 0x1.fffffep63f);  // the largest gradient that is usable
  qn::optimizer_8bit_step(large.args());
  EXPECT(large.skipped == 0 && large.parameters[0].step == 1);
}

TEST(missing_cuda_is_explained) {
  if (qn::cuda_unavailable_reason().empty()) return;
  const Layer layer(ragged(DType::f32));
  std::vector<float> out(layer.c.N * layer.c.K);
  try {
    qn::dequantize({.weight = layer.weight.view(), .out = out.data()}, {.device = qn::Device::cuda});
    EXPECT(false);
  } catch (const qn::Unavailable& error) {
    EXPECT(qn::cuda_unavailable_reason() == error.what());
  }
}

// Every element of a product lies in exactly one part and tile. No tile is larger than its buffers. No thread waits for
// another thread's last tile if that can be avoided.
TEST(grids_cover_every_element_evenly) {
  const qn::GridLimits limits{22, 3, 32, 8, 1};
  for (std::int64_t rows : {1, 3, 22, 23, 86})
    for (std::int64_t columns : {1, 9, 31, 33, 64, 224, 1000})
      for (std::int64_t threads : {1, 2, 3, 16})
        for (std::int64_t tasks_per_thread : {1, 8}) {
          const qn::Grid grid = qn::make_grid(rows, columns, limits, threads, tasks_per_thread);
          EXPECT(grid.row_part <= limits.max_rows && grid.column_tile <= limits.max_tile);
          EXPECT((grid.row_parts - 1) * grid.row_part < rows && rows <= grid.row_parts * grid.row_part);
          EXPECT((grid.column_tiles - 1) * grid.column_tile < columns &&
                 columns <= grid.column_tiles * grid.column_tile);
        }
  const qn::Grid wide = qn::make_grid(3, 224, {22, 21, 32, 1, 1}, 2, 1);  // M=16, K=14336 on two threads
  EXPECT(wide.row_parts == 1 && wide.column_tiles == 8);
  // Rows are not split if narrower tiles are enough, because W would be decoded twice.
  const qn::Grid narrow = qn::make_grid(171, 24, {171, 21, 2, 1, 1}, 2, 8);  // M=1024, K=1536
  EXPECT(narrow.row_parts == 1 && narrow.column_tiles == 24);
}

// A thread takes few rows of a small weight in one task, because the first panel is decoded while nothing is
// multiplied.
TEST(small_weights_are_cut_into_few_tasks) {
  EXPECT(qn::tasks_per_thread(18, 2) == 1);   // 16 rows by 576 x 1536
  EXPECT(qn::tasks_per_thread(72, 2) == 8);   // 64 rows
  EXPECT(qn::tasks_per_thread(256, 2) == 8);  // 16 rows by 4096 x 4096
  EXPECT(qn::tasks_per_thread(1, 64) == 1);
}

TEST(blocks_fit_the_caches_of_the_machine) {
  const qn::Caches found = qn::caches();
  EXPECT(found.second >= 4 << 10 && found.last >= found.second);
  const qn::Caches small{.second = 256 << 10, .last = 6 << 20};
  const qn::Caches large{.second = 2 << 20, .last = 256 << 20};
  EXPECT(qn::scaled_to_l2(32, 1, small) == 8 && qn::scaled_to_l2(2, 1, small) == 1);
  EXPECT(qn::scaled_to_l2(32, 1, large) == 32);
  EXPECT(qn::stream_bytes(small) == 3 << 20 && qn::stream_bytes(large) == 16 << 20);
}

TEST(activations_are_packed_in_equal_blocks) {
  for (std::int64_t rows : {1, 47, 48, 1000, 5000})
    for (std::int64_t bytes : {4, 8192, 1 << 24}) {
      const std::int64_t block = qn::rows_per_block(rows, bytes, 48);
      EXPECT(block >= 48 && block % 48 == 0);
      EXPECT(block == 48 || block * bytes <= qn::kPackedBytes);
      EXPECT(block == 48 || block < rows + 48);
    }
}

TEST(bits_are_the_same_for_concurrent_callers) {
  const Layer layer(ragged(DType::f32));
  for (const int pool : {0, 3}) {  // the library's own threads, and the application's
    if (pool > 0) use_pool(pool);
    EXPECT(pool == 0 || qn::num_threads() == pool);
    const std::vector<char> alone = results_of(layer);
    std::vector<std::vector<char>> results(3);
    std::vector<std::thread> callers;
    for (auto& result : results) {
      callers.emplace_back([&] {
        for (int repeat = 0; repeat < 5; ++repeat) result = results_of(layer);
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const auto& result : results) EXPECT(result == alone);
  }
}

}  // namespace

int main() {
  if (!isa_is_here()) return kSkipped;
  return run_tests();
}
