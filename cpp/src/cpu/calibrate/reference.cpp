// The scalar backend's gram, weighted_scales and quantize_with_feedback. The last two have the bits of the other
// backends, so their sums are in fp32 and in the same order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/calibration.h"
#include "common/codebook.h"
#include "common/layout.h"
#include "cpu/calibrate/feedback.h"
#include "cpu/isa/scalar/reference.h"
#include "cpu/runtime/parallel.h"

namespace qlora_native::reference {
namespace {

// What an element can become, as cpu/calibrate/levels-inl.h.
struct Levels {
  int bits;
  SortedCodebook codebook{};
  const float* code;

  Levels(int bits, const float* code) : bits(bits), code(code) {
    if (bits == 4) codebook = sort_codebook(code);
  }
  float step(float scale) const { return bits == 8 ? scale / 127.0f : scale; }
  std::uint8_t nearest(float t) const {
    if (bits == 4) return nearest_code(codebook, t);
    const float level = std::nearbyint(std::clamp(t * 127.0f, -127.0f, 127.0f));
    return std::isnan(level) ? std::uint8_t{0} : static_cast<std::uint8_t>(static_cast<std::int8_t>(level));
  }
  float level(std::uint8_t found) const {
    return bits == 8 ? static_cast<float>(static_cast<std::int8_t>(found)) : code[found];
  }
};

// The scale of a block of elements [begin, end), whose columns are taken modulo K.
float scale_of(const WeightedScalesArgs& args, const Levels& levels, std::int64_t begin, std::int64_t end) {
  float absmax = 0.0f, max_importance = 0.0f;
  for (std::int64_t e = begin; e < end; ++e) {
    absmax = std::max(absmax, std::fabs(args.weight[e]));
    max_importance = std::max(max_importance, args.importance[e % args.K]);
  }
  if (absmax == 0.0f) return 0.0f;
  float best = 0.0f, least = 0.0f;
  for (int step = 0; step < args.steps; ++step) {
    const float r = scale_candidate(args.lo, args.hi, args.steps, step), inverse = 1.0f / r;
    constexpr int kChains = 16;
    float chains[kChains] = {};
    for (std::int64_t e = begin; e < end; ++e) {
      const float t = args.weight[e] / absmax;
      const float error = std::fma(levels.level(levels.nearest(t * inverse)), -levels.step(r), t);
      const float importance = max_importance == 0.0f ? 1.0f : args.importance[e % args.K] / max_importance;
      float& chain = chains[(e - begin) % kChains];
      chain = std::fma(importance * error, error, chain);
    }
    for (int half = kChains / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) chains[i] += chains[i + half];
    if (step == 0 || chains[0] < least) {
      best = r;
      least = chains[0];
    }
  }
  return absmax * best;
}

// Quantizes a row: codes[k] is that of column k.
void quantize_row(const QuantizeWithFeedbackArgs& args, const Levels& levels, std::int64_t row, std::uint8_t* codes) {
  const std::int64_t K = args.K;
  std::vector<float> w(static_cast<std::size_t>(K));
  for (std::int64_t i = 0; i < K; ++i) w[static_cast<std::size_t>(i)] = args.weight[row * K + args.order[i]];
  for (std::int64_t i = 0; i < K; ++i) {
    const float value = w[static_cast<std::size_t>(i)], *const factor = args.factor + i * K;
    const float scale = args.scales[(row * K + args.order[i]) / args.blocksize];
    const std::uint8_t code = levels.nearest(scale == 0.0f ? 0.0f : value / scale);
    const float error = (levels.level(code) * levels.step(scale) - value) / factor[i];
    if (!std::isfinite(error)) fail_of_overflow(row);
    codes[args.order[i]] = code;
    for (std::int64_t j = i + 1; j < K; ++j) {
      float& later = w[static_cast<std::size_t>(j)];
      later = std::fma(error, factor[j], later);
    }
  }
}

}  // namespace

void gram(const GramArgs& args, const Stream&) {
  const std::int64_t K = args.x.cols;
  parallel_for(K, [&](std::int64_t j) {
    for (std::int64_t i = 0; i <= j; ++i) {
      double sum = args.gram[i * K + j];
      for (std::int64_t t = 0; t < args.x.rows; ++t) sum += double{at(args.x, t, i)} * double{at(args.x, t, j)};
      args.gram[i * K + j] = static_cast<float>(sum);
      args.gram[j * K + i] = static_cast<float>(sum);
    }
  });
}

void weighted_scales(const WeightedScalesArgs& args, const Stream&) {
  const Levels levels(args.bits, args.code);
  const std::int64_t elements = args.N * args.K;
  parallel_for(ceil_div(elements, args.blocksize), [&](std::int64_t b) {
    const std::int64_t begin = b * args.blocksize;
    args.scales[b] = scale_of(args, levels, begin, std::min(elements, begin + args.blocksize));
  });
}

void quantize_with_feedback(const QuantizeWithFeedbackArgs& args, const Stream&) {
  const Levels levels(args.bits, args.code);
  // Two rows at a time, so that no byte has two writers.
  parallel_for(ceil_div(args.N, 2), [&](std::int64_t task) {
    const std::int64_t first = 2 * task, rows = std::min<std::int64_t>(2, args.N - first), begin = first * args.K;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(rows * args.K));
    for (std::int64_t i = 0; i < rows; ++i) quantize_row(args, levels, first + i, codes.data() + i * args.K);
    if (args.bits == 8) {
      std::copy(codes.begin(), codes.end(), args.codes + begin);
      return;
    }
    if (codes.size() % 2 != 0) codes.push_back(levels.nearest(0.0f));
    for (std::size_t i = 0; i < codes.size(); i += 2)
      args.codes[begin / 2 + static_cast<std::int64_t>(i / 2)] =
          static_cast<std::uint8_t>(codes[i] << 4 | codes[i + 1]);
  });
}

}  // namespace qlora_native::reference
