#include "qlora_native/calibrate.h"

#include <vector>

#include "backend.h"
#include "check.h"
#include "common/calibration.h"
#include "common/layout.h"

namespace qlora_native {
namespace {

// Checks the arguments that both operations on a weight have.
template <class Args>
void check_blocks(const Args& args, const Stream& stream) {
  check(args.N >= 1, "N", ">= 1", args.N);
  check(args.K >= 1, "K", ">= 1", args.K);
  check_elements(args.N, args.K, "N");
  check_bits(args.bits, "bits");
  check_blocksize(args.blocksize, kMinBlocksize, "blocksize");
  check_code(args.code, args.bits, stream, "code");
  check_pointer(args.weight, true, "weight");
}

void check_order(const std::int64_t* order, std::int64_t K) {
  std::vector<bool> seen(static_cast<std::size_t>(K));
  const auto column_at = [&](std::int64_t i) {
    return [=] { return std::to_string(order[i]) + " at " + std::to_string(i); };
  };
  for (std::int64_t i = 0; i < K; ++i) {
    check(
        order[i] >= 0 && order[i] < K, "order", [&] { return "columns in 0 ... " + std::to_string(K - 1); },
        column_at(i));
    check(!seen[static_cast<std::size_t>(order[i])], "order", "each column once",
          [&] { return column_at(i)() + " again"; });
    seen[static_cast<std::size_t>(order[i])] = true;
  }
}

}  // namespace

void gram(const GramArgs& args, const Stream& stream) {
  const Backend& backend = backend_for_host(stream, "gram");
  check(args.x.rows >= 0, "x.rows", ">= 0", args.x.rows);
  check(args.x.cols >= 1, "x.cols", ">= 1", args.x.cols);
  check_matrix(args.x, args.x.rows, args.x.cols, args.x.dtype, "x");
  check_elements(args.x.cols, args.x.cols, "x.cols");
  check_pointer(args.gram, true, "gram");
  backend.gram(args, stream);
}

void weighted_scales(const WeightedScalesArgs& args, const Stream& stream) {
  const Backend& backend = backend_for_host(stream, "weighted_scales");
  check_blocks(args, stream);
  check(std::isfinite(args.lo) && args.lo > 0.0f, "lo", "a finite value > 0", args.lo);
  check(
      std::isfinite(args.hi) && args.hi >= args.lo, "hi",
      [&] { return "a finite value >= lo, which is " + std::to_string(args.lo); }, args.hi);
  check(
      args.steps >= 1 && args.steps <= kMaxScaleSteps, "steps",
      [] { return "1 ... " + std::to_string(kMaxScaleSteps); }, args.steps);
  check_pointer(args.importance, true, "importance");
  check_pointer(args.scales, true, "scales");
  check_finite(args.weight, args.N * args.K, "weight");
  check_finite(args.importance, args.K, "importance");
  for (std::int64_t k = 0; k < args.K; ++k)
    check(args.importance[k] >= 0.0f, "importance", "values >= 0",
          [&] { return std::to_string(args.importance[k]) + " at " + std::to_string(k); });
  backend.weighted_scales(args, stream);
  check(first_non_finite(args.scales, ceil_div(args.N * args.K, args.blocksize)) < 0, "weight",
        "values whose scales are finite", "some near the largest of fp32");
}

void quantize_with_feedback(const QuantizeWithFeedbackArgs& args, const Stream& stream) {
  const Backend& backend = backend_for_host(stream, "quantize_with_feedback");
  check_blocks(args, stream);
  check_elements(args.K, args.K, "K");
  check_pointer(args.order, true, "order");
  check_pointer(args.factor, true, "factor");
  check_pointer(args.scales, true, "scales");
  check_pointer(args.codes, true, "codes");
  check_order(args.order, args.K);
  for (std::int64_t i = 0; i < args.K; ++i) {
    const float pivot = args.factor[i * args.K + i];
    check(std::isfinite(pivot) && pivot > 0.0f, "factor", "a diagonal of finite values > 0",
          [&] { return std::to_string(pivot) + " at " + std::to_string(i); });
  }
  check_finite(args.weight, args.N * args.K, "weight");
  check_finite(args.scales, ceil_div(args.N * args.K, args.blocksize), "scales");
  backend.quantize_with_feedback(args, stream);
}

}  // namespace qlora_native
