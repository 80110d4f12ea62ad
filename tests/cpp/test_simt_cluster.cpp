// Guards the emulator of clusters (cuda/simt/cluster.cpp): their blocks meet and read each other's shared memory under
// each order of threads and blocks, and planted mistakes are found under every one. A kernel that must end the process
// runs in a child, whose message is read.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "death_message.h"
#include "expect.h"
#include "simt/hopper.cuh"

namespace qlora_native::cuda_emulated {
namespace {

template <class T>
using Managed = std::vector<T, emulator::ManagedAllocator<T>>;
using Four = Vector<float, 4>;

const std::vector<std::string> kSchedules = {"forward",  "reverse",      "random:1",     "random:2",
                                             "random:3", "concurrent:1", "concurrent:2", "concurrent:3"};
template <class F>
void under_each_schedule(const F& f) {
  for (const std::string& schedule : kSchedules) {
    setenv("QLN_SCHEDULE", schedule.c_str(), 1);
    f();
  }
  unsetenv("QLN_SCHEDULE");
}

// A block stores a vector for each thread. Then each thread adds those of all blocks of its cluster, by rank. These
// mistakes can be planted:
enum class Mistake {
  none,
  no_barrier_before_reads,
  relaxed_barrier_before_reads,
  no_barrier_after_reads,
  stored_again_after_reads,
  plain_stores,
  half_is_not_stored,
  threads_end_before_a_barrier,
  threads_miss_a_barrier,
  rank_of_another_cluster,
  beyond_the_memory,
  misaligned,
};
constexpr int kThreads = 2 * kWarp;
constexpr std::size_t kBytes = kThreads * sizeof(Four);

template <Mistake kMistake>
__global__ void sums_kernel(int cluster, float* out) {
  const int thread = thread_index();
  const auto first = static_cast<float>(block_index() * kThreads + thread);
  const SharedAddress own = SharedAddress(dynamic_smem<std::byte>()).at(static_cast<std::uint32_t>(thread) * 16);
  const Four stored = {{first, 2 * first, 3 * first, 4 * first}};
  if constexpr (kMistake == Mistake::plain_stores) {
    store_vector<float, 4>(dynamic_smem<float>() + 4 * thread, stored);
  } else if (kMistake != Mistake::half_is_not_stored || thread < kWarp) {
    store_shared(own, stored);
  }
  if (kMistake == Mistake::threads_end_before_a_barrier && thread >= kWarp) return;
  if constexpr (kMistake == Mistake::relaxed_barrier_before_reads) {
    sync_cluster_relaxed();
  } else if constexpr (kMistake != Mistake::no_barrier_before_reads) {
    sync_cluster();
  }
  if (kMistake == Mistake::threads_miss_a_barrier && thread >= kWarp) return;
  Four sum = {};
  for (int rank = 0; rank < cluster; ++rank) {
    const int of = rank + (kMistake == Mistake::rank_of_another_cluster ? 1 : 0);
    const SharedAddress from = kMistake == Mistake::beyond_the_memory ? own.at(kBytes)
                               : kMistake == Mistake::misaligned      ? own.at(4)
                                                                      : own;
    const auto part = load_shared_of_block<Four>(from, of);
    for (int i = 0; i < 4; ++i) sum.at[i] += part.at[i];
  }
  if constexpr (kMistake == Mistake::stored_again_after_reads) store_shared(own, sum);
  if constexpr (kMistake != Mistake::no_barrier_after_reads) sync_cluster_relaxed();
  store_vector<float, 4>(out + (block_index() * kThreads + thread) * 4, sum);
}

template <Mistake kMistake>
Managed<float> sums(int blocks, int cluster) {
  Managed<float> out(static_cast<std::size_t>(blocks) * kThreads * 4);
  launch<sums_kernel<kMistake>>({blocks, kThreads, kBytes, cluster}, {}, cluster, out.data());
  return out;
}

void blocks_add_what_their_cluster_has_stored() {
  for (const int cluster : {2, 4, 8}) {
    const int blocks = 24;  // more than are resident at once
    Managed<float> expected(static_cast<std::size_t>(blocks) * kThreads * 4);
    for (int i = 0; i < blocks * kThreads; ++i) {
      for (int rank = 0; rank < cluster; ++rank) {
        const int block = i / kThreads / cluster * cluster + rank;
        for (int j = 0; j < 4; ++j) {
          expected[static_cast<std::size_t>(i * 4 + j)] +=
              static_cast<float>((block * kThreads + i % kThreads) * (j + 1));
        }
      }
    }
    under_each_schedule([&] { EXPECT(sums<Mistake::none>(blocks, cluster) == expected); });
  }
}

// What the process says when it ends, which must be so under every schedule.
template <Mistake kMistake>
bool is_found(const char* message) {
  bool always = true;
  under_each_schedule([&] {
    const std::string words = death_message([] { sums<kMistake>(8, 4); });
    always = always && contains(words, message);
  });
  return always;
}

void mistakes_between_blocks_of_a_cluster_are_found_under_each_schedule() {
  EXPECT(is_found<Mistake::no_barrier_before_reads>("of its cluster that was "));  // not stored, or just now
  EXPECT(is_found<Mistake::relaxed_barrier_before_reads>("after the last barrier of the cluster that shows stores"));
  EXPECT(is_found<Mistake::plain_stores>("that was not stored"));
  EXPECT(is_found<Mistake::half_is_not_stored>("that was not stored"));
  EXPECT(is_found<Mistake::threads_end_before_a_barrier>("a thread has ended, and others of its cluster wait for it"));
  EXPECT(is_found<Mistake::threads_miss_a_barrier>("a thread has ended, and others of its cluster wait for it"));
  EXPECT(is_found<Mistake::rank_of_another_cluster>("shared memory of block 4 of a cluster of 4"));
  EXPECT(is_found<Mistake::beyond_the_memory>("reads beyond the shared memory of another block"));
  EXPECT(is_found<Mistake::misaligned>("a misaligned load"));
}
// Which of two threads comes first, and so what the message is, depends on the schedule.
void memory_that_others_read_must_stay_until_the_next_barrier() {
  under_each_schedule([] {
    const std::string ended = death_message([] { sums<Mistake::no_barrier_after_reads>(8, 4); });
    EXPECT(contains(ended, "a block has ended, and another one of its cluster may still read") ||
           contains(ended, "of a block of its cluster that has ended"));
    const std::string stored = death_message([] { sums<Mistake::stored_again_after_reads>(8, 4); });
    EXPECT(contains(stored, "is overwritten, and another block of the cluster may still read it") ||
           contains(stored, "was stored after the last barrier of the cluster"));
  });
}

// ---- launches ----

__global__ void alone_kernel() { sync_cluster(); }

void launches_have_whole_clusters() {
  EXPECT(contains(death_message([] { sums<Mistake::none>(6, 4); }), "6 blocks in clusters of 4"));
  EXPECT(contains(death_message([] { sums<Mistake::none>(32, 16); }), "32 blocks in clusters of 16"));
  EXPECT(contains(death_message([] { sums<Mistake::none>(4, 0); }), "4 blocks in clusters of 0"));
  EXPECT(contains(death_message([] { launch<alone_kernel>({2, kWarp}, {}); }), "launched without clusters"));
}

// Writes the order in which the blocks come to their barrier, and where their shared memory begins.
__global__ void order_kernel(std::uint32_t* ticket, int* order, std::uint32_t* begin) {
  if (thread_index() == 0) {
    order[take_ticket(ticket)] = static_cast<int>(block_index());
    begin[block_index()] = shared_address(dynamic_smem<std::byte>());
  }
  sync_cluster();
}

void blocks_of_a_cluster_run_in_several_orders_and_have_the_same_addresses() {
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

int run_all() {
  blocks_add_what_their_cluster_has_stored();
  mistakes_between_blocks_of_a_cluster_are_found_under_each_schedule();
  memory_that_others_read_must_stay_until_the_next_barrier();
  launches_have_whole_clusters();
  blocks_of_a_cluster_run_in_several_orders_and_have_the_same_addresses();
  return report();
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() { return qlora_native::cuda_emulated::run_all(); }
