// How the blocks of a cluster that share a tile of the product by wgmma (gemm.cuh) add their partial sums of it.
#pragma once

#include "product/wgmma/accumulators.cuh"

namespace qlora_native::QLN_CUDA {

// Each block adds a part of the tile's vectors. All blocks store their partial sums of that part in its stages, which
// must no longer be in use. It adds them in the order of the inner dimension, and stores the result. In each round
// (reduce_rounds()) all blocks get some of their part. All consumers call this.
//
// `rank` is the block's among those of the tile, and `first_block` the rank in the cluster of the first of these.
// `make_epilogue()` makes the WgmmaEpilogue, while partial sums are in flight.
template <int kCluster, class Tile, class Shared, class MakeEpilogue>
__device__ __forceinline__ void cluster_reduce(WgmmaAccumulators<Tile>& accumulators, Shared& shared, int rank,
                                               int first_block, const MakeEpilogue& make_epilogue) {
  using Accumulators = WgmmaAccumulators<Tile>;
  using Vec4 = Vector<float, 4>;
  // If there are more blocks than vectors, `kBlocksPerVector` blocks add one vector: each adds that of every
  // kBlocksPerVector-th warp.
  constexpr int kCount = kCluster < Accumulators::kVectors ? Accumulators::kVectors / kCluster : 1;
  constexpr int kBlocksPerVector = kCluster / (Accumulators::kVectors / kCount);
  constexpr std::uint32_t kVectorsBytes = Tile::kConsumers * sizeof(Vec4), kPartBytes = kCount * kVectorsBytes;
  static_assert(sizeof(shared.stages) >= kCluster * kPartBytes);
  const int slice = thread_index() / kWarp % kBlocksPerVector;
  constexpr int kRounds = reduce_rounds(Tile::kRows, kCluster), kVectorsPerRound = kCount / kRounds;
  const SharedAddress partial_sums(shared.stages);
  if (thread_index() == 0) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      mbarrier_arrive_expect(&shared.reduce_full[round], kCluster * kPartBytes / kBlocksPerVector / kRounds);
    }
  }
  const SharedAddress to = partial_sums.at(rank * kPartBytes + thread_index() * sizeof(Vec4));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int other = 0; other < Accumulators::kVectors / kCount; ++other) {
      const float* const s = accumulators.vector(other * kCount + i);
      store_async(to.at(i * kVectorsBytes), Vec4{{s[0], s[1], s[2], s[3]}}, &shared.reduce_full[i / kVectorsPerRound],
                  first_block + other * kBlocksPerVector + slice);
    }
  }
  // The sum of the i-th vectors that a thread of each block has stored.
  const auto sum_of = [&](int thread, int i) {
    const SharedAddress first = partial_sums.at(thread * sizeof(Vec4) + i * kVectorsBytes);
    Vec4 sums[kCluster];
#pragma unroll
    for (int block = 0; block < kCluster; ++block) sums[block] = load_shared<Vec4>(first.at(block * kPartBytes));
#pragma unroll
    for (int block = 1; block < kCluster; ++block) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[0].at[j] += sums[block].at[j];
    }
    return sums[0];
  };
  const auto epilogue = make_epilogue();
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    if (i % kVectorsPerRound == 0) mbarrier_wait_in_cluster(&shared.reduce_full[i / kVectorsPerRound], 0);
    const int vector = rank / kBlocksPerVector * kCount + i;
    if constexpr (Tile::kSplitsCols) {  // as combine_warpgroups() does, a warpgroup stores every second eight rows
      if (i % 2 != thread_index() / kWarpgroup) continue;
      const int lane = thread_index() % kWarpgroup;
      const Vec4 first = sum_of(lane, i), second = sum_of(lane + kWarpgroup, i);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float row_values[] = {first.at[row], first.at[2 + row], second.at[row], second.at[2 + row]};
        epilogue.store(vector / 2 * 2 + row, row_values);
      }
    } else if (slice == rank % kBlocksPerVector) {
      epilogue.store(vector, sum_of(thread_index(), i).at);
    }
  }
}

}  // namespace qlora_native::QLN_CUDA
