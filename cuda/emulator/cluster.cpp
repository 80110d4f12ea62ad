// The blocks of a cluster, on compute capability 9.0: their barrier, what they store and which tiles they load into the
// shared memory of each other, and the mbarriers there at which they arrive. The barriers of a cluster divide time into
// intervals. The rules:
//
//   - All threads of all blocks arrive at each barrier. (PTX lets a thread end instead, which our kernels never do.)
//   - What another block stores here is NaN until the schedule lets it arrive, and a block must not end before that.
//     The last barrier before must be a release, which orders what this block did with that memory, and threads must
//     wait for it in the scope of the cluster.
//   - A block may use an mbarrier of another block that was published in an earlier interval. The other block must wait
//     for each phase in which its mbarriers are used so, because it must not end before the arrivals there.
#include "emulator/block.h"

namespace qlora_native::cuda_emulated::emulator {
namespace {

Cluster& cluster_of_current() {
  if (current->block->cluster == nullptr)
    fail("a cluster's instruction in a kernel that was launched without clusters");
  return *current->block->cluster;
}

// A block of the cluster; `use` says what the running thread does with it.
Block& block_of_rank(int rank, const char* use) {
  const Cluster& cluster = cluster_of_current();
  if (rank < 0 || static_cast<std::size_t>(rank) >= cluster.blocks.size()) {
    fail(std::string(use) + " block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(cluster.blocks.size()));
  }
  Block* const block = cluster.blocks[static_cast<std::size_t>(rank)];
  if (block == nullptr) fail(std::string(use) + " a block of its cluster that has ended");
  return *block;
}

// The address in another block's shared memory that has the offset of `local` in the running thread's block.
template <class V>
V* address_in(const Block& block, V* local) {
  const auto* const smem = reinterpret_cast<const std::byte*>(current->block->smem);
  return reinterpret_cast<V*>(block.smem + (reinterpret_cast<const std::byte*>(local) - smem));
}

// The barrier of another block at which the running thread, or a copy that it issues, may arrive.
std::uint64_t* barrier_of(Block& block, std::uint64_t* local) {
  std::uint64_t* const barrier = address_in(block, local);
  block.mbarriers.check_published_before(block.cluster->interval, barrier);
  block.mbarriers.note_remote_arrivals(barrier);
  return barrier;
}

[[noreturn]] void report_missing_thread() {
  fail("a thread has ended, and others of its cluster wait for it at a barrier of the cluster");
}

}  // namespace

void cluster_barrier(bool releases, Site site) {
  Fiber& self = *current;
  Cluster& cluster = cluster_of_current();
  if (cluster.ended_threads > 0) report_missing_thread();
  cluster.at_barrier.push_back(&self);
  cluster.all_release = cluster.all_release && releases;
  if (cluster.at_barrier.size() < cluster.blocks.size() * self.block->fibers.size()) {
    return suspend(self, Fiber::State::at_rendezvous, site);
  }
  for (Fiber* fiber : cluster.at_barrier) {
    fiber->state = Fiber::State::ready;
    fiber->stores.move_to(fiber->block->stores);
  }
  for (Block* block : cluster.blocks) ++block->barriers_passed;
  cluster.at_barrier.clear();
  ++cluster.interval;
  cluster.is_released = cluster.all_release;
  cluster.all_release = true;
}

void store_async(void* local, const std::byte* value, std::uint64_t* barrier, int rank) {
  Block& block = block_of_rank(rank, "stores into");
  std::uint64_t* counted_at = barrier;
  if (&block != current->block) {
    counted_at = barrier_of(block, barrier);
    block.mbarriers.note_remote_stores(counted_at);
    if (!block.cluster->is_released) fail("stores into another block, and the cluster's last barrier was relaxed");
  }
  block.store_vector(address_in(block, static_cast<std::byte*>(local)), value, counted_at);
}

void load_tile_to_blocks(void* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier,
                         std::uint32_t ranks) {
  const Block& self = *current->block;
  if (ranks == 0) fail("TMA loads a tile into no block");
  for (int rank = 0; ranks >> rank != 0; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    Block& block = block_of_rank(rank, "TMA loads a tile into");
    block.load_tile(address_in(block, static_cast<std::byte*>(to)), source, row, col,
                    &block == &self ? barrier : barrier_of(block, barrier));
  }
}

void mbarrier_arrive_at_block(std::uint64_t* barrier, int rank) {
  constexpr int kMaxThreads = 1024;
  if (current->block->cluster == nullptr && rank == 0) return mbarrier_arrive(barrier, 0);  // a cluster of one
  Block& block = block_of_rank(rank, "arrives at an mbarrier of");
  const Block& self = *current->block;
  if (&block == &self) return mbarrier_arrive(barrier, 0);
  // Each thread of the cluster has a distinct number at the barrier.
  block.mbarriers.arrive(barrier_of(block, barrier), 0, (self.rank() + 1) * kMaxThreads + current->position.thread);
}

void end_thread_of_cluster(Block& block) {
  Cluster& cluster = *block.cluster;
  if (!cluster.at_barrier.empty()) report_missing_thread();
  ++cluster.ended_threads;
  if (block.unfinished > 0) return;
  if (!block.mbarriers.remote_arrivals_were_waited_for()) {
    fail("a block has ended, and has not waited for all arrivals of other blocks of its cluster at its mbarriers");
  }
  cluster.blocks[static_cast<std::size_t>(block.rank())] = nullptr;
}

}  // namespace qlora_native::cuda_emulated::emulator
