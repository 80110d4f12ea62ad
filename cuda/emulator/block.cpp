#include "emulator/block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace qlora_native::cuda_emulated::emulator {
namespace {

// The shared memory of odd blocks begins at a multiple of 64 KB, as on sm_80, and that of even blocks 1 KB behind one,
// as on sm_90: a kernel must work with either. The blocks of a cluster have the same addresses.
constexpr std::size_t kSmemBoundary = 64 * 1024;
std::size_t smem_begin(const Block& block) {
  return block.index / block.grid().cluster % 2 == 0 ? kReservedSmemBytes : 0;
}

// A host thread keeps its stacks for the next launch. The page below each stack is a guard.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    for (std::byte* stack : free_) munmap(stack - guard(), guard() + kStackBytes);
  }
  std::byte* acquire() {
    if (free_.empty()) {
      void* memory = mmap(nullptr, guard() + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, guard(), PROT_NONE);
      return static_cast<std::byte*>(memory) + guard();
    }
    std::byte* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void release(std::byte* stack) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, kStackBytes);  // a fiber ends without returning from its frames
#endif
    free_.push_back(stack);
  }

 private:
  static std::size_t guard() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
  std::vector<std::byte*> free_;
};
thread_local Stacks stacks;

}  // namespace

Block::Block(GridRun& run, std::int64_t index, std::shared_ptr<Cluster> its_cluster)
    : run(run),
      index(index),
      cluster(std::move(its_cluster)),
      fibers(static_cast<std::size_t>(grid().threads)),
      warps(static_cast<std::size_t>(grid().threads / kWarp)),
      order(static_cast<std::size_t>(grid().threads)),
      next(order.size()),
      unfinished(grid().threads) {
  // The memory is exactly as large as requested, so that AddressSanitizer reports the first byte beyond it. Every
  // float in it is NaN.
  void* memory = nullptr;
  const std::size_t begin = smem_begin(*this);
  if (posix_memalign(&memory, kSmemBoundary, begin + grid().smem_bytes) != 0) throw std::bad_alloc();
  smem = static_cast<std::byte*>(memory) + begin;
  std::memset(smem, 0xFF, grid().smem_bytes);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, begin);
#endif
  this->memory = std::make_unique<SharedMemory>(smem, grid().smem_bytes, static_cast<std::uint32_t>(begin));
  tile_copies = std::make_unique<TileCopies>(*this->memory, mbarriers);
  async_stores = std::make_unique<AsyncStores>(*this->memory, mbarriers);
  if (cluster != nullptr) cluster->blocks[static_cast<std::size_t>(rank())] = this;
  warpgroups.resize(static_cast<std::size_t>(grid().threads + kWarpgroup - 1) / kWarpgroup);
  max_registers.resize(warps.size());
  std::iota(order.begin(), order.end(), 0);
  for (int thread = 0; thread < grid().threads; ++thread) {
    Fiber& fiber = fibers[static_cast<std::size_t>(thread)];
    fiber.position = {thread, grid().threads, index, grid().blocks, smem, grid().smem_bytes};
    fiber.block = this;
    fiber.warp = &warps[static_cast<std::size_t>(thread / kWarp)];
    fiber.stack = stacks.acquire();
    fiber.context = Context(fiber.stack, kStackBytes, main_of_fiber);
  }
}

Block::~Block() {
  for (Fiber& fiber : fibers) stacks.release(fiber.stack);
  std::byte* const memory = smem - smem_begin(*this);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, smem_begin(*this));
#endif
  std::free(memory);
}

void Block::main_of_fiber() {
  Fiber& self = *current;
  Context::arrived(self.context, self.block->scheduler);
  self.block->grid().thread();
  if (!self.wgmma.empty()) fail("a thread has ended before the wait for its wgmma");
  self.state = Fiber::State::done;
  if (--self.block->unfinished == 0) {
    if (self.block->tile_copies->in_flight() > 0) fail("a block has ended before a tile that TMA loads was there");
    if (self.block->async_stores->in_flight() > 0) fail("a block has ended before a vector of its cluster was there");
  }
  if (self.block->cluster != nullptr) end_thread_of_cluster(*self.block);
  self.context.switch_to(self.block->scheduler, /*last=*/true);
  __builtin_unreachable();
}

void Block::release_barrier() {
  const Fiber* first = nullptr;
  for (const Fiber& fiber : fibers) {
    if (fiber.state != Fiber::State::at_barrier) return;
    if (first == nullptr) first = &fiber;
    if (!(fiber.site == first->site)) {
      fail("threads of a block wait at different barriers: " + text(first->site) + " and " + text(fiber.site));
    }
  }
  for (Fiber& fiber : fibers) {
    fiber.state = Fiber::State::ready;
    fiber.stores.move_to(stores);
  }
  ++barriers_passed;
}

void Block::hold_back_some_warps() {
  constexpr std::size_t kRounds = 8;  // on average
  if (!schedule.is_random() || schedule.random_below(kRounds) != 0) return;
  for (Warp& warp : warps) warp.is_held_back = schedule.coin();
}

bool Block::let_all_warps_run() {
  bool any = false;
  for (Warp& warp : warps) any |= std::exchange(warp.is_held_back, false);
  return any;
}

void Block::finish_some_copies() {
  constexpr std::size_t kRounds = 4;  // on average
  for (std::size_t i = tile_copies->in_flight(); schedule.is_random() && i-- > 0;) {
    if (schedule.random_below(kRounds) == 0) tile_copies->finish(i);
  }
  for (std::size_t i = async_stores->in_flight(); schedule.is_random() && i-- > 0;) {
    if (schedule.random_below(kRounds) == 0) async_stores->finish(i);
  }
}

bool Block::finish_a_copy() {
  const std::size_t count = tile_copies->in_flight();
  if (count > 0) tile_copies->finish(schedule.is_random() ? schedule.random_below(count) : 0);
  const bool any = count > 0 || async_stores->in_flight() > 0;
  while (async_stores->in_flight() > 0)
    async_stores->finish(async_stores->in_flight() - 1);  // all, because they are many
  return any;
}

void Block::load_tile(std::byte* to, const TileSource& source, std::int64_t row, std::int64_t col,
                      std::uint64_t* barrier) {
  tile_copies->begin(to, source, row, col, barrier);
  if (schedule.is_early()) tile_copies->finish(tile_copies->in_flight() - 1);
}

void Block::store_vector(std::byte* to, const std::byte* value, std::uint64_t* barrier) {
  async_stores->begin(to, value, barrier);
  if (schedule.is_early()) async_stores->finish(async_stores->in_flight() - 1);
}

bool Block::advance(std::int64_t steps) {
  // `ran` says whether a fiber ran in this round. It begins true, because the rest of a round that an earlier call has
  // begun cannot show that no fiber can run.
  bool any = false, ran = true;
  while (steps > 0) {
    if (next == order.size()) {
      release_barrier();
      if (!ran && !let_all_warps_run() && !finish_a_copy()) break;
      finish_some_copies();
      ran = false;
      schedule.arrange(order);
      hold_back_some_warps();
      next = 0;
    }
    Fiber& fiber = fibers[static_cast<std::size_t>(order[next++])];
    if (fiber.state == Fiber::State::waiting && *fiber.flag == fiber.value) fiber.state = Fiber::State::ready;
    if (fiber.state == Fiber::State::at_mbarrier && mbarriers.is_complete(fiber.mbarrier, fiber.phase)) {
      fiber.state = Fiber::State::ready;
    }
    if (fiber.state != Fiber::State::ready || fiber.warp->is_held_back) continue;
    ran = any = true;
    --steps;
    current = &fiber;
    position = &fiber.position;
    scheduler.switch_to(fiber.context);
    current = nullptr;
  }
  return any;
}

std::string Block::describe_waits() const {
  std::string all;
  for (const Fiber& fiber : fibers) {
    const char* what = fiber.state == Fiber::State::at_barrier      ? "at the barrier "
                       : fiber.state == Fiber::State::at_rendezvous ? "for its warp, its warpgroup or others at "
                       : fiber.state == Fiber::State::at_mbarrier   ? "for an mbarrier at "
                       : fiber.state == Fiber::State::waiting       ? "for another block at "
                                                                    : nullptr;
    const std::string line = what == nullptr ? "has ended" : "waits " + (what + text(fiber.site));
    // Adjacent threads that wait for the same share one line.
    if (all.size() >= line.size() && all.compare(all.size() - line.size(), line.size(), line) == 0) continue;
    all += "\n  thread " + std::to_string(fiber.position.thread) + " and on of block " + std::to_string(index) + " " +
           line;
  }
  return all;
}

}  // namespace qlora_native::cuda_emulated::emulator
