// How the threads of a block wait for each other: at its barrier, as a warp, as a warpgroup, at numbered barriers and
// at mbarriers. Tiles by TMA and products by wgmma are issued here, too.
#include <memory>

#include "emulator/block.h"

namespace qlora_native::cuda_emulated::emulator {

void barrier(Site site) { suspend(*current, Fiber::State::at_barrier, site); }

void warp_collective(void* lane, void (*exchange)(void* const* lanes), Site site) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  if (warp.arrived == 0) warp.site = site;
  if (!(warp.site == site)) {
    fail("lanes of a warp meet at different calls: " + text(warp.site) + " and " + text(site));
  }
  warp.lanes[self.position.thread % kWarp] = lane;
  if (++warp.arrived < kWarp) return suspend(self, Fiber::State::at_rendezvous, site);
  exchange(warp.lanes);
  warp.arrived = 0;
  const int first = self.position.thread / kWarp * kWarp;
  for (int i = first; i < first + kWarp; ++i) {
    self.block->fibers[static_cast<std::size_t>(i)].state = Fiber::State::ready;
  }
}

namespace {

// The last thread to arrive runs `exchange` on the operands of all threads; then all of them continue.
void arrive_at(Rendezvous& rendezvous, int threads, void* lane, std::size_t place, void (*exchange)(void* const* lanes),
               Site site) {
  Fiber& self = *current;
  if (rendezvous.fibers.empty()) {
    rendezvous.site = site;
    rendezvous.threads = threads;
    rendezvous.lanes.assign(static_cast<std::size_t>(threads), nullptr);
  }
  if (rendezvous.threads != threads) fail("threads meet at one barrier and expect other numbers of threads");
  rendezvous.fibers.push_back(&self);
  if (exchange != nullptr) {
    if (!(rendezvous.site == site)) {
      fail("threads of a warpgroup meet at different calls: " + text(rendezvous.site) + " and " + text(site));
    }
    rendezvous.lanes[place] = lane;
  }
  if (rendezvous.fibers.size() < static_cast<std::size_t>(threads)) {
    return suspend(self, Fiber::State::at_rendezvous, site);
  }
  if (exchange != nullptr) exchange(rendezvous.lanes.data());
  for (Fiber* fiber : rendezvous.fibers) {
    fiber->state = Fiber::State::ready;
    fiber->stores.move_to(self.block->stores);
  }
  rendezvous.fibers.clear();
}

// All lanes of a warp execute an instruction that PTX calls .aligned, at one place; bar.sync is one of them.
void meet_aligned(Site site) {
  int nothing = 0;
  warp_collective(&nothing, [](void* const*) {}, site);
}

}  // namespace

void named_barrier(int number, int threads, Site site) {
  if (number < 0 || number >= kNamedBarriers || threads % kWarp != 0) fail("a barrier that the device does not have");
  meet_aligned(site);
  arrive_at(current->block->named_barriers[number], threads, nullptr, 0, nullptr, site);
}

void warpgroup_collective(void* lane, void (*exchange)(void* const* lanes), Site site) {
  const int thread = current->position.thread;
  Rendezvous& rendezvous = current->block->warpgroups[static_cast<std::size_t>(thread / kWarpgroup)];
  arrive_at(rendezvous, kWarpgroup, lane, static_cast<std::size_t>(thread % kWarpgroup), exchange, site);
}

std::uint32_t shared_address(const void* p) { return current->block->memory->address_of(p); }
void note_shared_store(const void* p, std::size_t bytes) {
  current->block->memory->note_store(p, bytes, current->position.thread);
}
void publish_shared_stores() { current->block->memory->publish_stores(current->position.thread); }

void mbarrier_init(std::uint64_t* barrier, int arrivals) {
  if (!current->block->memory->holds(barrier, sizeof(*barrier))) fail("an mbarrier outside of shared memory");
  Block& block = *current->block;
  block.mbarriers.init(barrier, arrivals, current->position.thread, block.barriers_passed);
}
void mbarrier_publish() {
  Block& block = *current->block;
  block.mbarriers.publish(current->position.thread, block.cluster == nullptr ? 0 : block.cluster->interval);
}
namespace {

Mbarriers& mbarriers_to_use(std::uint64_t* barrier) {
  Block& block = *current->block;
  block.mbarriers.check_initialized(barrier, current->position.thread, block.barriers_passed);
  return block.mbarriers;
}

}  // namespace

void mbarrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes) {
  mbarriers_to_use(barrier).arrive(barrier, expected_bytes, current->position.thread);
}
void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity, bool in_cluster, Site site) {
  Fiber& self = *current;
  self.phase = mbarriers_to_use(barrier).begin_wait(barrier, parity, self.position.thread);
  if (!in_cluster) self.block->mbarriers.note_wait_in_block(barrier);
  if (self.block->mbarriers.is_complete(barrier, self.phase)) return;
  self.mbarrier = barrier;
  suspend(self, Fiber::State::at_mbarrier, site);
}

void load_tile(void* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier) {
  current->block->load_tile(static_cast<std::byte*>(to), source, row, col, barrier);
}

std::shared_ptr<WgmmaProduct> begin_wgmma(WgmmaProduct::ToF32 to_f32, int cols, std::uint64_t b_descriptor) {
  return std::make_shared<WgmmaProduct>(*current->block->memory, to_f32, cols, b_descriptor);
}
void compute_if_early(WgmmaProduct& product) {
  if (schedule.is_early()) product.compute();
}
WgmmaQueue& wgmma_queue() { return current->wgmma; }

void set_max_registers(int count, Site site) {
  constexpr int kMin = 24, kMax = 256, kUnit = 8, kRegisters = 64 * 1024;
  meet_aligned(site);
  Block& block = *current->block;
  if (count < kMin || count > kMax || count % kUnit != 0) fail("setmaxnreg of " + std::to_string(count));
  block.max_registers[static_cast<std::size_t>(current->position.thread / kWarp)] = count;
  int sum = 0;
  for (const int registers : block.max_registers) sum += registers * kWarp;
  if (sum > kRegisters) fail("setmaxnreg: the block's threads want " + std::to_string(sum) + " registers");
}

}  // namespace qlora_native::cuda_emulated::emulator
