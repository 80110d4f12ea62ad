// Guards products by panels, on the emulator and with hooks of this program: the order in which panels are decoded
// beside the products, the operands of the dense products, and the memory of a call.
#include "runtime/side_stream.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "emulator/emulated_driver.h"
#include "layer.h"
#include "product/config.h"
#include "qlora_native/qlora_native.h"

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

TEST(each_stream_has_a_side_stream) {
  int first = 0, second = 0;
  const auto beside = [](void* stream) { return &qn::SideStream::of({.handle = stream}); };
  EXPECT(beside(&first) != beside(&second) && beside(&first) == beside(&first));
}

TEST(stream_of_each_thread_has_a_side_stream_in_each) {
  const auto beside = [] {
    return &qn::SideStream::of({.handle = reinterpret_cast<void*>(2)});  // cudaStreamPerThread
  };
  const qn::SideStream* in_another_thread = nullptr;
  std::thread([&] { in_another_thread = beside(); }).join();
  EXPECT(beside() == beside() && beside() != in_another_thread);
}

// ---- what panels should hold ----

float at(const qn::ConstMatrix& matrix, std::int64_t i, std::int64_t j) {
  return static_cast<const float*>(matrix.data)[i * matrix.stride + j];
}
bool same_bits(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

// The product under test. It is a global variable, because hooks are plain functions.
struct Call {
  Layer* layer = nullptr;  // in fp32
  bool backward = false;
  std::vector<float> w;           // the decoded weight
  std::vector<float> multiplied;  // the part of U or V beside X or dY
  std::vector<int> times;         // how often each element of the result was computed
  int products = 0;
  const float* first_out = nullptr;  // out of the first product
  const void* panel = nullptr;       // the panel of the last product
  std::size_t bytes = 0;             // the size of the largest allocation
  int held = 0;                      // allocations that were not given back
};
Call call;

// Checks the operands of x . w + bias, and counts the elements that it would compute.
void dense_gemm(const qn::DenseGemmArgs& args, const qn::Stream&) {
  const Layer& layer = *call.layer;
  const std::int64_t N = layer.c.N, K = layer.c.K, rank = layer.c.rank;
  const std::int64_t weight_inner = call.backward ? N : K, out_cols = call.backward ? K : N, inner = args.x.cols;
  ++call.products;
  EXPECT(args.w.data != call.panel);  // because a device decodes the next panel while this one is multiplied
  call.panel = args.w.data;
  if (call.products == 1) call.first_out = static_cast<const float*>(args.out.data);  // an address on the device
  const std::int64_t offset = static_cast<const float*>(args.out.data) - call.first_out;
  const std::int64_t row0 = offset / out_cols, col0 = offset % out_cols;
  EXPECT(args.transpose_w == !call.backward && args.out.stride == out_cols && !args.accumulate);
  EXPECT(args.x.rows == args.out.rows && (call.backward ? args.w.rows : args.w.cols) == inner);
  EXPECT((call.backward ? args.w.cols : args.w.rows) == args.out.cols && args.w.stride % 8 == 0);
  EXPECT(rank == 0 ? inner == weight_inner : inner % 8 == 0 && inner - weight_inner - rank < 8);

  int wrong = 0;
  const Tensor& source = call.backward ? layer.dy : layer.x;
  for (std::int64_t i = 0; i < args.x.rows; ++i)
    for (std::int64_t k = 0; k < inner; ++k) {
      const float value = at(args.x, i, k);
      if (k >= weight_inner && k < weight_inner + rank) {
        call.multiplied[(row0 + i) * rank + k - weight_inner] = value;
      } else {
        wrong += !same_bits(value, k < weight_inner ? source.at(row0 + i, k) : 0.0f);
      }
    }
  const auto panel = [&](std::int64_t k, std::int64_t j) {
    return call.backward ? at(args.w, k, j) : at(args.w, j, k);
  };
  EXPECT((args.bias == nullptr) == call.backward);
  for (std::int64_t j = 0; j < args.out.cols; ++j) {
    const std::int64_t col = col0 + j;
    wrong += args.bias != nullptr && static_cast<const float*>(args.bias)[j] != layer.bias.at(0, col);
    for (std::int64_t k = 0; k < inner; ++k) {
      const std::int64_t r = k - weight_inner;
      float expected = 0.0f;
      if (r < 0) {
        expected = call.w[call.backward ? k * K + col : col * K + k];
      } else if (r < rank) {
        expected = call.backward ? layer.a.at(r, col) : Layer::kScaling * layer.b.at(col, r);
      }
      wrong += !same_bits(panel(k, j), expected);
    }
  }
  EXPECT(wrong == 0);

  for (std::int64_t i = 0; i < args.out.rows; ++i)
    for (std::int64_t j = 0; j < args.out.cols; ++j) ++call.times[offset + i * args.out.stride + j];
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

Case in_fp32(std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t rank, const char* format = "nf4") {
  return {.M = M,
          .N = N,
          .K = K,
          .dtype = DType::f32,
          .format = format,
          .blocksize = 32,
          .double_quant = false,
          .bias = true,
          .rank = rank};
}

// Returns the bytes of the result.
std::vector<char> run(Layer& layer, bool backward) {
  const Case& c = layer.c;
  call = {.layer = &layer, .backward = backward};
  call.w.resize(c.N * c.K);
  qn::set_device_memory(nullptr, nullptr);
  qn::dequantize({.weight = layer.weight.view(), .out = call.w.data()});
  qn::set_device_memory(allocate, release);
  call.times.resize(c.M * (backward ? c.K : c.N));
  call.multiplied.resize(c.M * c.rank);
  backward ? layer.backward() : layer.forward();
  const std::vector<double> low_rank = (backward ? layer.v : layer.u).values();
  if (call.products > 0) EXPECT(std::equal(call.multiplied.begin(), call.multiplied.end(), low_rank.begin()));
  return (backward ? layer.dx : layer.y).bytes();
}
bool each_element_was_computed_once() {
  return std::all_of(call.times.begin(), call.times.end(), [](int n) { return n == 1; });
}

// ---- products ----

// The shapes have many panels, or rows that are copied in two parts, or zeros beside or below the adapter's part.
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
      {.M = 801, .N = 57, .K = 131, .rank = 5, .format = "nf4", .backward = false, .products = 1},
      {.M = 801, .N = 57, .K = 131, .rank = 5, .format = "nf4", .backward = true, .products = 1},
  };
  for (const Case& c : cases) {
    Layer layer(in_fp32(c.M, c.N, c.K, c.rank, c.format));
    run(layer, c.backward);
    EXPECT(call.products == c.products && each_element_was_computed_once());
    // docs/how-it-works.md says that a call takes at most this much memory.
    const std::int64_t inner = (c.backward ? c.N : c.K) + c.rank;
    const std::int64_t copied = c.rank > 0 ? std::min<std::int64_t>(c.M, 8192) * (inner + 7) * 4 : 0;
    EXPECT(call.bytes > 0 && static_cast<std::int64_t>(call.bytes) <= 2 * qn::kMaxPanelBytes + copied);
    EXPECT(call.held == 0);
  }
}

TEST(gradient_with_dropout_takes_another_kernel) {
  Layer layer(in_fp32(800, 64, 64, 4));
  layer.c.dropout = 0.25f;
  run(layer, /*backward=*/true);
  EXPECT(call.products == 0);  // in a dense product the mask would apply to dY . W too
  run(layer, /*backward=*/false);
  EXPECT(call.products == 1);
}

TEST(failed_product_gives_its_memory_back) {
  Layer layer(in_fp32(769, 300, 16'384, 0));
  qn::set_dense_gemm([](const qn::DenseGemmArgs&, const qn::Stream&) { throw qn::Unavailable("no product"); });
  try {
    run(layer, false);
    EXPECT(false);
  } catch (const qn::Unavailable& error) {
    EXPECT(std::string(error.what()) == "no product");
  }
  qn::set_dense_gemm(dense_gemm);
  EXPECT(call.bytes > 0 && call.held == 0);
}

// All kernels get their memory from the application. It begins as NaN, as the emulator's own memory does.
TEST(memory_of_a_call_is_that_of_the_application) {
  Layer layer(in_fp32(70, 64, 300, 4));
  const std::vector<char> with_hook = run(layer, false);
  EXPECT(call.bytes > 0 && call.held == 0);
  qn::set_device_memory(nullptr, nullptr);
  call.bytes = 0;
  layer.forward();
  EXPECT(call.bytes == 0 && layer.y.bytes() == with_hook);
  qn::set_device_memory(allocate, release);
}

}  // namespace

int main() {
  qn::set_dense_gemm(dense_gemm);
  qn::set_device_memory(allocate, release);
  return run_tests();
}
