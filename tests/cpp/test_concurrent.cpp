// Guards the CUDA kernels whose blocks depend on each other, on the emulator with concurrent blocks
// (cuda/emulator/fibers.h). Several blocks make partial sums of a tile (stream-K), and a kernel passes a workspace to
// the next: the results have the same bits as when one block runs after the other. To be run with
// QLN_BACKEND=cuda_emulated.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "backend.h"
#include "layer.h"
#include "parameter.h"
#include "product/config.h"
#include "qlora_native/qlora_native.h"

namespace {

using Bytes = std::vector<char>;

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

// U and V lie first in a workspace of the call, then in the caller's memory.
Bytes results(const Case& c) {
  Layer layer(c);
  qn::LinearForwardArgs forward = layer.forward_args();
  qn::LinearBackwardInputArgs backward = layer.backward_args();
  forward.u = backward.v = {};
  qn::linear_forward(forward);
  qn::linear_backward_input(backward);
  Bytes all = layer.bytes();
  layer.run();
  const Bytes more = layer.bytes();
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

// Groups of rows, each larger than the one before.
Case grouped(Case c, std::int64_t groups, bool group_weights) {
  for (std::int64_t g = 0; g <= groups; ++g) c.offsets.push_back(g * g * c.M / (groups * groups));
  c.group_weights = group_weights;
  return c;
}

// The cases are: M = 4; tiles of 16, 64, 128 and 256 rows, with whole vectors and without; two tiles, and more tiles
// than blocks, of 16 rows and of 128; and fp32, whose kernels have no tiles. U, V, dA and dB are long sums, which are
// split-K products. The same follows for rows in groups that have each a weight and an adapter, or only an adapter.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> cases = {
        {.M = 4, .N = 200, .K = 704, .rank = 16},
        {.M = 12, .N = 200, .K = 704, .rank = 70},
        {.M = 12, .N = 1250, .K = 256, .rank = 5},
        {.M = 40, .N = 130, .K = 333, .dtype = DType::f16, .rank = 5},
        {.M = 100, .N = 130, .K = 704, .dtype = DType::f16, .rank = 16},
        {.M = 100, .N = 1250, .K = 256, .rank = 5},
        {.M = 200, .N = 130, .K = 448, .rank = 16},
        {.M = 40, .N = 130, .K = 960, .dtype = DType::f32, .rank = 5},
        grouped({.M = 12, .N = 200, .K = 704, .rank = 5}, 5, true),
        grouped({.M = 60, .N = 200, .K = 704, .rank = 16}, 5, true),
        grouped({.M = 90, .N = 200, .K = 704, .dtype = DType::f16, .rank = 16}, 3, true),
        grouped({.M = 400, .N = 136, .K = 448, .rank = 16}, 3, true),
        grouped({.M = 200, .N = 136, .K = 448, .rank = 70}, 3, false),
        grouped({.M = 30, .N = 200, .K = 704, .rank = 16}, 9, false),
        grouped({.M = 40, .N = 130, .K = 960, .dtype = DType::f32, .rank = 5}, 3, true),
    };
    for (Case& c : cases) c.bias = true, c.dropout = 0.25f;
    return cases;
  }();
  return all;
}

TEST(products_have_the_same_bits) {
  for (const Case& each : cases()) {
    EXPECT(has_the_same_bits([&each] { return results(each); }, [&each] { return each.name(); }));
  }
}

// There are so many rows that several blocks share a sum of dA and of dB, which takes tickets.
TEST(gradients_of_many_rows_have_the_same_bits) {
  const Case many = {.M = 600, .N = 64, .K = 64, .rank = 8};
  const auto run = [&] {
    Layer layer(many);
    layer.run();
    return layer.bytes();
  };
  EXPECT(has_the_same_bits(run, [&] { return many.name(); }));
}

// In code of compute_80, which a later device may run, kernels of a call do not overlap.
TEST(products_have_the_same_bits_in_code_without_griddepcontrol) {
  const Case& one = cases().front();
  const Bytes expected = results(one);
  setenv("QLN_EMULATED_PTX", "80", 1);
  EXPECT(results(one) == expected);
  EXPECT(has_the_same_bits([&] { return results(one); }, [&] { return one.name(); }));
  unsetenv("QLN_EMULATED_PTX");
}

// Otherwise the cases would not test the flags.
TEST(several_blocks_compute_a_tile) {
  for (const Case& each : cases()) {
    if (each.dtype == DType::f32 || each.M / each.weights() <= qn::kGemvRows) continue;
    qn::ProductShape shape{.rows = each.M,
                           .cols = each.N,
                           .inner = each.K,
                           .dtype = each.dtype,
                           .bits = 4,
                           .groups = each.groups(),
                           .group_weights = each.group_weights};
    shape.aligned = shape.aligned_64 = each.K % 32 == 0;
    shape.num_sms = 3;  // the emulated device has 3
    shape.smem_bytes = 227 * 1024;
    shape.reserved_smem_bytes = 1024;
    const auto config = std::get<qn::GemmConfig>(qn::choose_product(shape));
    // The row tiles that the blocks will find.
    std::int64_t row_tiles = config.row_tiles;
    if (each.group_weights) {
      row_tiles = 0;
      for (std::int64_t g = 0; g < each.groups(); ++g)
        row_tiles += qn::ceil_div(each.offsets[g + 1] - each.offsets[g], config.tile_rows);
    }
    EXPECT(config.with_row_tiles(row_tiles).splits_a_tile());
  }
}

// ---- the optimizer ----

// The results of two steps and a skipped one, for tensors of several kinds with their states.
Bytes optimizer_results(qn::Algorithm algorithm) {
  std::vector<Parameter> parameters;
  for (const std::int64_t elements : {1, 256, 5000, 20'000}) parameters.emplace_back(elements);
  parameters.emplace_back(300, DType::bf16, DType::bf16);
  std::vector<qn::Optimizer8bitTensor> views;
  for (Parameter& parameter : parameters) views.push_back(parameter.view());
  const qn::Optimizer8bitGroup group{.lr = 0.01, .weight_decay = 0.1};
  std::int64_t skipped = 0;
  for (int step = 0; step < 3; ++step) {
    Tensor& grad = parameters.back().grad;
    const float saved = grad.at(0, 299);
    if (step == 1) grad.set(0, 299, 1e30f);
    qn::optimizer_8bit_step({.tensors = views.data(),
                             .count = static_cast<std::int64_t>(views.size()),
                             .groups = &group,
                             .group_count = 1,
                             .skipped = &skipped,
                             .algorithm = algorithm});
    grad.set(0, 299, saved);
    EXPECT(skipped == (step == 0 ? 0 : 1));
  }
  Bytes all;
  for (const Parameter& parameter : parameters) {
    EXPECT(parameter.step == 2);
    all.insert(all.end(), parameter.param.bytes().begin(), parameter.param.bytes().end());
    for (const auto& codes : parameter.codes) all.insert(all.end(), codes.begin(), codes.end());
    for (const auto& absmax : parameter.absmax) {
      const char* const bytes = reinterpret_cast<const char*>(absmax.data());
      all.insert(all.end(), bytes, bytes + absmax.size() * sizeof(float));
    }
  }
  return all;
}

TEST(optimizer_has_the_same_bits) {
  for (const qn::Algorithm algorithm : kAlgorithms) {
    EXPECT(has_the_same_bits([&] { return optimizer_results(algorithm); },
                             [&] { return "algorithm " + std::to_string(static_cast<int>(algorithm)); }));
  }
}

// The test bypasses the host's check of the learning rate, because on a GPU only the kernel can see the value.
TEST(learning_rate_that_is_no_number_skips_the_step) {
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

int main() { return run_tests(); }
