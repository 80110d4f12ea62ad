// The blocks of a cluster, on compute capability 9.0: their barrier, and the shared memory that they read of each
// other. The barriers of a cluster divide time into intervals. The rules:
//
//   - All threads of all blocks come to each barrier. (PTX lets a thread end instead, which our kernels never do.)
//   - A word of another block's shared memory may be read if store_shared() has stored it in an earlier interval, and a
//     barrier since then shows stores. So a read that comes too early ends the process under every schedule, whatever
//     is in memory by then.
//   - Nothing may be stored in a word in an interval in which another block reads it, and a block must not end in one.
#include "simt/block.h"

namespace qlora_native::cuda_emulated::emulator {
namespace {

Cluster& cluster_of_current() {
  if (current->block->cluster == nullptr)
    fail("a cluster's instruction in a kernel that was launched without clusters");
  return *current->block->cluster;
}

[[noreturn]] void fail_of_missing_thread() {
  fail("a thread has ended, and others of its cluster wait for it at a barrier of the cluster");
}

}  // namespace

void cluster_barrier(bool shows_stores, Site site) {
  Fiber& self = *current;
  Cluster& cluster = cluster_of_current();
  if (cluster.ended_threads > 0) fail_of_missing_thread();
  if (cluster.at_barrier.empty()) cluster.shows_stores = true;
  cluster.shows_stores &= shows_stores;
  cluster.at_barrier.push_back(&self);
  if (cluster.at_barrier.size() < cluster.blocks.size() * self.block->fibers.size()) {
    return suspend(self, Fiber::State::at_rendezvous, site);
  }
  for (Fiber* fiber : cluster.at_barrier) {
    fiber->state = Fiber::State::ready;
    if (cluster.shows_stores) fiber->stores.move_to(fiber->block->stores);
  }
  cluster.at_barrier.clear();
  ++cluster.interval;
  if (cluster.shows_stores) cluster.first_unseen = cluster.interval;
}

const std::byte* memory_of_block(const void* own, std::size_t bytes, int rank) {
  const Cluster& cluster = cluster_of_current();
  const Block& self = *current->block;
  if (rank < 0 || static_cast<std::size_t>(rank) >= cluster.blocks.size()) {
    fail("reads shared memory of block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(cluster.blocks.size()));
  }
  if (!self.memory->holds(own, bytes)) fail("reads beyond the shared memory of another block");
  const Block* const other = cluster.blocks[static_cast<std::size_t>(rank)];
  if (other == nullptr) fail("reads shared memory of a block of its cluster that has ended");
  const std::byte* const from = other->smem + (static_cast<const std::byte*>(own) - self.smem);
  if (other != &self) other->memory->note_read_in(cluster.interval, cluster.first_unseen, from, bytes, rank);
  return from;
}

void end_thread_of_cluster(Block& block) {
  Cluster& cluster = *block.cluster;
  if (!cluster.at_barrier.empty()) fail_of_missing_thread();
  ++cluster.ended_threads;
  if (block.unfinished > 0) return;
  if (block.memory->was_read_in(cluster.interval)) {
    fail("a block has ended, and another one of its cluster may still read its shared memory");
  }
  cluster.blocks[static_cast<std::size_t>(block.rank())] = nullptr;
}

}  // namespace qlora_native::cuda_emulated::emulator
