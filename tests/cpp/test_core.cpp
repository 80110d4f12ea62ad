// Guards what the core, without torch or Python, promises for every backend. ctest runs this test once for each
// instruction set; it exits 1 on a failure.
#include <sys/wait.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/codebook.h"
#include "common/float16.h"
#include "common/philox.h"
#include "cpu/runtime/blocking.h"
#include "expect.h"
#include "isa_is_here.h"
#include "pool.h"
#include "qlora_native/qlora_native.h"
#include "quantized.h"

namespace qn = qlora_native;

namespace {

// ---- a small layer, its quantized weight and all of its results ----

struct Random {
  std::uint64_t state = 1;
  float next() {  // in [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31f;
  }
  std::vector<float> floats(std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = next();
    return values;
  }
};

// A layer with ragged shapes: blocks straddle rows, and K is odd.
struct Layer {
  static constexpr std::int64_t M = 37, N = 53, K = 131, rank = 5;
  std::vector<float> w, x, a, b, bias, dy;
  Quantized weight;
  std::uint64_t seed = 77;
  const std::uint64_t* device_seed = nullptr;

  Layer() : Layer(Random{}) {}
  explicit Layer(Random random)
      : w(random.floats(N * K)),
        x(random.floats(M * K)),
        a(random.floats(rank * K)),
        b(random.floats(N * rank)),
        bias(random.floats(N)),
        dy(random.floats(M * N)),
        weight(quantized()) {
    EXPECT(weight.non_finite.count == 0 && weight.non_finite.first == -1);
  }

  Quantized quantized() const {
    return {{w.data(), qn::DType::f32, N, K, K}, format_named("nf4"), /*blocksize=*/32, /*double_quant=*/true};
  }
  qn::LoraView lora() const {
    return {.rank = rank,
            .a = a.data(),
            .b = b.data(),
            .scaling = 0.5f,
            .dropout = 0.25f,
            .seed = seed,
            .device_seed = device_seed};
  }

  // Everything that the library computes from this layer, in one vector.
  std::vector<float> results() const {
    const Quantized again = quantized();
    EXPECT(again.codes == weight.codes && again.absmax_codes == weight.absmax_codes && again.offset == weight.offset);
    std::vector<float> dense(N * K), y(M * N), u(M * rank), dx(M * K), v(M * rank), da(rank * K), db(N * rank);
    const auto in = [](const std::vector<float>& data, std::int64_t cols) {
      return qn::ConstMatrix{data.data(), qn::DType::f32, static_cast<std::int64_t>(data.size()) / cols, cols, cols};
    };
    const auto out = [](std::vector<float>& data, std::int64_t cols) {
      return qn::Matrix{data.data(), qn::DType::f32, static_cast<std::int64_t>(data.size()) / cols, cols, cols};
    };
    qn::dequantize({.weight = again.view(), .out = dense.data()});
    qn::linear_forward({.weight = again.view(),
                        .lora = lora(),
                        .x = in(x, K),
                        .bias = bias.data(),
                        .y = out(y, N),
                        .u = out(u, rank)});
    qn::linear_backward_input(
        {.weight = again.view(), .lora = lora(), .dy = in(dy, N), .dx = out(dx, K), .v = out(v, rank)});
    qn::lora_gradients({.lora = lora(),
                        .x = in(x, K),
                        .dy = in(dy, N),
                        .u = in(u, rank),
                        .v = in(v, rank),
                        .da = da.data(),
                        .db = db.data()});
    std::vector<float> all;
    for (const auto* part : {&dense, &y, &u, &dx, &v, &da, &db}) all.insert(all.end(), part->begin(), part->end());
    return all;
  }

  // dX in bf16. Its kernels are not those of fp32.
  std::vector<std::uint16_t> dx_of_bf16() const {
    std::vector<std::uint16_t> dy16, dx(M * K), v(M * rank);
    for (float value : dy) dy16.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16));
    qn::linear_backward_input({.weight = weight.view(),
                               .lora = lora(),
                               .dy = {dy16.data(), qn::DType::bf16, M, N, N},
                               .dx = {dx.data(), qn::DType::bf16, M, K, K},
                               .v = {v.data(), qn::DType::bf16, M, rank, rank}});
    return dx;
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// ---- cases ----

void seed_in_memory_gives_the_mask_of_the_number() {
  Layer layer;
  const std::vector<float> expected = layer.results();
  const std::uint64_t rest = 7;
  const std::vector<std::uint16_t> expected16 = layer.dx_of_bf16();
  layer.seed = 70;
  EXPECT(!same_bits(layer.results(), expected) && layer.dx_of_bf16() != expected16);
  layer.device_seed = &rest;
  EXPECT(same_bits(layer.results(), expected) && layer.dx_of_bf16() == expected16);
}

// Codes and results lie at odd addresses, and nested_blocksize is not always a power of two.
void dequantize_reaches_any_address() {
  const Layer layer;
  constexpr std::int64_t elements = Layer::N * Layer::K;
  constexpr int nested_blocksize = 100;
  const float nested[3] = {1.0f, -2.0f, 0.5f};
  qn::QuantizedWeightView view = layer.weight.view();
  view.nested_absmax = nested;
  view.nested_blocksize = nested_blocksize;
  std::vector<float> expected(elements);
  for (std::int64_t i = 0; i < elements; ++i) {
    const int code = i % 2 == 0 ? view.codes[i / 2] >> 4 : view.codes[i / 2] & 15;
    const std::int64_t block = i / view.blocksize;
    const float level = view.nested_code[layer.weight.absmax_codes[static_cast<std::size_t>(block)]];
    expected[static_cast<std::size_t>(i)] = view.code[code] * (level * nested[block / nested_blocksize] + *view.offset);
  }
  std::vector<std::uint8_t> codes(layer.weight.codes.size() + 1);
  std::copy(layer.weight.codes.begin(), layer.weight.codes.end(), codes.begin() + 1);
  std::vector<float> out(elements + 1);
  for (const int shift : {0, 1}) {
    view.codes = shift == 0 ? layer.weight.codes.data() : codes.data() + 1;
    qn::dequantize({.weight = view, .out = out.data() + shift});
    EXPECT(std::memcmp(out.data() + shift, expected.data(), elements * sizeof(float)) == 0);
  }
  view.nested_absmax = layer.weight.nested_absmax.data();
  view.nested_blocksize = 256;
  std::vector<float> aligned(elements);
  qn::dequantize({.weight = layer.weight.view(), .out = aligned.data()});
  qn::dequantize({.weight = view, .out = out.data() + 1});
  EXPECT(std::memcmp(out.data() + 1, aligned.data(), elements * sizeof(float)) == 0);
}

// A large output bypasses the caches if it has an aligned address, in memory whose pages exist already.
void large_output_has_the_bits_of_a_small_one() {
  constexpr std::int64_t N = 2053, K = 4096, elements = N * K;
  std::vector<std::uint8_t> codes(elements / 2);
  std::vector<float> absmax(elements / 64);
  std::uint32_t random = 1;
  for (auto& byte : codes) byte = static_cast<std::uint8_t>((random = random * 1664525 + 1013904223) >> 24);
  for (auto& scale : absmax) scale = static_cast<float>((random = random * 1664525 + 1013904223) >> 16);
  qn::QuantizedWeightView view;
  view.N = N;
  view.K = K;
  view.codes = codes.data();
  view.absmax = absmax.data();
  view.code = qn::codebook("nf4").data();
  for (const qn::DType dtype : {qn::DType::f32, qn::DType::bf16, qn::DType::f16}) {
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

void codebooks_and_maps_have_their_published_levels() {
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

void sixteen_bit_numbers_round_to_nearest_even() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float f = qn::f32_from_f16(half), b = qn::f32_from_bf16(half);
    EXPECT(f != f ? std::isnan(qn::f32_from_f16(qn::f16_from_f32(f))) : qn::f16_from_f32(f) == half);
    EXPECT(b != b ? std::isnan(qn::f32_from_bf16(qn::bf16_from_f32(b))) : qn::bf16_from_f32(b) == half);
    if ((half & 0x7FFF) >= 0x7BFF) continue;  // from the last finite number on there is no next one
    const float above = qn::f32_from_f16(static_cast<std::uint16_t>(half + 1)), middle = (f + above) / 2;
    EXPECT(qn::f16_from_f32(middle) == half + (half & 1));  // a tie goes to the even number
    EXPECT(qn::f16_from_f32(std::nextafterf(middle, f)) == half);
    EXPECT(qn::f16_from_f32(std::nextafterf(middle, above)) == half + 1);
  }
  EXPECT(qn::f16_from_f32(65519.996f) == 0x7BFF && qn::f16_from_f32(65520.0f) == 0x7C00);
}

void known_weights_quantize_to_known_codes() {
  // There are three elements, so that the last low nibble is the code of 0. Then come an all-zero block, and NaN and
  // Inf, which are counted.
  std::vector<float> w = {0.5f, -0.5f, 0.0f};
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
  w = {1.0f, NAN, INFINITY};
  qn::quantize(args);
  EXPECT(non_finite.count == 2 && non_finite.first == 1);

  std::int8_t bytes[3];
  w = {2.0f, -1.0f, 2.0f / 127 * 2.5f};
  args.bits = 8;
  args.codes = reinterpret_cast<std::uint8_t*>(bytes);
  qn::quantize(args);
  EXPECT(bytes[0] == 127 && bytes[1] == -64 && (bytes[2] == 2 || bytes[2] == 3));

  qn::QuantizedWeightView view{.N = 1, .K = 3, .bits = 8, .codes = args.codes, .absmax = &absmax};
  float out[3];
  qn::dequantize({.weight = view, .out = out});
  EXPECT(out[0] == 127.0f * (2.0f / 127.0f) && out[1] == -64.0f * (2.0f / 127.0f));

  // With no rows nothing is read or written.
  const Layer layer;
  qn::linear_forward({.weight = layer.weight.view(),
                      .x = {nullptr, qn::DType::bf16, 0, Layer::K, Layer::K},
                      .y = {nullptr, qn::DType::bf16, 0, Layer::N, Layer::N}});
}

// Compares the results with plain sums over the dequantized weight.
void products_match_plain_sums() {
  constexpr std::int64_t M = Layer::M, N = Layer::N, K = Layer::K, R = Layer::rank;
  const Layer layer;
  const std::vector<float> all = layer.results();
  const float* w = all.data();
  const float* y = w + N * K;
  const float* u = y + M * N;
  const float* dx = u + M * R;
  const auto kept = [](std::int64_t m, std::int64_t k) {
    return qn::dropout_keeps(77, m, k, qn::dropout_threshold(0.25f)) ? 1.0 : 0.0;
  };
  double worst = 0.0;
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t n = 0; n < N; ++n) {
      double sum = layer.bias[n];
      for (std::int64_t k = 0; k < K; ++k) sum += double{layer.x[m * K + k]} * w[n * K + k];
      for (std::int64_t r = 0; r < R; ++r) sum += 0.5 * u[m * R + r] * layer.b[n * R + r];
      worst = std::max(worst, std::fabs(sum - y[m * N + n]));
    }
    for (std::int64_t k = 0; k < K; ++k) {
      double sum = 0.0;
      for (std::int64_t n = 0; n < N; ++n) {
        sum += double{layer.dy[m * N + n]} * w[n * K + k];
        for (std::int64_t r = 0; r < R; ++r) {
          sum += kept(m, k) * (0.5 / 0.75) * layer.dy[m * N + n] * layer.b[n * R + r] * layer.a[r * K + k];
        }
      }
      worst = std::max(worst, std::fabs(sum - dx[m * K + k]));
    }
  }
  EXPECT(worst < 1e-4);  // sums of about 500 products below 1, in fp32
  if (worst >= 1e-4) std::printf("  worst error %g\n", worst);
}

void expect_error(const std::string& argument, const std::function<void()>& call) {
  try {
    call();
    std::printf("no error about %s\n", argument.c_str());
    ++failures;
  } catch (const qn::Error& error) {
    EXPECT(error.argument() == argument);
    EXPECT(std::string(error.what()).rfind(argument + ": expected ", 0) == 0);
  }
}

void errors_name_the_argument() {
  const Layer layer;
  std::vector<float> y(Layer::M * Layer::N);
  const qn::LinearForwardArgs good{.weight = layer.weight.view(),
                                   .lora = layer.lora(),
                                   .x = {layer.x.data(), qn::DType::f32, Layer::M, Layer::K, Layer::K},
                                   .y = {y.data(), qn::DType::f32, Layer::M, Layer::N, Layer::N}};
  const auto forward_with = [&](const std::function<void(qn::LinearForwardArgs&)>& change) {
    return [&good, change] {
      qn::LinearForwardArgs args = good;
      change(args);
      qn::linear_forward(args);
    };
  };
  using Args = qn::LinearForwardArgs;
  expect_error("weight.N", forward_with([](Args& args) { args.weight.N = 0; }));
  expect_error("weight.bits", forward_with([](Args& args) { args.weight.bits = 3; }));
  expect_error("weight.blocksize", forward_with([](Args& args) { args.weight.blocksize = 48; }));
  expect_error("weight.blocksize", forward_with([](Args& args) { args.weight.blocksize = 8192; }));
  expect_error("weight.codes", forward_with([](Args& args) { args.weight.codes = nullptr; }));
  expect_error("weight.code", forward_with([](Args& args) { args.weight.code = nullptr; }));
  expect_error("weight.offset", forward_with([](Args& args) { args.weight.offset = nullptr; }));
  expect_error("x", forward_with([](Args& args) { args.x.cols = Layer::K + 1; }));
  expect_error("x.stride", forward_with([](Args& args) { args.x.stride = Layer::K - 1; }));
  expect_error("x.data", forward_with([](Args& args) { args.x.data = nullptr; }));
  expect_error("y", forward_with([](Args& args) { args.y.rows = Layer::M - 1; }));
  expect_error("y.dtype", forward_with([](Args& args) { args.y.dtype = qn::DType::f16; }));
  expect_error("lora.a", forward_with([](Args& args) { args.lora.a = nullptr; }));
  expect_error("lora.scaling", forward_with([](Args& args) { args.lora.scaling = NAN; }));
  expect_error("lora.dropout", forward_with([](Args& args) { args.lora.dropout = 1.0f; }));
  expect_error("format", [] { qn::codebook("nf5"); });
  expect_error("non_finite", [&] {
    std::uint8_t code;
    float absmax;
    qn::quantize({.weight = layer.w.data(),
                  .elements = 1,
                  .code = qn::codebook("nf4").data(),
                  .codes = &code,
                  .absmax = &absmax});
  });
  for (float value : y) EXPECT(value == 0.0f);  // nothing was written
}

// check_quantized_weight() checks the contents of a weight when it is loaded.
void contents_of_weights_are_checked() {
  const Layer layer;
  qn::check_quantized_weight(layer.weight.view());
  expect_error("weight.blocksize", [&] {
    qn::QuantizedWeightView view = layer.weight.view();
    view.blocksize = 0;
    qn::check_quantized_weight(view);
  });

  // For a double-quantized weight, each table in turn holds a value that is not finite, or values that only decode to
  // one.
  const auto refused = [&](const std::string& argument,
                           const std::function<void(Quantized&, std::vector<float>&)>& change) {
    Quantized weight = layer.weight;
    std::vector<float> levels(qn::dynamic_map().begin(), qn::dynamic_map().end());
    change(weight, levels);
    qn::QuantizedWeightView view = weight.view();
    view.nested_code = levels.data();
    expect_error(argument, [&] { qn::check_quantized_weight(view); });
  };
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    refused("weight.nested_absmax", [&](Quantized& weight, auto&) { weight.nested_absmax[0] = bad; });
    refused("weight.nested_code", [&](Quantized& weight, auto& levels) {
      weight.absmax_codes.back() = 255;  // a level that no scale uses may be anything
      levels[255] = bad;
    });
    refused("weight.offset", [&](Quantized& weight, auto&) { weight.offset = bad; });
  }
  refused("weight.absmax", [&](Quantized& weight, auto& levels) {
    weight.absmax_codes.back() = 255;
    weight.nested_absmax[0] = 3e38f;
    levels[255] = 2.0f;
  });
  // The same levels are allowed if no scale uses the one that is too large.
  Quantized large = layer.weight;
  std::vector<float> levels(qn::dynamic_map().begin(), qn::dynamic_map().end());
  std::replace(large.absmax_codes.begin(), large.absmax_codes.end(), std::uint8_t{255}, std::uint8_t{254});
  levels[255] = 3e38f;
  large.offset = -1.0f;
  qn::QuantizedWeightView view = large.view();
  view.nested_code = levels.data();
  large.nested_absmax[0] = 100.0f;
  qn::check_quantized_weight(view);  // scales below 0 are allowed, because double quantization may round to them

  // fp32 scales are checked at every place, for a length that is no multiple of a vector and exceeds a chunk of the
  // check.
  std::vector<std::uint8_t> codes(5003 * 16);
  std::vector<float> scales(5003, 1.0f);
  view = {.N = 5003, .K = 32, .blocksize = 32, .codes = codes.data(), .absmax = scales.data()};
  view.code = qn::codebook("nf4").data();
  scales[7] = std::numeric_limits<float>::max();
  scales[8] = -std::numeric_limits<float>::denorm_min();
  qn::check_quantized_weight(view);
  for (const std::size_t place : {0, 17, 4095, 4096, 5002}) {
    for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
      scales[place] = bad;
      try {
        qn::check_quantized_weight(view);
        EXPECT(false);
      } catch (const qn::Error& error) {
        EXPECT(error.argument() == "weight.absmax");
        EXPECT(std::string(error.what()).ends_with(" at " + std::to_string(place)));
      }
    }
    scales[place] = 1.0f;
  }
}

// Quantizes weights with known codes and scales to MXFP4 and NVFP4, and multiplies by the results.
void microscaled_weights_are_quantized_by_their_rules() {
  const std::array<float, 16>& levels = qn::codebook("mxfp4");
  constexpr std::int64_t N = 3, K = 32;
  std::vector<float> weight(N * K), decoded(N * K), nested_absmax{1.0f}, nested_code(256), x(K, 1.0f), y(N);
  for (std::size_t e = 0; e < weight.size(); ++e) weight[e] = 0.25f * levels[e % 16];
  for (const int blocksize : {32, 16}) {
    std::vector<std::uint8_t> codes(N * K / 2), scales(static_cast<std::size_t>(N * K / blocksize));
    const float offset = 0.0f;
    qn::NonFinite non_finite;
    const qn::QuantizeMicroscaledArgs args{.weight = weight.data(),
                                           .elements = N * K,
                                           .blocksize = blocksize,
                                           .codes = codes.data(),
                                           .scales = scales.data(),
                                           .nested_code = nested_code.data(),
                                           .non_finite = &non_finite};
    qn::quantize_microscaled(args);
    EXPECT(non_finite.count == 0 && non_finite.first == -1);
    for (std::size_t i = 0; i < codes.size(); ++i) EXPECT(codes[i] == 0x01 + 0x22 * (i % 8));
    // Every block's largest element is 1.5, which is 6 times 2^-2; so the scales of NVFP4 are E4M3's largest number.
    for (const std::uint8_t scale : scales) EXPECT(scale == (blocksize == 32 ? 125 : 126));
    EXPECT(std::isnan(nested_code[255]) && std::isfinite(nested_code[126]));
    EXPECT(nested_code[0] == (blocksize == 32 ? 0x1p-127f : 0.0f));

    qn::QuantizedWeightView view{
        .N = N, .K = K, .blocksize = blocksize, .codes = codes.data(), .absmax = scales.data()};
    view.code = qn::codebook(blocksize == 32 ? "mxfp4" : "nvfp4").data();
    view.nested_absmax = nested_absmax.data();
    view.nested_code = nested_code.data();
    view.offset = &offset;
    qn::check_quantized_weight(view);
    qn::dequantize({.weight = view, .out = decoded.data()});
    for (std::size_t e = 0; e < decoded.size(); ++e) EXPECT(std::fabs(decoded[e] - weight[e]) <= 1e-6f);
    qn::LinearForwardArgs product;
    product.weight = view;
    product.x = {x.data(), qn::DType::f32, 1, K, K};
    product.y = {y.data(), qn::DType::f32, 1, N, N};
    qn::linear_forward(product);
    for (const float sum : y) EXPECT(std::fabs(sum) <= 1e-5f);  // each level cancels its negative

    scales.back() = 255;  // this byte is no scale
    expect_error("weight.nested_code", [&] { qn::check_quantized_weight(view); });
    weight[37] = NAN;
    qn::quantize_microscaled(args);
    EXPECT(non_finite.count == 1 && non_finite.first == 37);
    weight[37] = 0.25f * levels[37 % 16];
    const auto refused = [&](const char* argument, auto change) {
      qn::QuantizeMicroscaledArgs changed = args;
      change(changed);
      expect_error(argument, [&] { qn::quantize_microscaled(changed); });
    };
    refused("elements", [](auto& changed) { changed.elements = -1; });
    refused("blocksize", [](auto& changed) { changed.blocksize = 64; });
    refused("weight", [](auto& changed) { changed.weight = nullptr; });
    refused("codes", [](auto& changed) { changed.codes = nullptr; });
    refused("scales", [](auto& changed) { changed.scales = nullptr; });
    refused("nested_code", [](auto& changed) { changed.nested_code = nullptr; });
    refused("non_finite", [](auto& changed) { changed.non_finite = nullptr; });
  }
}

// Two tensors with ragged blocks, one with 8-bit and one with fp32 moments, of a single group.
struct Optimizer {
  static constexpr std::int64_t sizes[2] = {300, 70};
  std::vector<float> params[2], grads[2], absmax1 = std::vector<float>(2), absmax2 = absmax1;
  std::vector<std::uint8_t> codes1 = std::vector<std::uint8_t>(300), codes2 = codes1;
  std::vector<float> m = std::vector<float>(70), v = m;
  std::int64_t steps[2] = {0, 0}, skipped = 0;
  qn::Optimizer8bitGroup group{.lr = 0.01, .weight_decay = 0.1};
  qn::Optimizer8bitTensor tensors[2];

  Optimizer() {
    Random random;
    for (int i = 0; i < 2; ++i) {
      params[i] = random.floats(sizes[i]);
      grads[i] = random.floats(sizes[i]);
      tensors[i] = {.param = params[i].data(),
                    .grad = grads[i].data(),
                    .elements = sizes[i],
                    .state1 = i == 0 ? static_cast<void*>(codes1.data()) : m.data(),
                    .state2 = i == 0 ? static_cast<void*>(codes2.data()) : v.data(),
                    .absmax1 = i == 0 ? absmax1.data() : nullptr,
                    .absmax2 = i == 0 ? absmax2.data() : nullptr,
                    .step = &steps[i]};
    }
  }
  qn::Optimizer8bitArgs args() {
    return {.tensors = tensors, .count = 2, .groups = &group, .group_count = 1, .skipped = &skipped};
  }
};

void adamw_steps_or_skips_as_a_whole() {
  Optimizer optimizer;
  const std::vector<float> before[2] = {optimizer.params[0], optimizer.params[1]};
  qn::optimizer_8bit_step(optimizer.args());
  // The first step moves by lr against the sign of the gradient, because with bias corrections m / sqrt(v) is +-1.
  double worst = 0.0;
  for (int i = 0; i < 2; ++i) {
    EXPECT(optimizer.steps[i] == 1);
    for (std::int64_t j = 0; j < Optimizer::sizes[i]; ++j) {
      const double expected = before[i][j] * (1.0 - 0.01 * 0.1) - std::copysign(0.01, optimizer.grads[i][j]);
      worst = std::max(worst, std::fabs(optimizer.params[i][j] - expected));
    }
  }
  EXPECT(worst < 1e-6);  // values below 1, eps = 1e-8 beside gradients of 1e-3 and more
  EXPECT(optimizer.codes1.back() != 0 && optimizer.absmax1[1] > 0.0f && optimizer.absmax1[1] <= 0.1f);

  const std::vector<float> after = optimizer.params[0];
  for (float bad : {NAN, INFINITY, -INFINITY, 2e19f}) {
    optimizer.grads[1].back() = bad;
    qn::optimizer_8bit_step(optimizer.args());
  }
  optimizer.grads[1].back() = 0.5f;
  const float found_inf = 1.0f;
  qn::Optimizer8bitArgs args = optimizer.args();
  args.found_inf = &found_inf;
  qn::optimizer_8bit_step(args);
  EXPECT(optimizer.skipped == 5 && optimizer.steps[0] == 1 && same_bits(optimizer.params[0], after));

  Optimizer large;
  large.grads[1].back() = 0x1.fffffep63f;  // the largest gradient that is usable
  qn::optimizer_8bit_step(large.args());
  EXPECT(large.skipped == 0 && large.steps[0] == 1);

  // A learning rate in memory replaces the one in the group. It is read anew in each step.
  Optimizer given, read;
  float lr = 0.02f;
  given.group.lr = double{lr};
  read.group.device_lr = &lr;
  for (int i = 0; i < 2; ++i) {
    qn::optimizer_8bit_step(given.args());
    qn::optimizer_8bit_step(read.args());
    EXPECT(same_bits(given.params[0], read.params[0]) && same_bits(given.params[1], read.params[1]));
    given.group.lr = double{lr = 0.003f};
  }

  using Change = std::function<void(Optimizer&, qn::Optimizer8bitArgs&)>;
  const auto refused = [](const std::string& argument, const Change& change) {
    expect_error(argument, [&change] {
      Optimizer damaged;
      qn::Optimizer8bitArgs args = damaged.args();
      change(damaged, args);
      qn::optimizer_8bit_step(args);
    });
  };
  refused("count", [](Optimizer&, qn::Optimizer8bitArgs& args) { args.count = -1; });
  refused("tensors", [](Optimizer&, qn::Optimizer8bitArgs& args) { args.tensors = nullptr; });
  refused("groups", [](Optimizer&, qn::Optimizer8bitArgs& args) { args.groups = nullptr; });
  refused("skipped", [](Optimizer&, qn::Optimizer8bitArgs& args) { args.skipped = nullptr; });
  refused("groups[0].lr", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.lr = -1e-3; });
  refused("groups[0].lr", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.lr = NAN; });
  static constexpr float kBelow = -1e-3f;
  refused("groups[0].lr", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.device_lr = &kBelow; });
  refused("groups[0].beta1", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.beta1 = 1.0; });
  refused("groups[0].beta2", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.beta2 = -0.1; });
  refused("groups[0].eps", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.eps = INFINITY; });
  refused("groups[0].weight_decay", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.weight_decay = -1.0; });
  refused("tensors[1].group", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.tensors[1].group = 1; });
  refused("tensors[1].grad", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.tensors[1].grad = nullptr; });
  refused("tensors[0].absmax2", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.tensors[0].absmax2 = nullptr; });
  refused("tensors[0].step", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.steps[0] = -1; });
  refused("tensors[0].elements", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.tensors[0].elements = -1; });
}

// Fields that an algorithm does not have are not read, and those that it has are checked.
void algorithms_check_what_they_read() {
  const auto args_of = [](Optimizer& optimizer, qn::Algorithm algorithm) {
    qn::Optimizer8bitArgs args = optimizer.args();
    args.algorithm = algorithm;
    return args;
  };
  Optimizer lion;
  const std::vector<float> before = lion.params[1];
  lion.group = {.lr = 0.01, .weight_decay = 0.0, .beta3 = 7.0, .alpha = -1.0};
  for (qn::Optimizer8bitTensor& tensor : lion.tensors) tensor.state2 = tensor.absmax2 = nullptr;
  qn::optimizer_8bit_step(args_of(lion, qn::Algorithm::lion));
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT(lion.params[1][i] == before[i] - std::copysign(0.01f, lion.grads[1][i]));
  }

  using Change = std::function<void(Optimizer&, qn::Optimizer8bitArgs&)>;
  std::vector<std::uint8_t> codes3(300);
  std::vector<float> slow(70), absmax3(2);
  const auto refused = [&](const std::string& argument, const Change& change) {
    expect_error(argument, [&] {
      Optimizer damaged;
      damaged.tensors[0].state3 = codes3.data();
      damaged.tensors[0].absmax3 = absmax3.data();
      damaged.tensors[1].state3 = slow.data();
      qn::Optimizer8bitArgs args = args_of(damaged, qn::Algorithm::ademamix);
      change(damaged, args);
      qn::optimizer_8bit_step(args);
    });
  };
  refused("algorithm", [](Optimizer&, qn::Optimizer8bitArgs& args) { args.algorithm = static_cast<qn::Algorithm>(3); });
  refused("tensors[1].state3", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.tensors[1].state3 = nullptr; });
  refused("tensors[0].absmax3", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.tensors[0].absmax3 = nullptr; });
  refused("groups[0].beta3", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.beta3 = 1.0; });
  refused("groups[0].alpha", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.alpha = -1.0; });
  refused("groups[0].t_alpha", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.t_alpha = NAN; });
  refused("groups[0].t_beta3", [](Optimizer& o, qn::Optimizer8bitArgs&) { o.group.t_beta3 = -1.0; });
  refused("groups[0].beta1", [](Optimizer& o, qn::Optimizer8bitArgs&) {
    o.group.beta1 = 0.0;
    o.group.t_beta3 = 10.0;
  });
}

void missing_cuda_is_explained() {
  if (qn::cuda_unavailable_reason().empty()) return;
  const Layer layer;
  std::vector<float> out(Layer::N * Layer::K);
  try {
    qn::dequantize({.weight = layer.weight.view(), .out = out.data()}, {.device = qn::Device::cuda});
    EXPECT(false);
  } catch (const qn::Unavailable& error) {
    EXPECT(qn::cuda_unavailable_reason() == error.what());
  }
}

// Every element of a product lies in exactly one part and tile. No tile is larger than its buffers. No thread waits for
// another thread's last tile if that can be avoided.
void grids_cover_every_element_evenly() {
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

void blocks_fit_the_caches_of_the_machine() {
  const qn::Caches found = qn::caches();
  EXPECT(found.second >= 4 << 10 && found.last >= found.second);
  const qn::Caches small{.second = 256 << 10, .last = 6 << 20};
  const qn::Caches large{.second = 2 << 20, .last = 256 << 20};
  EXPECT(qn::scaled_to_l2(32, 1, small) == 8 && qn::scaled_to_l2(2, 1, small) == 1);
  EXPECT(qn::scaled_to_l2(32, 1, large) == 32);
  EXPECT(qn::stream_bytes(small) == 3 << 20 && qn::stream_bytes(large) == 16 << 20);
}

void activations_are_packed_in_equal_blocks() {
  for (std::int64_t rows : {1, 47, 48, 1000, 5000})
    for (std::int64_t bytes : {4, 8192, 1 << 24}) {
      const std::int64_t block = qn::rows_per_block(rows, bytes, 48);
      EXPECT(block >= 48 && block % 48 == 0);
      EXPECT(block == 48 || block * bytes <= qn::kPackedBytes);
      EXPECT(block == 48 || block < rows + 48);
    }
}

void same_bits_for_any_number_of_threads() {
  const Layer layer;
  use_pool(1);
  const std::vector<float> one = layer.results();
  for (int threads : {2, 3}) {
    use_pool(threads);
    EXPECT(qn::num_threads() == threads);
    EXPECT(same_bits(layer.results(), one));
  }
}

void same_bits_for_concurrent_callers() {
  const Layer layer;
  const std::vector<float> alone = layer.results();
  std::vector<std::vector<float>> results(3);
  std::vector<std::thread> callers;
  for (auto& result : results) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 5; ++repeat) result = layer.results();
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& result : results) EXPECT(same_bits(result, alone));
}

// This runs in a process of its own, because the instruction set is chosen only once.
int with_forced_isa() {
  const std::string isa = std::getenv("QLN_FORCE_ISA");
  try {
    return qn::current_isa() == isa ? 0 : 1;
  } catch (const qn::Unavailable& error) {
    const bool names_both = std::string(error.what()).find(isa) != std::string::npos &&
                            std::string(error.what()).find("scalar") != std::string::npos;
    return names_both ? 2 : 1;
  }
}

void forced_isas(const char* program) {
  const auto forced = [&](const std::string& isa) {
    const int status = std::system(("QLN_FORCE_ISA=" + isa + " " + program + " --forced-isa").c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  for (const std::string& isa : qn::available_isas()) EXPECT(forced(isa) == 0);
  EXPECT(forced("no_such_isa") == 2);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) return with_forced_isa();
  if (!isa_is_here()) return kSkipped;
  codebooks_and_maps_have_their_published_levels();
  sixteen_bit_numbers_round_to_nearest_even();
  known_weights_quantize_to_known_codes();
  products_match_plain_sums();
  errors_name_the_argument();
  contents_of_weights_are_checked();
  microscaled_weights_are_quantized_by_their_rules();
  grids_cover_every_element_evenly();
  activations_are_packed_in_equal_blocks();
  blocks_fit_the_caches_of_the_machine();
  seed_in_memory_gives_the_mask_of_the_number();
  dequantize_reaches_any_address();
  if (std::getenv("QLN_BACKEND") == nullptr) large_output_has_the_bits_of_a_small_one();  // only on the cpu
  adamw_steps_or_skips_as_a_whole();
  algorithms_check_what_they_read();
  missing_cuda_is_explained();
  same_bits_for_concurrent_callers();
  same_bits_for_any_number_of_threads();
  same_bits_for_concurrent_callers();
  // This is left out under an emulator, where a program cannot start itself by its own name.
  if (std::getenv("QLN_TEST_EMULATED") == nullptr) forced_isas(arguments[0]);
  return report();
}
