// Guards the CUDA kernels whose blocks depend on each other, on the emulator with concurrent blocks
// (cuda/emulator/fibers.h). Several blocks make partial sums of a tile (stream-K), and a kernel passes a workspace to
// the next: the results have the same bits as when one block runs after the other. To be run with
// QLN_BACKEND=cuda_emulated; exits 1 on a failure.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "backend.h"
#include "common/codebook.h"
#include "common/layout.h"
#include "expect.h"
#include "product/config.h"
#include "qlora_native/qlora_native.h"
#include "quantized.h"
#include "tensor.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

void append(Bytes& all, const void* data, std::size_t bytes) {
  const auto* const begin = static_cast<const std::uint8_t*>(data);
  all.insert(all.end(), begin, begin + bytes);
}

void append(Bytes& all, const Tensor& tensor) { append(all, tensor.bytes().data(), tensor.bytes().size()); }

// Whether `run` gives the same result under each order.
template <class Name>
bool has_the_same_bits(const std::function<Bytes()>& run, const Name& name) {
  bool same = true;
  Bytes expected;
  for (const char* schedule : {"forward", "reverse", "random:1", "concurrent:1", "concurrent:2", "concurrent:3"}) {
    setenv("QLN_SCHEDULE", schedule, 1);
    const Bytes found = run();
    if (expected.empty()) expected = found;
    if (found != expected) std::printf("%s has other bits under %s\n", name().c_str(), schedule);
    same &= found == expected;
  }
  unsetenv("QLN_SCHEDULE");
  return same;
}

// ---- products ----

struct Case {
  std::int64_t M, N, K;
  DType dtype;
  std::int64_t rank;
  std::int64_t groups = 0;     // groups of rows, each with its own adapter
  bool group_weights = false;  // whether each group also has its own weight

  std::int64_t weights() const { return group_weights ? groups : 1; }
  std::int64_t adapters() const { return groups > 0 ? groups : 1; }
  // Each group is larger than the one before.
  std::vector<std::int64_t> offsets() const {
    std::vector<std::int64_t> all;
    for (std::int64_t g = 0; g <= groups; ++g) all.push_back(g * g * M / (groups * groups));
    return all;
  }
};
constexpr float kDropout = 0.25f;

// All results of a layer, including its quantized weight.
Bytes results(const Case& c) {
  const std::int64_t M = c.M, N = c.N, K = c.K, rank = c.rank;
  const DType dtype = c.dtype;
  const std::vector<std::int64_t> offsets = c.groups > 0 ? c.offsets() : std::vector<std::int64_t>();
  Random random(1);
  Tensor weight(DType::f32, c.weights() * N, K), x(dtype, M, K), dy(dtype, M, N), bias(dtype, c.weights(), N),
      a(DType::f32, c.adapters() * rank, K), b(DType::f32, c.adapters() * N, rank);
  for (Tensor* tensor : {&weight, &x, &dy, &bias, &a, &b}) tensor->fill(random, 1.0f);

  const Quantized quantized(weight.in(), format_named("nf4"), /*blocksize=*/64, /*double_quant=*/true, c.weights());
  const qn::QuantizedWeightView view = quantized.view();
  const qn::LoraView lora{.rank = rank,
                          .count = c.adapters(),
                          .a = a.data(),
                          .b = b.data(),
                          .scaling = 0.5f,
                          .dropout = kDropout,
                          .seed = 77};
  const qn::RowGroups groups{.count = c.groups, .offsets = offsets.data()};
  Tensor y(dtype, M, N), u(dtype, M, rank), dx(dtype, M, K), v(dtype, M, rank), da(DType::f32, c.adapters() * rank, K),
      db(DType::f32, c.adapters() * N, rank);
  // U and V lie first in a workspace of the call, then in the caller's memory.
  qn::linear_forward({.weight = view, .lora = lora, .groups = groups, .x = x.in(), .bias = bias.data(), .y = y.out()});
  qn::linear_backward_input({.weight = view, .lora = lora, .groups = groups, .dy = dy.in(), .dx = dx.out()});
  Bytes all;
  append(all, y);
  append(all, dx);
  qn::linear_forward(
      {.weight = view, .lora = lora, .groups = groups, .x = x.in(), .bias = bias.data(), .y = y.out(), .u = u.out()});
  qn::linear_backward_input(
      {.weight = view, .lora = lora, .groups = groups, .dy = dy.in(), .dx = dx.out(), .v = v.out()});
  qn::lora_gradients({.lora = lora,
                      .groups = groups,
                      .x = x.in(),
                      .dy = dy.in(),
                      .u = u.in(),
                      .v = v.in(),
                      .da = da.data(),
                      .db = db.data()});
  for (const auto* codes : {&quantized.codes, &quantized.absmax_codes}) append(all, codes->data(), codes->size());
  append(all, quantized.nested_absmax.data(), quantized.nested_absmax.size() * sizeof(float));
  append(all, &quantized.offset, sizeof(float));
  for (const Tensor* tensor : {&y, &u, &dx, &v, &da, &db}) append(all, *tensor);
  return all;
}

// The cases are: M = 4; tiles of 16, 64, 128 and 256 rows, with whole vectors and without; two tiles, and more tiles
// than blocks, of 16 rows and of 128; and fp32, whose kernels have no tiles. U, V, dA and dB are long sums, which are
// split-K products. The same follows for rows in groups that have each a weight and an adapter, or only an adapter.
constexpr Case kCases[] = {
    {4, 200, 704, DType::bf16, 16},
    {12, 200, 704, DType::bf16, 70},
    {12, 1250, 256, DType::bf16, 5},
    {40, 130, 333, DType::f16, 5},
    {100, 130, 704, DType::f16, 16},
    {100, 1250, 256, DType::bf16, 5},
    {200, 130, 448, DType::bf16, 16},
    {40, 130, 960, DType::f32, 5},
    {12, 200, 704, DType::bf16, 5, 5, true},
    {60, 200, 704, DType::bf16, 16, 5, true},
    {90, 200, 704, DType::f16, 16, 3, true},
    {400, 136, 448, DType::bf16, 16, 3, true},
    {200, 136, 448, DType::bf16, 70, 3, false},
    {30, 200, 704, DType::bf16, 16, 9, false},
    {40, 130, 960, DType::f32, 5, 3, true},
};

void products_have_the_same_bits() {
  for (const Case& each : kCases) {
    const auto name = [&each] {
      return "M=" + std::to_string(each.M) + " N=" + std::to_string(each.N) + " K=" + std::to_string(each.K) + " " +
             qn::name_of(each.dtype) + " groups=" + std::to_string(each.groups);
    };
    EXPECT(has_the_same_bits([&each] { return results(each); }, name));
  }
}

// Otherwise the cases would not test the flags.
void several_blocks_compute_a_tile() {
  for (const Case& each : kCases) {
    if (each.dtype == DType::f32 || each.M / each.weights() <= qn::kGemvRows) continue;
    qn::ProductShape shape{.rows = each.M,
                           .cols = each.N,
                           .inner = each.K,
                           .dtype = each.dtype,
                           .bits = 4,
                           .groups = each.groups,
                           .group_weights = each.group_weights};
    shape.aligned = shape.aligned_64 = each.K % 32 == 0;
    shape.num_sms = 3;  // the emulated device has 3
    shape.smem_bytes = 227 * 1024;
    shape.reserved_smem_bytes = 1024;
    const auto config = std::get<qn::GemmConfig>(qn::choose_product(shape));
    // The row tiles that the blocks will find.
    std::int64_t row_tiles = config.row_tiles;
    if (each.group_weights) {
      const std::vector<std::int64_t> offsets = each.offsets();
      row_tiles = 0;
      for (std::size_t g = 0; g + 1 < offsets.size(); ++g)
        row_tiles += qn::ceil_div(offsets[g + 1] - offsets[g], config.tile_rows);
    }
    EXPECT(config.with_row_tiles(row_tiles).splits_a_tile());
  }
}

// ---- the optimizer ----

// The results of two steps and a skipped one, for tensors of several kinds with their states.
Bytes optimizer_results(qn::Algorithm algorithm) {
  constexpr std::int64_t kInBf16 = 300;
  const std::array<std::int64_t, 5> sizes = {1, 256, kInBf16, 5000, 20'000};
  std::vector<Tensor> tensors;  // for each size: the parameter, its gradient, three of codes, three of absmax
  std::vector<std::int64_t> steps(sizes.size());
  std::vector<qn::Optimizer8bitTensor> views;
  Random random(1);
  for (const std::int64_t elements : sizes) {
    const DType dtype = elements == kInBf16 ? DType::bf16 : DType::f32;
    for (int i = 0; i < 2; ++i) tensors.push_back(Tensor(dtype, 1, elements).fill(random, 1.0f));
    for (int i = 0; i < 3; ++i) {
      tensors.emplace_back(DType::f16, 1, (elements + 1) / 2);
      std::memset(tensors.back().data(), i == 1 ? 0 : 127, static_cast<std::size_t>(elements));
    }
    for (int i = 0; i < 3; ++i) {
      tensors.emplace_back(DType::f32, 1, (elements + 255) / 256);
      std::memset(tensors.back().data(), 0, tensors.back().bytes().size());
    }
  }
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    Tensor* const its = &tensors[8 * i];
    views.push_back({.param = its[0].data(),
                     .grad = its[1].data(),
                     .param_dtype = its[0].in().dtype,
                     .grad_dtype = its[1].in().dtype,
                     .elements = sizes[i],
                     .state1 = its[2].data(),
                     .state2 = its[3].data(),
                     .state3 = its[4].data(),
                     .absmax1 = static_cast<float*>(its[5].data()),
                     .absmax2 = static_cast<float*>(its[6].data()),
                     .absmax3 = static_cast<float*>(its[7].data()),
                     .step = &steps[i]});
  }
  const qn::Optimizer8bitGroup group{.lr = 0.01, .weight_decay = 0.1};
  std::int64_t skipped = 0;
  for (int step = 0; step < 3; ++step) {
    auto& last_grad = static_cast<float*>(tensors[tensors.size() - 7].data())[sizes.back() - 1];
    const float saved = last_grad;
    if (step == 1) last_grad = 1e30f;
    qn::optimizer_8bit_step({.tensors = views.data(),
                             .count = static_cast<std::int64_t>(views.size()),
                             .groups = &group,
                             .group_count = 1,
                             .skipped = &skipped,
                             .algorithm = algorithm});
    last_grad = saved;
    EXPECT(skipped == (step == 0 ? 0 : 1));
  }
  Bytes all;
  for (const Tensor& tensor : tensors) append(all, tensor);
  for (const std::int64_t step : steps) EXPECT(step == 2);
  return all;
}

void optimizer_has_the_same_bits() {
  for (const qn::Algorithm algorithm : {qn::Algorithm::adamw, qn::Algorithm::lion, qn::Algorithm::ademamix}) {
    EXPECT(has_the_same_bits([&] { return optimizer_results(algorithm); },
                             [&] { return "algorithm " + std::to_string(static_cast<int>(algorithm)); }));
  }
}

// The test bypasses the host's check of the learning rate, because on a GPU only the kernel can see the value.
void learning_rate_that_is_no_number_skips_the_step() {
  for (const float lr : {NAN, INFINITY, -1.0f}) {
    float param = 1.0f, grad = 1.0f, m = 0.0f, v = 0.0f;
    std::int64_t step = 0, skipped = 0;
    const qn::Optimizer8bitTensor tensor{
        .param = &param, .grad = &grad, .elements = 1, .state1 = &m, .state2 = &v, .step = &step};
    const qn::Optimizer8bitGroup group{.device_lr = &lr};
    qn::backend_for({}).optimizer_8bit_step(
        {.tensors = &tensor, .count = 1, .groups = &group, .group_count = 1, .skipped = &skipped}, {});
    EXPECT(skipped == 1 && step == 0 && param == 1.0f && m == 0.0f);
  }
}

}  // namespace

int main() {
  several_blocks_compute_a_tile();
  products_have_the_same_bits();
  optimizer_has_the_same_bits();
  learning_rate_that_is_no_number_skips_the_step();
  return report();
}
