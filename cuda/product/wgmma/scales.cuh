// The scales of a tile's steps in the product by wgmma (gemm.cuh), as producers load them.
#pragma once

#include "product/wgmma/schedule.cuh"

namespace qlora_native::QLN_CUDA {

// A thread's scales of step after step: those of every kThreads-th column, or row (weights.cuh). They are loaded kAhead
// steps before they are computed.
template <class Weights, class Tile>
class ScaleLoader {
  using Raw = ScaleReader<true>::Raw;
  static constexpr int kAhead = 2;

 public:
  static constexpr int kThreads = Tile::kScaleWarps * kWarp, kScales = Tile::kCols / kThreads;

  // Begins with the step at `inner0` of the inner dimension.
  __device__ __forceinline__ ScaleLoader(const WgmmaArgs& args, const ScaleReader<true>& scales, int thread, int inner0,
                                         int col0)
      : args_(args), scales_(scales) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int scale = thread + i * kThreads;
      const std::int64_t element =
          Weights::element(args.weight, inner0 + Weights::scale_inner(scale), col0 + Weights::scale_col(scale));
      chunks_[i] = static_cast<std::uint32_t>(static_cast<std::uint64_t>(element) / kChunk);
      last_[i] = args.last_chunk;
      if constexpr (!Tile::kForward) {
        const std::int64_t last_element =
            Weights::element(args.weight, args.inner - 1, col0 + Weights::scale_col(scale));
        const auto last = static_cast<std::uint32_t>(static_cast<std::uint64_t>(last_element) / kChunk);
        last_[i] = last < args.last_chunk ? last : args.last_chunk;
      }
    }
#pragma unroll
    for (auto& step : raw_) fetch(step);
    offset_ = ScaleReader<true>::offset_of(args.weight);
  }
  // Computes the scales of the next step.
  __device__ __forceinline__ void next(float (&scale)[kScales]) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) scale[i] = scales_.finish(raw_[0][i], offset_);
#pragma unroll
    for (int step = 1; step < kAhead; ++step) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) raw_[step - 1][i] = raw_[step][i];
    }
    fetch(raw_[kAhead - 1]);
  }

 private:
  // Chunks beyond the product are multiplied by zeros of X, or belong to columns that are not stored. So almost any
  // chunk will do there, and a chunk beyond the weight becomes its last. In dX, where they are multiplied for all
  // columns, it becomes the last of its own columns: 0 times a scale that is not finite is NaN, and so are these
  // columns anyway.
  __device__ __forceinline__ void fetch(Raw (&raw)[kScales]) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      scales_.fetch(raw[i], scales_.block_of(chunks_[i] < last_[i] ? chunks_[i] : last_[i]));
      chunks_[i] += static_cast<std::uint32_t>(Weights::step(args_.weight) / kChunk);
    }
  }

  const WgmmaArgs& args_;
  const ScaleReader<true>& scales_;
  std::uint32_t chunks_[kScales], last_[kScales];
  Raw raw_[kAhead][kScales];
  float offset_;
};

}  // namespace qlora_native::QLN_CUDA
