// weighted_scales, a block of the flat weight at a time.
//
// All is computed in parts of the block's absmax and of its largest importance, so no error is too large or too small
// for fp32. An error is a sum of 16 chains, where chain i has elements i, i + 16, i + 32, ..., and these are added in
// pairs (i, i + 8), then (i, i + 4), and so on. So the bits do not depend on the number of lanes.
#pragma once

#include "common/calibration.h"
#include "common/checks.h"
#include "common/layout.h"
#include "cpu/calibrate/levels-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/runtime/parallel.h"
#include "qlora_native/calibrate.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Levels>
class WeightedScales {
 public:
  WeightedScales(const WeightedScalesArgs& args, const Levels& levels) : args_(args), levels_(levels) {
    for (int i = 0; i < padded_steps(); ++i) {
      const float r = scale_candidate(args.lo, args.hi, args.steps, smaller(i, args.steps - 1));
      candidate_[i] = r;
      inverse_[i] = 1.0f / r;
      negative_step_[i] = -levels.step(r);
    }
  }

  // The scale of block b.
  float scale_of_block(std::int64_t b) const {
    Block block;
    const float absmax = load_block(b, block);
    if (absmax == 0.0f) return 0.0f;
    float errors[kMaxScaleSteps];
    for (int i = 0; i < args_.steps; i += kLanes) store(errors + i, errors_from(block, i));
    int best = 0;
    for (int i = 1; i < args_.steps; ++i)
      if (errors[i] < errors[best]) best = i;
    return absmax * candidate_[best];
  }

 private:
  static constexpr int kChains = 16, kVectors = kChains / kLanes;
  static_assert(kChains % kLanes == 0 && kMaxScaleSteps % kLanes == 0);

  struct Block {
    alignas(64) float t[kMaxBlocksize], importance[kMaxBlocksize];
    int elements;  // a multiple of kChains; those past the end of the weight have importance 0
  };

  int padded_steps() const { return static_cast<int>(round_up(args_.steps, kLanes)); }

  // Divides the elements of a block by its absmax, and their importance by the largest. Returns absmax.
  float load_block(std::int64_t b, Block& block) const {
    const std::int64_t begin = b * args_.blocksize;
    const auto count = static_cast<int>(smaller<std::int64_t>(args_.blocksize, args_.N * args_.K - begin));
    block.elements = static_cast<int>(round_up(count, kChains));
    __builtin_memcpy(block.t, args_.weight + begin, static_cast<std::size_t>(count) * sizeof(float));
    std::int64_t column = begin % args_.K;
    for (int i = 0; i < count;) {
      const auto run = static_cast<int>(smaller<std::int64_t>(count - i, args_.K - column));
      __builtin_memcpy(block.importance + i, args_.importance + column, static_cast<std::size_t>(run) * sizeof(float));
      i += run;
      column = 0;
    }
    for (int i = count; i < block.elements; ++i) block.t[i] = block.importance[i] = 0.0f;
    F32 largest = zero(), largest_importance = zero();
    for (int i = 0; i < block.elements; i += kLanes) {
      largest = max(largest, abs(load(block.t + i)));
      largest_importance = max(largest_importance, load(block.importance + i));
    }
    const float absmax = reduce_max(largest), max_importance = reduce_max(largest_importance);
    if (absmax == 0.0f) return 0.0f;
    if (max_importance == 0.0f)
      for (int i = 0; i < count; ++i) block.importance[i] = 1.0f;
    const F32 divisor = set1(absmax), importance_divisor = set1(max_importance == 0.0f ? 1.0f : max_importance);
    for (int i = 0; i < block.elements; i += kLanes) {
      store(block.t + i, divide(load(block.t + i), divisor));
      store(block.importance + i, divide(load(block.importance + i), importance_divisor));
    }
    return absmax;
  }

  // The errors of candidates first ... first + kLanes - 1.
  F32 errors_from(const Block& block, int first) const {
    F32 sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = fold(error_of(block, first + i));
    transpose(sums);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] = add(sums[i], sums[i + half]);
    return sums[0];
  }
  struct Chains {
    F32 v[kVectors];
  };
  [[gnu::always_inline]] Chains error_of(const Block& block, int i) const {
    const F32 inverse = set1(inverse_[i]), negative_step = set1(negative_step_[i]);
    Chains chains;
    for (F32& chain : chains.v) chain = zero();
    for (int e = 0; e < block.elements; e += kChains)
      for (int v = 0; v < kVectors; ++v) {
        const F32 t = load(block.t + e + v * kLanes);
        const F32 error = fma(levels_.level(mul(t, inverse)), negative_step, t);
        chains.v[v] = fma(mul(load(block.importance + e + v * kLanes), error), error, chains.v[v]);
      }
    return chains;
  }
  static F32 fold(Chains chains) {
    for (int half = kVectors / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) chains.v[i] = add(chains.v[i], chains.v[i + half]);
    return chains.v[0];
  }

  const WeightedScalesArgs& args_;
  Levels levels_;
  float candidate_[kMaxScaleSteps], inverse_[kMaxScaleSteps], negative_step_[kMaxScaleSteps];
};

inline void weighted_scales_of_blocks(const WeightedScalesArgs& args, const Stream&) {
  constexpr std::int64_t kTaskElements = 1 << 14;  // so many take about a millisecond
  with_levels(args.bits, args.code, [&](const auto& levels) {
    const WeightedScales<std::remove_cvref_t<decltype(levels)>> scales(args, levels);
    const std::int64_t blocks = ceil_div(args.N * args.K, std::int64_t{args.blocksize});
    const std::int64_t task_blocks = kTaskElements / args.blocksize;
    parallel_for(ceil_div(blocks, task_blocks), [&](std::int64_t task) {
      const std::int64_t end = smaller(blocks, (task + 1) * task_blocks);
      for (std::int64_t b = task * task_blocks; b < end; ++b) args.scales[b] = scales.scale_of_block(b);
    });
  });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
