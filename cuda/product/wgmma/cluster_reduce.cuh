// How the blocks of a cluster that share a tile of the product by wgmma (gemm.cuh) add their sums of it.
#pragma once

#include "product/wgmma/accumulators.cuh"

namespace qlora_native::QLN_CUDA {

// Each block adds a part of the tile's vectors. All blocks copy their sums of that part into its stages, which must no
// longer be in use. It adds them in the order of the inner dimension, and stores the result. In each turn
// (hopper_turns()) all blocks get some of their part. All consumers come here.
//
// `own_rank` is the block's rank among those of the tile, and `first_block` the rank in the cluster of the first of
// these. `result_of_tile()` makes the HopperResult, while sums are on their way.
template <int kCluster, class Tile, class Shared, class Result>
__device__ __forceinline__ void hopper_cluster_sums(HopperSums<Tile>& own_sums, Shared& shared, int own_rank,
                                                    int first_block, const Result& result_of_tile) {
  using Sums = HopperSums<Tile>;
  using Four = Vector<float, 4>;
  // If there are more blocks than vectors, `kSharing` blocks add one vector: each adds that of every kSharing-th warp.
  constexpr int kCount = kCluster < Sums::kVectors ? Sums::kVectors / kCluster : 1;
  constexpr int kSharing = kCluster / (Sums::kVectors / kCount);
  constexpr std::uint32_t kVectorsBytes = Tile::kConsumers * sizeof(Four), kPartBytes = kCount * kVectorsBytes;
  static_assert(sizeof(shared.stages) >= kCluster * kPartBytes);
  const int share = thread_index() / kWarp % kSharing;
  constexpr int kTurns = hopper_turns(Tile::kRows, kCluster), kOfTurn = kCount / kTurns;
  const SharedAddress sums(shared.stages);
  if (thread_index() == 0) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      mbarrier_arrive_expect(&shared.sums[turn], kCluster * kPartBytes / kSharing / kTurns);
    }
  }
  const SharedAddress own = sums.at(own_rank * kPartBytes + thread_index() * sizeof(Four));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int other = 0; other < Sums::kVectors / kCount; ++other) {
      const float* const s = own_sums.vector(other * kCount + i);
      store_async(own.at(i * kVectorsBytes), Four{{s[0], s[1], s[2], s[3]}}, &shared.sums[i / kOfTurn],
                  first_block + other * kSharing + share);
    }
  }
  // The sum of the i-th vectors that a thread of each block has stored.
  const auto sum_of = [&](int thread, int i) {
    const SharedAddress first = sums.at(thread * sizeof(Four) + i * kVectorsBytes);
    Four of_rank[kCluster];
#pragma unroll
    for (int rank = 0; rank < kCluster; ++rank) of_rank[rank] = load_shared<Four>(first.at(rank * kPartBytes));
#pragma unroll
    for (int rank = 1; rank < kCluster; ++rank) {
#pragma unroll
      for (int j = 0; j < 4; ++j) of_rank[0].at[j] += of_rank[rank].at[j];
    }
    return of_rank[0];
  };
  const auto result = result_of_tile();
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    if (i % kOfTurn == 0) mbarrier_wait(&shared.sums[i / kOfTurn], 0);
    const int vector = own_rank / kSharing * kCount + i;
    if constexpr (Tile::kSharesCols) {  // as join() does, a warpgroup stores every second eight rows
      if (i % 2 != thread_index() / kWarpgroup) continue;
      const int lane = thread_index() % kWarpgroup;
      const Four first = sum_of(lane, i), second = sum_of(lane + kWarpgroup, i);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float of_row[] = {first.at[row], first.at[2 + row], second.at[row], second.at[2 + row]};
        result.store(vector / 2 * 2 + row, of_row);
      }
    } else if (share == own_rank % kSharing) {
      result.store(vector, sum_of(thread_index(), i).at);
    }
  }
}

}  // namespace qlora_native::QLN_CUDA
