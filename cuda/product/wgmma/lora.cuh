// Prefetches the adapter's B or A for the product by wgmma (gemm.cuh).
#pragma once

#include "device/hopper.cuh"
#include "product/wgmma/schedule.cuh"

namespace qlora_native::QLN_CUDA {

// Loads to L2 the B or A of the block's first tile, while its tables are filled. What the block needs after it, other
// blocks have loaded. All consumers call this.
template <class Tile>
__device__ void prefetch_lora(const WgmmaArgs& args, const WgmmaSchedule<Tile>& schedule, const int& run) {
  const TilePart part = schedule.part_after(run, 0);
  const std::int64_t rank = part.count == 0 ? 0 : schedule.lora_rank(part), col = schedule.col0(part);
  if (rank == 0) return;
  const std::int64_t cols = args.cols - col < Tile::kCols ? args.cols - col : Tile::kCols;
  // The columns of B lie one after another, with all their ranks, and those of A by rank.
  const auto bytes = static_cast<std::int64_t>(size_of(args.lora_dtype));
  const std::int64_t spans = Tile::kForward ? 1 : rank, span_bytes = (Tile::kForward ? cols * rank : cols) * bytes;
#pragma unroll 1
  for (std::int64_t span = 0; span < spans; ++span) {
    const auto* const begin =
        static_cast<const std::byte*>(args.lora) + lora_index<Tile::kForward>(args, span, col) * bytes;
#pragma unroll 1
    for (std::int64_t at = thread_index() * kSectorBytes; at < span_bytes; at += Tile::kConsumers * kSectorBytes) {
      prefetch_sector(begin + at);
    }
  }
}

}  // namespace qlora_native::QLN_CUDA
