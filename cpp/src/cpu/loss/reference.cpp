// The scalar backend's cross_entropy, as cross_entropy.h defines it, in fp64.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/isa/scalar/reference.h"
#include "cpu/runtime/parallel.h"

namespace qlora_native::reference {

void cross_entropy(const CrossEntropyArgs& args, const Stream&) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  parallel_for(args.logits.rows, [&](std::int64_t row) {
    const std::int64_t V = args.logits.cols, first = row * args.logits.stride, label = args.labels[row];
    const DType dtype = args.logits.dtype;
    const bool ignored = label == args.ignore_index;
    const double scale = double{args.scale}, cap = double{args.softcap}, smoothing = double{args.label_smoothing};
    std::vector<double> z(static_cast<std::size_t>(V));
    double largest = -std::numeric_limits<double>::infinity(), sum = 0.0, exponentials = 0.0;
    for (std::int64_t i = 0; i < V; ++i) {
      double& value = z[static_cast<std::size_t>(i)];
      value = scale * double{load(args.logits.data, dtype, first + i)};
      if (cap > 0.0) value = cap * std::tanh(value / cap);
      largest = std::fmax(largest, value);
      sum += value;
    }
    for (const double value : z) exponentials += std::exp(value - largest);
    const bool finite = std::isfinite(largest) && !std::isnan(sum);
    const double lse = finite ? largest + std::log(exponentials) : kNaN;
    const double target = ignored ? 0.0 : z[static_cast<std::size_t>(label)];
    double loss = lse - (1.0 - smoothing) * target + double{args.z_loss} * lse * lse;
    if (smoothing > 0.0) loss -= smoothing / static_cast<double>(V) * sum;
    args.loss[row] = ignored ? 0.0f : static_cast<float>(loss);
    if (args.log_probability != nullptr) args.log_probability[row] = ignored ? 0.0f : static_cast<float>(target - lse);
    if (!args.gradient) return;
    for (std::int64_t i = 0; i < V; ++i) {
      const double value = z[static_cast<std::size_t>(i)];
      double gradient = std::exp(value - lse) * (1.0 + 2.0 * double{args.z_loss} * lse) -
                        smoothing / static_cast<double>(V) - (i == label ? 1.0 - smoothing : 0.0);
      gradient *= scale * (args.row_gradients != nullptr ? double{args.row_gradients[row]} : 1.0);
      if (cap > 0.0) gradient *= 1.0 - (value / cap) * (value / cap);
      store(args.logits.data, dtype, first + i, ignored ? 0.0f : static_cast<float>(gradient));
    }
  });
}

}  // namespace qlora_native::reference
