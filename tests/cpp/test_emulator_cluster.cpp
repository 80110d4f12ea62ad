// Guards the emulator of clusters (cuda/emulator/cluster.cpp): their blocks meet, store into each other's shared
// memory, load tiles into it and arrive at its barriers under each order of threads and blocks, and planted mistakes
// are found under every one. A kernel that must end the process runs in a child, whose message is read.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <set>
#include <string>
#include <vector>

#include "death_message.h"
#include "device/hopper.cuh"
#include "emulator.h"
#include "expect.h"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

using Vec4 = Vector<float, 4>;

// ---- vectors for other blocks ----

// Each thread stores a vector into every block of its cluster. Then each thread adds those that it has received, in the
// order of ranks. These mistakes can be planted:
enum class Mistake {
  none,
  no_barrier_before_stores,
  relaxed_barrier_before_stores,
  not_published,
  no_wait,
  wait_in_the_scope_of_the_block,
  more_bytes_are_expected,
  half_is_not_stored,
  threads_end_before_a_barrier,
  rank_of_another_cluster,
  beyond_the_memory,
  misaligned,
};
constexpr int kThreads = 2 * kWarp, kMaxBlocks = 8;
struct ReduceShared {
  Vec4 vectors[kMaxBlocks][kThreads];
  std::uint64_t arrived;
};

Vec4 vector_of(std::int64_t block, int thread) {
  const auto first = static_cast<float>(block * kThreads + thread);
  return {{first, 2 * first, 3 * first, 4 * first}};
}

template <Mistake kMistake>
__global__ void cluster_reduce_kernel(int cluster, float* out) {
  auto& shared = *dynamic_smem<ReduceShared>();
  const int thread = thread_index(), block_rank = static_cast<int>(block_index() % cluster);
  if (thread == 0) {
    mbarrier_init(&shared.arrived, 1);
    if constexpr (kMistake != Mistake::not_published) fence_mbarrier_init();
  }
  sync_threads();
  if (kMistake == Mistake::threads_end_before_a_barrier && thread >= kWarp) return;
  if constexpr (kMistake == Mistake::relaxed_barrier_before_stores) {
    sync_cluster_relaxed();
  } else if constexpr (kMistake != Mistake::no_barrier_before_stores) {
    sync_cluster();
  }
  if (thread == 0) {
    const std::size_t bytes = static_cast<std::size_t>(cluster) * kThreads * sizeof(Vec4);
    mbarrier_arrive_expect(&shared.arrived,
                           static_cast<std::uint32_t>(bytes + (kMistake == Mistake::more_bytes_are_expected ? 16 : 0)));
  }
  const SharedAddress local(&shared.vectors[block_rank][thread]);
  const SharedAddress to = kMistake == Mistake::beyond_the_memory ? local.at(sizeof(ReduceShared))
                           : kMistake == Mistake::misaligned      ? local.at(4)
                                                                  : local;
  for (int rank = 0; rank < cluster; ++rank) {
    if (kMistake == Mistake::half_is_not_stored && thread >= kWarp) continue;
    store_async(to, vector_of(block_index(), thread), &shared.arrived,
                rank + (kMistake == Mistake::rank_of_another_cluster ? 1 : 0));
  }
  if constexpr (kMistake == Mistake::wait_in_the_scope_of_the_block) {
    mbarrier_wait(&shared.arrived, 0);
  } else if constexpr (kMistake != Mistake::no_wait) {
    mbarrier_wait_in_cluster(&shared.arrived, 0);
  }
  Vec4 sum = {};
  for (int rank = 0; rank < cluster; ++rank)
    for (int i = 0; i < 4; ++i) sum.at[i] += shared.vectors[rank][thread].at[i];
  store_vector<float, 4>(out + (block_index() * kThreads + thread) * 4, sum);
}

// What the process says when it ends, "wrong" if a sum is wrong, or nothing.
template <Mistake kMistake>
std::string message_of_reduce(int blocks, int cluster) {
  Managed<float> out(static_cast<std::size_t>(blocks) * kThreads * 4);
  return death_message([&] {
    launch<cluster_reduce_kernel<kMistake>>({blocks, kThreads, sizeof(ReduceShared), cluster}, {}, cluster, out.data());
    for (int i = 0; i < blocks * kThreads; ++i) {
      Vec4 expected = {};
      for (int rank = 0; rank < cluster; ++rank) {
        const Vec4 vector = vector_of(i / kThreads / cluster * cluster + rank, i % kThreads);
        for (int j = 0; j < 4; ++j) expected.at[j] += vector.at[j];
      }
      if (std::equal(expected.at, expected.at + 4, &out[static_cast<std::size_t>(i) * 4])) continue;
      std::fprintf(stderr, "wrong");
      _exit(1);
    }
  });
}

TEST(blocks_add_what_their_cluster_has_stored) {
  for (const int cluster : {2, 4, 8}) {
    under_each_schedule(
        [&] { EXPECT(message_of_reduce<Mistake::none>(24, cluster).empty()); });  // more than run at once
  }
}

// Whether the process ends with one of the messages under every schedule: which shows first may depend on it.
template <class Run>
bool is_found(const Run& message_of_mistake, std::initializer_list<const char*> messages) {
  bool always = true;
  under_each_schedule([&] {
    const std::string message = message_of_mistake();
    bool is_known = false;
    for (const char* expected : messages) is_known = is_known || contains(message, expected);
    if (!is_known) std::printf("under %s: %s\n", std::getenv("QLN_SCHEDULE"), message.c_str());
    always = always && is_known;
  });
  return always;
}
template <Mistake kMistake>
bool is_found_in_reduce(std::initializer_list<const char*> messages) {
  return is_found([] { return message_of_reduce<kMistake>(8, 4); }, messages);
}

TEST(mistakes_between_blocks_of_a_cluster_are_found_under_each_schedule) {
  constexpr const char *kDeadlock = "waits for an mbarrier at", *kEnded = "stores into a block of its cluster that has";
  EXPECT(is_found_in_reduce<Mistake::no_barrier_before_stores>(
      {"no barrier of the cluster has completed since it was published", "was not initialized", kEnded}));
  EXPECT(is_found_in_reduce<Mistake::relaxed_barrier_before_stores>({"the cluster's last barrier was relaxed"}));
  EXPECT(is_found_in_reduce<Mistake::wait_in_the_scope_of_the_block>({"waits in the scope of its block"}));
  EXPECT(is_found_in_reduce<Mistake::not_published>({"initialization was not published"}));
  EXPECT(is_found_in_reduce<Mistake::no_wait>({"ended before a vector of its cluster was there", kEnded, "wrong"}));
  EXPECT(is_found_in_reduce<Mistake::more_bytes_are_expected>({kDeadlock}));
  EXPECT(is_found_in_reduce<Mistake::half_is_not_stored>({kDeadlock}));
  EXPECT(is_found_in_reduce<Mistake::threads_end_before_a_barrier>(
      {"a thread has ended, and others of its cluster wait for it"}));
  EXPECT(is_found_in_reduce<Mistake::rank_of_another_cluster>({"stores into block 4 of a cluster of 4"}));
  EXPECT(is_found_in_reduce<Mistake::beyond_the_memory>({"stores beyond the shared memory of a block"}));
  EXPECT(is_found_in_reduce<Mistake::misaligned>({"a misaligned store into a block"}));
}

// ---- tiles for several blocks, and arrivals at other blocks ----

// Each of two blocks copies a matrix of kTileRows rows through a ring of stages that its first thread fills: each block
// loads half of the rows for both blocks, by multicast. Two other warps read one half each. These mistakes can be
// planted:
enum class PairMistake {
  none,
  peer_is_not_waited_for,
  one_arrival_too_few,
  one_arrival_too_many,
  half_is_for_one_block,
  half_of_the_bytes_is_expected,
  both_load_the_same_half,
  no_barrier_before_use,
  not_published,
  no_wait_at_the_end,
  tile_for_another_cluster,
  tile_for_no_block,
  arrival_at_another_cluster,
};
constexpr int kTileRows = 16, kTileCols = 64, kSteps = 7, kStages = 2, kReaders = 2;
constexpr int kTileBytes = kTileRows * kTileCols;
struct PairShared {
  std::uint8_t tiles[kStages][kTileRows][kTileCols];
  std::uint64_t full[kStages], empty[kStages];
};

template <PairMistake kMistake>
__global__ void pair_kernel(const __grid_constant__ TensorMap map, std::uint8_t* out) {
  constexpr bool kPeerReads = kMistake != PairMistake::peer_is_not_waited_for;
  constexpr int kHalf = kTileRows / 2;
  auto& shared = *dynamic_smem<PairShared>();
  const int thread = thread_index(), reader = thread / kWarp - 1, rank = static_cast<int>(block_index() % 2);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kReaders * (kPeerReads ? 2 : 1));
    }
    if constexpr (kMistake != PairMistake::not_published) fence_mbarrier_init();
  }
  sync_threads();
  if constexpr (kMistake != PairMistake::no_barrier_before_use) sync_cluster_relaxed();
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const auto parity = static_cast<std::uint32_t>(step / kStages % 2);
    if (thread == 0) {
      const int row = kMistake == PairMistake::both_load_the_same_half ? 0 : rank * kHalf;
      const int ranks = kMistake == PairMistake::half_is_for_one_block      ? 1 << rank
                        : kMistake == PairMistake::tile_for_another_cluster ? 7
                        : kMistake == PairMistake::tile_for_no_block        ? 0
                                                                            : 3;
      mbarrier_wait(&shared.empty[stage], parity ^ 1);
      mbarrier_arrive_expect(&shared.full[stage],
                             kTileBytes / (kMistake == PairMistake::half_of_the_bytes_is_expected ? 2 : 1));
      tma_load_tile_multicast(shared.tiles[stage][row], map, row, step * kTileCols, &shared.full[stage],
                              static_cast<std::uint16_t>(ranks));
    }
    if (reader < 0) continue;
    mbarrier_wait(&shared.full[stage], parity);
    for (int i = thread % kWarp; i < kHalf * kTileCols; i += kWarp) {
      const int row = reader * kHalf + i / kTileCols, col = i % kTileCols;
      out[(block_index() * kTileRows + row) * kSteps * kTileCols + step * kTileCols + col] =
          shared.tiles[stage][row][col];
    }
    sync_warp();
    if (thread % kWarp == 0) mbarrier_arrive(&shared.empty[stage]);
    const int peer = kMistake == PairMistake::arrival_at_another_cluster ? 2 : 1 - rank;
    const bool arrives = kPeerReads && (kMistake != PairMistake::one_arrival_too_few || reader == 0);
    const ClusterMbarriers empty_of_peer(shared.empty, peer);
    if (thread % kWarp == 1 && arrives) empty_of_peer.arrive(stage);
    if (kMistake == PairMistake::one_arrival_too_many && thread % kWarp == 2) empty_of_peer.arrive(stage);
  }
  for (int step = kSteps; step < kSteps + kStages && thread == 0; ++step) {
    if (kMistake == PairMistake::no_wait_at_the_end) break;
    mbarrier_wait(&shared.empty[step % kStages], static_cast<std::uint32_t>(step / kStages % 2) ^ 1);
  }
}

// What the process says when it ends, "wrong" if a copy is wrong, or nothing.
template <PairMistake kMistake>
std::string message_of_pairs() {
  constexpr int kCols = kSteps * kTileCols, kBlocks = 4;
  Managed<std::uint8_t> matrix(kTileRows * kCols), out(kBlocks * kTileRows * kCols);
  for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<std::uint8_t>(i % 251 + 1);
  const TileSource source = {.name = "x",
                             .data = matrix.data(),
                             .element_bytes = 1,
                             .rows = kTileRows,
                             .cols = kCols,
                             .stride_bytes = kCols,
                             .box_rows = kTileRows / 2,
                             .box_cols = kTileCols,
                             .swizzle = Swizzle::none};
  return death_message([&] {
    launch<pair_kernel<kMistake>>({kBlocks, (1 + kReaders) * kWarp, sizeof(PairShared), 2}, {}, TensorMap(source),
                                  out.data());
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (out[i] == matrix[i % matrix.size()]) continue;
      std::fprintf(stderr, "wrong");
      _exit(1);
    }
  });
}

template <PairMistake kMistake>
bool is_found_in_pairs(std::initializer_list<const char*> messages) {
  return is_found(message_of_pairs<kMistake>, messages);
}

TEST(both_blocks_of_a_pair_receive_tiles_under_each_schedule) {
  under_each_schedule([] { EXPECT(message_of_pairs<PairMistake::none>().empty()); });
}

TEST(mistakes_between_pairs_are_found_under_each_schedule) {
  constexpr const char *kDeadlock = "waits for an mbarrier at", *kTooMany = "more arrivals in a phase";
  constexpr const char *kOverwritten = "where another tile is still in flight", *kWrong = "wrong";
  EXPECT(is_found_in_pairs<PairMistake::peer_is_not_waited_for>({kOverwritten, kTooMany, kDeadlock, kWrong}));
  EXPECT(is_found_in_pairs<PairMistake::one_arrival_too_few>({kDeadlock}));
  EXPECT(is_found_in_pairs<PairMistake::one_arrival_too_many>(
      {kTooMany, kOverwritten, "arrives twice in a phase", "has missed a phase"}));
  EXPECT(is_found_in_pairs<PairMistake::half_is_for_one_block>({kDeadlock}));
  EXPECT(is_found_in_pairs<PairMistake::half_of_the_bytes_is_expected>({kOverwritten, kTooMany, kDeadlock, kWrong}));
  EXPECT(is_found_in_pairs<PairMistake::both_load_the_same_half>({kOverwritten, kWrong}));
  EXPECT(is_found_in_pairs<PairMistake::no_barrier_before_use>(
      {"no barrier of the cluster has completed since it was published", "was not initialized"}));
  EXPECT(is_found_in_pairs<PairMistake::not_published>({"initialization was not published"}));
  EXPECT(is_found_in_pairs<PairMistake::no_wait_at_the_end>(
      {"has not waited for all arrivals of other blocks",
       "arrives at an mbarrier of a block of its cluster that has ended"}));
  EXPECT(is_found_in_pairs<PairMistake::tile_for_another_cluster>({"loads a tile into block 2 of a cluster of 2"}));
  EXPECT(is_found_in_pairs<PairMistake::tile_for_no_block>({"loads a tile into no block"}));
  EXPECT(is_found_in_pairs<PairMistake::arrival_at_another_cluster>({"an mbarrier of block 2 of a cluster of 2"}));
}

// ---- launches ----

__global__ void alone_kernel() { sync_cluster(); }

TEST(launches_have_whole_clusters) {
  EXPECT(contains(message_of_reduce<Mistake::none>(6, 4), "6 blocks in clusters of 4"));
  EXPECT(contains(message_of_reduce<Mistake::none>(32, 16), "32 blocks in clusters of 16"));
  EXPECT(contains(message_of_reduce<Mistake::none>(4, 0), "4 blocks in clusters of 0"));
  EXPECT(contains(death_message([] { launch<alone_kernel>({2, kWarp}, {}); }), "launched without clusters"));
}

// Writes the order in which the blocks arrive at their barrier, and where their shared memory begins.
__global__ void order_kernel(std::uint32_t* ticket, int* order, std::uint32_t* begin) {
  if (thread_index() == 0) {
    order[take_ticket(ticket)] = static_cast<int>(block_index());
    begin[block_index()] = shared_address(dynamic_smem<std::byte>());
  }
  sync_cluster();
}

TEST(blocks_of_a_cluster_run_in_several_orders_and_have_the_same_addresses) {
  std::set<std::vector<int>> orders;
  under_each_schedule([&] {
    Managed<std::uint32_t> ticket(1), begin(8);
    Managed<int> order(8);
    launch<order_kernel>({8, kWarp, 64, 4}, {}, ticket.data(), order.data(), begin.data());
    for (std::size_t i = 0; i < 8; ++i) EXPECT(begin[i] == begin[i / 4 * 4]);
    EXPECT(begin[0] != begin[4]);
    orders.emplace(order.begin(), order.end());
  });
  EXPECT(orders.size() >= 6);
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() {
  qlora_native::cuda_emulated::bind_context({});  // for maps of tiles
  return run_tests();
}
