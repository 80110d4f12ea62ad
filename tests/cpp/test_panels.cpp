// Guards products by panels, on the emulator and with hooks of this program: the order in which panels are decoded
// beside the products, the operands of the dense products, and the memory of a call. Exits 1 on a failure.
#include "qlora_native/qlora_native.h"
#include "runtime/side_stream.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/layout.h"
#include "emulator/emulated_driver.h"
#include "expect.h"
#include "product/config.h"
#include "quantized.h"

namespace qn = qlora_native;
using qn::cuda_emulated::EmulatedDriver;

namespace {

// ---- the order of the calls ----

// The calls of the driver, with the times at which panels are prepared and used.
std::vector<std::string> calls_of(std::int64_t count) {
  std::vector<std::string> calls;
  EmulatedDriver::Options options;
  qn::SideStream side(std::make_unique<EmulatedDriver>(&options));
  options.trace = [&](const std::string& call) { calls.push_back(call); };
  side.overlap(
      count, nullptr,
      [&](std::int64_t i, void* stream) {
        calls.push_back((stream == nullptr ? "caller: prepare " : "stream 0: prepare ") + std::to_string(i));
      },
      [&](std::int64_t i) { calls.push_back("caller: use " + std::to_string(i)); });
  return calls;
}

TEST(next_panel_is_prepared_once_its_place_is_free_and_before_its_use) {
  using Calls = std::vector<std::string>;
  EXPECT(calls_of(0).empty());
  EXPECT((calls_of(1) == Calls{"caller: prepare 0", "caller: use 0"}));
  // Event 0 says that the panel before has been used, event 1 that the next one is prepared.
  EXPECT((calls_of(3) == Calls{"caller: prepare 0", "caller: record event 0", "caller: use 0",
                               "stream 0: wait for event 0", "stream 0: prepare 1", "stream 0: record event 1",
                               "caller: wait for event 1", "caller: record event 0", "caller: use 1",
                               "stream 0: wait for event 0", "stream 0: prepare 2", "stream 0: record event 1",
                               "caller: wait for event 1", "caller: use 2"}));
}

// Work in the side stream runs as late as possible, or at once.
TEST(everything_is_there_before_it_is_used) {
  constexpr auto kKind = qn::Driver::Memory::pinned;  // so that the test may read it
  for (const bool eager : {false, true}) {
    EmulatedDriver::Options options{.eager = eager};
    auto driver = std::make_unique<EmulatedDriver>(&options);
    EmulatedDriver& device = *driver;
    qn::SideStream side(std::move(driver));
    auto* const source = static_cast<int*>(device.allocate(kKind, 5 * sizeof(int)));
    auto* const places = static_cast<int*>(device.allocate(kKind, 2 * sizeof(int)));
    for (int i = 0; i < 5; ++i) source[i] = i;
    std::vector<int> used;
    const auto copy = [&](std::int64_t i, void* stream) {
      device.copy(&places[i % 2], &source[i], sizeof(int), stream);
    };
    side.overlap(5, nullptr, copy, [&](std::int64_t i) { used.push_back(places[i % 2]); });
    EXPECT((used == std::vector<int>{0, 1, 2, 3, 4}));
    // An exception leaves no work behind that would disturb the next call.
    used.clear();
    try {
      side.overlap(5, nullptr, copy, [](std::int64_t i) {
        if (i == 2) throw 1;
      });
      EXPECT(false);
    } catch (int) {
      places[0] = places[1] = -1;
    }
    side.overlap(2, nullptr, copy, [&](std::int64_t i) { used.push_back(places[i % 2]); });
    EXPECT((used == std::vector<int>{0, 1}));
    device.release(kKind, places);
    device.release(kKind, source);
  }
}

TEST(each_stream_has_one_of_its_own_beside_it) {
  int first = 0, second = 0;
  const auto beside = [](void* stream) { return &qn::SideStream::of({.handle = stream}); };
  EXPECT(beside(&first) != beside(&second) && beside(&first) == beside(&first));
}

// ---- a layer in fp32, and what its panels should hold ----

float draw(std::uint64_t& seed) {  // in [-1, 1)
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<float>(static_cast<std::int32_t>(seed >> 32)) * 0x1p-31f;
}

struct Layer {
  std::int64_t M, N, K, rank;
  std::uint64_t seed = 1;
  std::vector<float> w, x, dy, bias, a, b;
  Quantized weight;

  Layer(std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t rank, const char* format = "nf4")
      : M(M),
        N(N),
        K(K),
        rank(rank),
        w(floats(N * K)),
        x(floats(M * K)),
        dy(floats(M * N)),
        bias(floats(N)),
        a(floats(rank * K)),
        b(floats(N * rank)),
        weight({w.data(), qn::DType::f32, N, K, K}, format_named(format), /*blocksize=*/32, /*double_quant=*/false) {
    qn::dequantize({.weight = weight.view(), .out = w.data()});
  }
  std::vector<float> floats(std::int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = draw(seed);
    return values;
  }
  qn::LoraView lora(float dropout = 0.0f) const {
    return {.rank = rank, .a = a.data(), .b = b.data(), .scaling = 0.5f, .dropout = dropout};
  }
};

template <class Data>
auto matrix_of(Data& data, std::int64_t rows, std::int64_t cols) {
  using Matrix = std::conditional_t<std::is_const_v<Data>, qn::ConstMatrix, qn::Matrix>;
  return Matrix{data.data(), qn::DType::f32, rows, cols, cols};
}

float at(const qn::ConstMatrix& matrix, std::int64_t i, std::int64_t j) {
  return static_cast<const float*>(matrix.data)[i * matrix.stride + j];
}
bool same_bits(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

// The product under test. It is a global variable, because hooks are plain functions.
struct Call {
  const Layer* layer = nullptr;
  bool backward = false;
  std::vector<float> out, low_rank;
  std::vector<float> multiplied;  // the part of U or V beside the left operand
  std::vector<int> times;         // how often each element of out was computed
  int products = 0;
  const float* first_out = nullptr;  // out of the first product
  const void* panel = nullptr;       // the panel of the last product
  bool multiplies = true;
  std::size_t bytes = 0;  // the size of the largest allocation
  int held = 0;           // allocations that were not given back
};
Call call;

// Computes left . right + bias by a plain loop, and checks the operands.
void dense_gemm(const qn::DenseGemmArgs& args, const qn::Stream&) {
  const Layer& layer = *call.layer;
  ++call.products;
  EXPECT(args.w.data != call.panel);  // because a device decodes the next panel while this one is multiplied
  call.panel = args.w.data;
  const std::int64_t weight_inner = call.backward ? layer.N : layer.K, rank = layer.rank;
  const std::int64_t out_cols = call.backward ? layer.K : layer.N;
  if (call.products == 1) call.first_out = static_cast<const float*>(args.out.data);  // an address on the device
  const std::int64_t offset = static_cast<const float*>(args.out.data) - call.first_out;
  const std::int64_t row0 = offset / out_cols, col0 = offset % out_cols, inner = args.x.cols;
  EXPECT(args.transpose_w == !call.backward && args.out.stride == out_cols && !args.accumulate);
  EXPECT(args.x.rows == args.out.rows && (call.backward ? args.w.rows : args.w.cols) == inner);
  EXPECT((call.backward ? args.w.cols : args.w.rows) == args.out.cols && args.w.stride % 8 == 0);
  EXPECT(rank == 0 ? inner == weight_inner : inner % 8 == 0 && inner - weight_inner - rank < 8);

  int wrong = 0;
  const std::vector<float>& source = call.backward ? layer.dy : layer.x;
  for (std::int64_t i = 0; i < args.x.rows; ++i) {
    for (std::int64_t k = 0; k < inner; ++k) {
      const float value = at(args.x, i, k);
      if (k >= weight_inner && k < weight_inner + rank) {
        call.multiplied[(row0 + i) * rank + k - weight_inner] = value;
        continue;
      }
      const float expected = k < weight_inner ? source[(row0 + i) * weight_inner + k] : 0.0f;
      wrong += !same_bits(value, expected);
    }
  }
  const auto right = [&](std::int64_t k, std::int64_t j) {
    return call.backward ? at(args.w, k, j) : at(args.w, j, k);
  };
  for (std::int64_t j = 0; j < args.out.cols; ++j) {
    for (std::int64_t k = 0; k < inner; ++k) {
      const std::int64_t r = k - weight_inner, col = col0 + j;
      const auto element = [&](std::int64_t i) { return static_cast<std::size_t>(i); };
      float expected = 0.0f;
      if (r < 0) {
        expected = layer.w[element(call.backward ? k * layer.K + col : col * layer.K + k)];
      } else if (r < rank) {
        expected = call.backward ? layer.a[element(r * layer.K + col)] : 0.5f * layer.b[element(col * rank + r)];
      }
      wrong += !same_bits(right(k, j), expected);
    }
  }
  EXPECT(wrong == 0);

  for (std::int64_t i = 0; i < args.out.rows; ++i) {
    for (std::int64_t j = 0; j < args.out.cols; ++j) {
      const std::int64_t place = i * args.out.stride + j;
      ++call.times[offset + place];
      if (!call.multiplies) continue;
      double sum = args.bias == nullptr ? 0.0 : static_cast<const float*>(args.bias)[j];
      for (std::int64_t k = 0; k < inner; ++k) sum += double{at(args.x, i, k)} * right(k, j);
      static_cast<float*>(args.out.data)[place] = static_cast<float>(sum);
    }
  }
}

qn::DeviceMemory allocate(std::size_t bytes, const qn::Stream&) {
  call.bytes = std::max(call.bytes, bytes);
  ++call.held;
  void* const data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  return {.data = data, .handle = data};
}
void release(const qn::DeviceMemory& memory, const qn::Stream&) {
  --call.held;
  std::free(memory.handle);
}

void run(const Layer& layer, bool backward, bool multiplies, float dropout = 0.0f) {
  const std::int64_t cols = backward ? layer.K : layer.N;
  call = {.layer = &layer, .backward = backward, .multiplies = multiplies};
  call.out.resize(layer.M * cols);
  call.times.resize(call.out.size());
  call.low_rank.resize(layer.M * layer.rank);
  call.multiplied.resize(call.low_rank.size());
  const qn::Matrix out = matrix_of(call.out, layer.M, cols);
  const qn::Matrix low_rank = layer.rank > 0 ? matrix_of(call.low_rank, layer.M, layer.rank) : qn::Matrix{};
  if (backward) {
    qn::linear_backward_input({.weight = layer.weight.view(),
                               .lora = layer.lora(dropout),
                               .dy = matrix_of(layer.dy, layer.M, layer.N),
                               .dx = out,
                               .v = low_rank});
  } else {
    qn::linear_forward({.weight = layer.weight.view(),
                        .lora = layer.lora(dropout),
                        .x = matrix_of(layer.x, layer.M, layer.K),
                        .bias = layer.bias.data(),
                        .y = out,
                        .u = low_rank});
  }
  if (call.products > 0)
    EXPECT(std::equal(call.multiplied.begin(), call.multiplied.end(), call.low_rank.begin(), same_bits));
}

// ---- products ----

TEST(product_by_panels_is_the_product) {
  for (const std::int64_t rank : {0, 5}) {
    const Layer layer(801, 57, 131, rank);
    for (const bool backward : {false, true}) {
      run(layer, backward, true);
      EXPECT(call.products == 1);
      EXPECT(std::all_of(call.times.begin(), call.times.end(), [](int n) { return n == 1; }));
      const std::vector<float> by_panels = call.out;
      qn::set_dense_gemm(nullptr);
      run(layer, backward, true);
      qn::set_dense_gemm(dense_gemm);
      EXPECT(call.products == 0);  // the library's own kernel has computed it
      // The sums have up to 136 products of numbers below 1, so each of 136 roundings is at most 2^-24 of 136.
      double worst = 0.0;
      for (std::size_t i = 0; i < by_panels.size(); ++i)
        worst = std::max(worst, std::abs(double{by_panels[i]} - call.out[i]));
      EXPECT(worst < 136 * 0x1p-24 * 136);
    }
  }
}

// The shapes have many panels, or rows that are copied in two parts.
TEST(each_panel_has_the_bits_of_dequantize) {
  struct Case {
    std::int64_t M, N, K, rank;
    const char* format;
    bool backward;
    int products;
  };
  const Case cases[] = {
      {.M = 1025, .N = 300, .K = 16'384, .rank = 0, .format = "nf4", .backward = false, .products = 3},
      {.M = 1025, .N = 131, .K = 16'301, .rank = 3, .format = "int8", .backward = false, .products = 2},
      {.M = 1025, .N = 16'301, .K = 264, .rank = 3, .format = "nf4", .backward = true, .products = 3},
      {.M = 8193, .N = 57, .K = 24, .rank = 16, .format = "nf4", .backward = false, .products = 2},
      {.M = 8193, .N = 24, .K = 57, .rank = 16, .format = "int8", .backward = true, .products = 2},
      {.M = 8193, .N = 57, .K = 24, .rank = 0, .format = "nf4", .backward = false, .products = 1},
  };
  for (const Case& c : cases) {
    const Layer layer(c.M, c.N, c.K, c.rank, c.format);
    run(layer, c.backward, false);
    EXPECT(call.products == c.products);
    EXPECT(std::all_of(call.times.begin(), call.times.end(), [](int n) { return n == 1; }));
    // docs/how-it-works.md says that a call takes at most this much memory.
    const std::int64_t inner = (c.backward ? c.N : c.K) + c.rank;
    const std::int64_t copied = c.rank > 0 ? std::min<std::int64_t>(c.M, 8192) * (inner + 7) * 4 : 0;
    EXPECT(call.bytes > 0 && static_cast<std::int64_t>(call.bytes) <= 2 * qn::kMaxPanelBytes + copied);
    EXPECT(call.held == 0);
  }
}

TEST(gradient_with_dropout_takes_another_kernel) {
  const Layer layer(800, 64, 64, 4);
  run(layer, /*backward=*/true, true, 0.25f);
  EXPECT(call.products == 0);  // in a dense product the mask would apply to dY . W too
  run(layer, /*backward=*/false, true, 0.25f);
  EXPECT(call.products == 1);
}

TEST(failed_product_gives_its_memory_back) {
  const Layer layer(769, 300, 16'384, 0);
  qn::set_dense_gemm([](const qn::DenseGemmArgs&, const qn::Stream&) { throw qn::Unavailable("no product"); });
  try {
    run(layer, false, false);
    EXPECT(false);
  } catch (const qn::Unavailable& error) {
    EXPECT(std::string(error.what()) == "no product");
  }
  qn::set_dense_gemm(dense_gemm);
  EXPECT(call.bytes > 0 && call.held == 0);
}

// All kernels get their memory from the application. It begins as NaN, as the emulator's own memory does.
TEST(memory_of_a_call_comes_from_the_host_program) {
  const Layer layer(70, 64, 300, 4);
  run(layer, false, true);
  const std::vector<float> with_hook = call.out;
  EXPECT(call.bytes > 0 && call.held == 0);
  qn::set_device_memory(nullptr, nullptr);
  run(layer, false, true);
  EXPECT(call.bytes == 0 && call.out == with_hook);
  qn::set_device_memory(allocate, release);
}

}  // namespace

int main() {
  qn::set_dense_gemm(dense_gemm);
  qn::set_device_memory(allocate, release);
  return run_tests();
}
