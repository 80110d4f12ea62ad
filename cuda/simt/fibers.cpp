#include "simt/fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <new>
#include <numeric>
#include <utility>

#include "simt/context.h"
#include "simt/store_buffer.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifdef QLN_SWITCH_IN_ASSEMBLY
asm(R"(
.text
.globl qln_switch_stack
.hidden qln_switch_stack
.type qln_switch_stack, @function
qln_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qln_switch_stack, .-qln_switch_stack
)");
#endif

namespace qlora_native::cuda_emulated::emulator {

thread_local const Position* position = nullptr;
constinit thread_local bool concurrent = false;

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kHopperSmemBytes = 227 * 1024;
// The shared memory of odd blocks begins at a multiple of 64 KB, as on sm_80, and that of even blocks 1 KB behind one,
// as on sm_90: a kernel must work with either.
constexpr std::size_t kSmemBoundary = 64 * 1024;
std::size_t smem_begin(std::int64_t block) { return block % 2 == 0 ? kReservedSmemBytes : 0; }
// The stack of a fiber. A kernel's locals are small, but AddressSanitizer's redzones around them are not.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

// So many blocks run at the same time under the schedule "concurrent"; a device may have room for more.
constexpr std::size_t kResidentBlocks = 6;
constexpr int kMostTurnsLog2 = 9;           // fibers of a block get at most 2^9 turns until another block may run
constexpr std::size_t kMostPublished = 32;  // fewer pieces of memory than this are published between two blocks' turns

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// A host thread keeps its stacks for the next launch. The page below each stack is a guard.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    for (std::byte* stack : free_) munmap(stack - guard(), guard() + kStackBytes);
  }
  std::byte* take() {
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
  void give_back(std::byte* stack) {
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

// Reads global memory as the running fiber sees it, with the stores that are still in its buffers.
void load_global(void* to, const void* from, std::size_t bytes);

struct Copy {
  void* to;
  const void* from;
  int bytes, zeros;
  void run() const {
    load_global(to, from, static_cast<std::size_t>(bytes));
    std::memset(static_cast<std::byte*>(to) + bytes, 0, static_cast<std::size_t>(zeros));
  }
};

struct Warp {
  int arrived = 0;
  Site site;
  void* lanes[kWarp];
  bool is_held_back = false;
};

// The threads that have come to a numbered barrier (bar.sync), or to a meeting of their warpgroup.
struct Rendezvous {
  std::vector<struct Fiber*> fibers;
  std::vector<void*> lanes;
  int threads = 0;
  Site site;
};
constexpr int kWarpgroup = 4 * kWarp;
constexpr int kNamedBarriers = 16;  // in a block

struct Block;

struct Fiber {
  enum class State { ready, at_barrier, at_rendezvous, waiting, at_mbarrier, done };
  Position position;
  Block* block;
  Warp* warp;
  Context context;
  std::byte* stack;
  State state = State::ready;
  Site site;
  const std::uint32_t* flag = nullptr;
  std::uint32_t value = 0;
  std::uint64_t* mbarrier = nullptr;
  std::int64_t phase = 0;
  WgmmaQueue wgmma;
  std::vector<Copy> copies;               // not yet committed to a group
  std::vector<std::vector<Copy>> groups;  // oldest first
  StoreBuffer stores;                     // visible to this thread alone
};

thread_local Fiber* current = nullptr;
thread_local Schedule schedule;
thread_local const Grid* grid = nullptr;

struct Block {
  std::int64_t index;
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;
  std::size_t next;  // the position in `order` of the fiber that runs next
  int unfinished;    // fibers that have not ended
  std::byte* smem = nullptr;
  StoreBuffer stores;  // visible to this block alone
  std::unique_ptr<SharedMemory> memory;
  Mbarriers mbarriers;
  std::unique_ptr<TileCopies> tile_copies;
  Rendezvous named_barriers[kNamedBarriers];
  std::vector<Rendezvous> warpgroups;
  std::vector<int> max_registers;  // for each warp; 0 if it has not called setmaxnreg

  explicit Block(std::int64_t index)
      : index(index),
        fibers(static_cast<std::size_t>(grid->threads)),
        warps(static_cast<std::size_t>(grid->threads / kWarp)),
        order(static_cast<std::size_t>(grid->threads)),
        next(order.size()),
        unfinished(grid->threads) {
    // The memory is exactly as large as was asked for, so that AddressSanitizer reports the first byte beyond it. Every
    // float in it is NaN.
    void* memory = nullptr;
    const std::size_t begin = smem_begin(index);
    if (posix_memalign(&memory, kSmemBoundary, begin + grid->smem_bytes) != 0) throw std::bad_alloc();
    smem = static_cast<std::byte*>(memory) + begin;
    std::memset(smem, 0xFF, grid->smem_bytes);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(memory, begin);
#endif
    this->memory = std::make_unique<SharedMemory>(smem, grid->smem_bytes, static_cast<std::uint32_t>(begin));
    tile_copies = std::make_unique<TileCopies>(*this->memory, mbarriers);
    warpgroups.resize(static_cast<std::size_t>(grid->threads + kWarpgroup - 1) / kWarpgroup);
    max_registers.resize(warps.size());
    std::iota(order.begin(), order.end(), 0);
    for (int thread = 0; thread < grid->threads; ++thread) {
      Fiber& fiber = fibers[static_cast<std::size_t>(thread)];
      fiber.position = {thread, grid->threads, index, grid->blocks, smem};
      fiber.block = this;
      fiber.warp = &warps[static_cast<std::size_t>(thread / kWarp)];
      fiber.stack = stacks.take();
      fiber.context = Context(fiber.stack, kStackBytes, main_of_fiber);
    }
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    for (Fiber& fiber : fibers) stacks.give_back(fiber.stack);
    std::byte* const memory = smem - smem_begin(index);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory, smem_begin(index));
#endif
    std::free(memory);
  }

  static void main_of_fiber() {
    Fiber& self = *current;
    Context::arrived(self.context, self.block->scheduler);
    grid->thread(grid->arguments);
    if (!self.wgmma.empty()) fail("a thread has ended before the wait for its wgmma");
    self.state = Fiber::State::done;
    if (--self.block->unfinished == 0 && self.block->tile_copies->under_way() > 0) {
      fail("a block has ended before a tile that TMA loads was there");
    }
    self.context.switch_to(self.block->scheduler, /*last=*/true);
    __builtin_unreachable();
  }

  bool done() const { return unfinished == 0; }

  void release_barrier() {
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
  }

  // Under a random order some warps pause for some rounds, while the others run as far as barriers let them.
  void hold_back_some_warps() {
    constexpr std::size_t kRounds = 8;  // on average
    if (!schedule.is_random() || schedule.random_below(kRounds) != 0) return;
    for (Warp& warp : warps) warp.is_held_back = schedule.coin();
  }
  bool let_all_warps_run() {  // returns whether any warp was held back
    bool any = false;
    for (Warp& warp : warps) any |= std::exchange(warp.is_held_back, false);
    return any;
  }

  // Tiles that TMA loads arrive in any order: at random times, or when no fiber can run.
  void finish_some_copies() {
    constexpr std::size_t kRounds = 4;  // on average
    for (std::size_t i = tile_copies->under_way(); schedule.is_random() && i-- > 0;) {
      if (schedule.random_below(kRounds) == 0) tile_copies->finish(i);
    }
  }
  bool finish_a_copy() {  // returns whether there was one
    const std::size_t count = tile_copies->under_way();
    if (count > 0) tile_copies->finish(schedule.is_random() ? schedule.random_below(count) : 0);
    return count > 0;
  }

  // Runs each fiber until it waits, round after round, until no fiber can run or `turns` have been taken. Returns
  // whether any fiber ran.
  bool advance(std::int64_t turns) {
    // `ran` says whether a fiber ran in this round. It begins true, because the rest of a round that an earlier call
    // has begun cannot show that no fiber can run.
    bool any = false, ran = true;
    while (turns > 0) {
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
      --turns;
      current = &fiber;
      position = &fiber.position;
      scheduler.switch_to(fiber.context);
      current = nullptr;
    }
    return any;
  }

  std::string text_of_waits() const {
    std::string all;
    for (const Fiber& fiber : fibers) {
      const char* what = fiber.state == Fiber::State::at_barrier      ? "at the barrier "
                         : fiber.state == Fiber::State::at_rendezvous ? "for its warp, its warpgroup or others at "
                         : fiber.state == Fiber::State::at_mbarrier   ? "for an mbarrier at "
                         : fiber.state == Fiber::State::waiting       ? "for another block at "
                                                                      : nullptr;
      const std::string line = what == nullptr ? "has ended" : "waits " + (what + text(fiber.site));
      // Neighbouring threads that wait for the same share one line.
      if (all.size() >= line.size() && all.compare(all.size() - line.size(), line.size(), line) == 0) continue;
      all += "\n  thread " + std::to_string(fiber.position.thread) + " and on of block " + std::to_string(index) + " " +
             line;
    }
    return all;
  }
};

void suspend(Fiber& self, Fiber::State state, Site site) {
  self.state = state;
  self.site = site;
  self.context.switch_to(self.block->scheduler);
}

// Whether the address lies in the thread's stack or in the block's shared memory.
bool is_of_block(const Fiber& fiber, const void* p) {
  const auto* const at = static_cast<const std::byte*>(p);
  return (at >= fiber.stack && at < fiber.stack + kStackBytes) ||
         (at >= fiber.block->smem && at < fiber.block->smem + grid->smem_bytes);
}

void load_global(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  if (!concurrent) return;
  current->block->stores.overlay(to, from, bytes);
  current->stores.overlay(to, from, bytes);
}

[[noreturn]] void fail_of_deadlock(const std::list<Block>& blocks) {
  std::string waits;
  for (const Block& block : blocks) waits += block.text_of_waits();
  fail("deadlock:" + waits);
}

// Starts a block when all blocks before it have ended or wait for another block. So more than one block is under way
// only if blocks wait for each other.
void run_in_order(std::int64_t count) {
  std::list<Block> started;
  std::int64_t next = 0;
  while (next < count || !started.empty()) {
    bool progress = false;
    for (auto block = started.begin(); block != started.end();) {
      progress |= block->advance(std::numeric_limits<std::int64_t>::max());
      block = block->done() ? started.erase(block) : std::next(block);
    }
    if (progress) continue;
    if (next == count) {
      if (started.empty()) break;
      fail_of_deadlock(started);
    }
    started.emplace_back(schedule.ith_block(next++, count));
  }
}

// Runs several blocks at once, each for a random number of turns. They begin in any order, as in CUDA.
class ConcurrentRun {
 public:
  explicit ConcurrentRun(std::int64_t count) : to_start_(static_cast<std::size_t>(count)) {
    std::iota(to_start_.begin(), to_start_.end(), std::int64_t{0});
  }

  void run() {
    while (!to_start_.empty() || !resident_.empty()) {
      while (!to_start_.empty() && resident_.size() < kResidentBlocks) start();
      Block& picked =
          *std::next(resident_.begin(), static_cast<std::ptrdiff_t>(schedule.random_below(resident_.size())));
      bool progress = picked.advance(std::int64_t{1} << schedule.random_below(kMostTurnsLog2 + 1));
      publish_some(picked);
      for (auto block = resident_.begin(); block != resident_.end();) {
        if (!progress) progress = block->advance(1);
        block = block->done() ? end(block) : std::next(block);
      }
      if (!progress && !publish_one()) fail_of_deadlock(resident_);
    }
    ended_stores_.publish_all();
  }

 private:
  using Blocks = std::list<Block>;

  void start() {
    std::swap(to_start_[schedule.random_below(to_start_.size())], to_start_.back());
    resident_.emplace_back(to_start_.back());
    to_start_.pop_back();
  }
  Blocks::iterator end(Blocks::iterator block) {
    for (Fiber& fiber : block->fibers) fiber.stores.move_to(ended_stores_);
    block->stores.move_to(ended_stores_);
    return resident_.erase(block);
  }

  // Makes some of the stores visible that no signal has published yet.
  void publish_some(Block& block) {
    StoreBuffer* const buffers[] = {&ended_stores_, &block.stores,
                                    &block.fibers[schedule.random_below(block.fibers.size())].stores};
    StoreBuffer& buffer = *buffers[schedule.random_below(std::size(buffers))];
    for (std::size_t left = schedule.random_below(kMostPublished); left > 0 && !buffer.empty(); --left) {
      buffer.publish(schedule.random_below(buffer.size()));
    }
  }
  // Makes one store visible when no block can run without one. Returns false if all buffers are empty.
  bool publish_one() {
    std::vector<StoreBuffer*> buffers;
    const auto add = [&](StoreBuffer& buffer) {
      if (!buffer.empty()) buffers.push_back(&buffer);
    };
    add(ended_stores_);
    for (Block& block : resident_) {
      add(block.stores);
      for (Fiber& fiber : block.fibers) add(fiber.stores);
    }
    if (buffers.empty()) return false;
    StoreBuffer& buffer = *buffers[schedule.random_below(buffers.size())];
    buffer.publish(schedule.random_below(buffer.size()));
    return true;
  }

  std::vector<std::int64_t> to_start_;
  Blocks resident_;
  StoreBuffer ended_stores_;  // stores of blocks that have ended
};

}  // namespace

// ---- the schedule ----

Schedule Schedule::from_environment() {
  Schedule result;
  const char* value = std::getenv("QLN_SCHEDULE");
  const std::string name = value == nullptr ? "" : value;
  const auto has_seed = [&](const std::string& order) {
    if (name.compare(0, order.size(), order) != 0) return false;
    result.state_ = std::strtoull(name.c_str() + order.size(), nullptr, 10);
    return true;
  };
  if (name == "reverse") {
    result.order_ = Order::reverse;
  } else if (has_seed("random:")) {
    result.order_ = Order::random;
  } else if (has_seed("concurrent:")) {
    result.order_ = Order::concurrent;
  } else if (!name.empty() && name != "forward") {
    fail("QLN_SCHEDULE: expected forward, reverse, random:SEED or concurrent:SEED, got " + name);
  }
  return result;
}

std::uint32_t Schedule::next() {
  state_ = state_ * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX
  return static_cast<std::uint32_t>(state_ >> 33);
}

void Schedule::arrange(std::vector<int>& order) {
  if (order_ == Order::reverse && order.front() == 0) std::reverse(order.begin(), order.end());
  if (!is_random()) return;
  for (std::size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[next() % (i + 1)]);
}

std::int64_t Schedule::ith_block(std::int64_t i, std::int64_t count) const {
  return order_ == Order::reverse ? count - 1 - i : i;
}

bool Schedule::coin() { return is_random() && next() % 2 == 0; }

std::size_t Schedule::random_below(std::size_t count) { return next() % count; }

// ---- a grid ----

std::size_t max_smem_bytes() {
  const char* value = std::getenv("QLN_EMULATED_SMEM");
  if (value == nullptr || *value == '\0') return kHopperSmemBytes;
  char* end = nullptr;
  const unsigned long long bytes = std::strtoull(value, &end, 10);
  if (*end != '\0' || bytes == 0) fail(std::string("QLN_EMULATED_SMEM: expected bytes, got ") + value);
  return bytes;
}

void run(const Grid& launched) {
  if (launched.threads <= 0 || launched.threads > kMaxThreads || launched.threads % kWarp != 0) {
    fail("a block of " + std::to_string(launched.threads) + " threads");
  }
  if (launched.smem_bytes > max_smem_bytes()) fail(std::to_string(launched.smem_bytes) + " bytes of shared memory");
  if (launched.blocks < 0 || launched.blocks > 0x7FFFFFFF) fail(std::to_string(launched.blocks) + " blocks");
  if (current != nullptr) fail("a kernel launches another");
  schedule = Schedule::from_environment();
  grid = &launched;
  concurrent = schedule.is_concurrent();
  if (concurrent) {
    ConcurrentRun(launched.blocks).run();
  } else {
    run_in_order(launched.blocks);
  }
  concurrent = false;
  position = nullptr;
  grid = nullptr;
}

void poison(void* memory, std::size_t bytes) {
  std::memset(memory, 0xFF, bytes);  // every float is NaN
  // The flags are raised in a pseudo-random half of the calls, not in every second one: each product takes the same
  // number of workspaces, so with every second one its flags could always be raised at first, or never.
  static thread_local std::uint32_t calls = 0;
  constexpr std::uint32_t kGoldenRatio = 0x9E3779B9;
  if (!Schedule::from_environment().is_concurrent() || (++calls * kGoldenRatio) >> 31 == 0) return;
  const std::uint32_t raised_flag = 1;
  for (std::size_t i = 0; i + sizeof(raised_flag) <= bytes; i += sizeof(raised_flag)) {
    std::memcpy(static_cast<std::byte*>(memory) + i, &raised_flag, sizeof(raised_flag));
  }
}

// ---- called by fibers ----

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

// The last thread to come runs `exchange` on what every thread has brought; then all of them continue.
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

}  // namespace

void named_barrier(int number, int threads, Site site) {
  if (number < 0 || number >= kNamedBarriers || threads % kWarp != 0) fail("a barrier that the device does not have");
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
  current->block->mbarriers.init(barrier, arrivals, current->position.thread);
}
void mbarrier_publish() { current->block->mbarriers.publish(current->position.thread); }
void mbarrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes) {
  current->block->mbarriers.arrive(barrier, expected_bytes, current->position.thread);
}
void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity, Site site) {
  Fiber& self = *current;
  self.phase = self.block->mbarriers.begin_wait(barrier, parity, self.position.thread);
  if (self.block->mbarriers.is_complete(barrier, self.phase)) return;
  self.mbarrier = barrier;
  suspend(self, Fiber::State::at_mbarrier, site);
}

void load_tile(void* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier) {
  TileCopies& copies = *current->block->tile_copies;
  copies.begin(static_cast<std::byte*>(to), source, row, col, barrier);
  if (schedule.is_early()) copies.finish(copies.under_way() - 1);
}

std::shared_ptr<WgmmaProduct> begin_wgmma(WgmmaProduct::ToF32 to_f32, int cols, std::uint64_t b_descriptor) {
  return std::make_shared<WgmmaProduct>(*current->block->memory, to_f32, cols, b_descriptor);
}
void compute_if_early(WgmmaProduct& product) {
  if (schedule.is_early()) product.compute();
}
WgmmaQueue& wgmma_queue() { return current->wgmma; }

void set_max_registers(int count) {
  constexpr int kLeast = 24, kMost = 256, kUnit = 8, kRegisters = 64 * 1024;
  Block& block = *current->block;
  if (count < kLeast || count > kMost || count % kUnit != 0) fail("setmaxnreg of " + std::to_string(count));
  block.max_registers[static_cast<std::size_t>(current->position.thread / kWarp)] = count;
  int sum = 0;
  for (const int registers : block.max_registers) sum += registers * kWarp;
  if (sum > kRegisters) fail("setmaxnreg: the block's threads want " + std::to_string(sum) + " registers");
}

void yield() {
  if (concurrent) suspend(*current, Fiber::State::ready, current->site);
}

void load(void* to, const void* from, std::size_t bytes) {
  if (is_of_block(*current, from)) {
    std::memcpy(to, from, bytes);
    return;
  }
  if (schedule.coin()) yield();
  load_global(to, from, bytes);
}

void store(void* to, const void* from, std::size_t bytes) {
  if (is_of_block(*current, to)) {
    std::memcpy(to, from, bytes);
    return;
  }
  if (schedule.coin()) yield();
  current->stores.put(to, from, bytes);
}

void share_stores() {
  if (concurrent) current->stores.move_to(current->block->stores);
}

void signal(std::uint32_t* flag, std::uint32_t value) {
  yield();
  if (concurrent) {
    current->stores.publish_all();
    current->block->stores.publish_all();
  }
  *flag = value;
}

void wait_for(const std::uint32_t* flag, std::uint32_t value, Site site) {
  yield();
  if (*flag == value) return;
  current->flag = flag;
  current->value = value;
  suspend(*current, Fiber::State::waiting, site);
}

void copy_async(void* to, const void* from, int bytes, int zeros) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % (bytes + zeros) == 0; };
  if (!aligned(to) || (bytes > 0 && !aligned(from))) fail("cp.async of a misaligned address");
  const Copy copy{to, from, bytes, zeros};
  if (concurrent && schedule.coin()) yield();
  if (schedule.coin()) return copy.run();
  current->copies.push_back(copy);
}

void commit_copies() {
  current->groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void wait_for_copies(int groups_left) {
  auto& groups = current->groups;
  while (groups.size() > static_cast<std::size_t>(groups_left)) {
    for (const Copy& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

void fail(const std::string& what) {
  if (current != nullptr) {
    std::fprintf(stderr, "cuda_emulated: thread %d of block %lld: ", current->position.thread,
                 static_cast<long long>(current->position.block));
  } else {
    std::fprintf(stderr, "cuda_emulated: ");
  }
  std::fprintf(stderr, "%s\n", what.c_str());
  std::abort();
}

}  // namespace qlora_native::cuda_emulated::emulator
