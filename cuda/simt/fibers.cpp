// The schedule of a grid, and its blocks in that order.
#include "simt/fibers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <list>
#include <optional>
#include <utility>

#include "simt/block.h"
#include "simt/memory.h"

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
constinit thread_local Fiber* current = nullptr;
constinit thread_local Schedule schedule;

namespace {

constexpr int kMaxThreads = 1024;
constexpr std::size_t kHopperSmemBytes = 227 * 1024;
// So many blocks at most run at the same time under the schedule "concurrent"; a device may have room for more.
constexpr std::size_t kMostResidentBlocks = 6;
constexpr std::size_t kMostEarlyBlocks = 2;  // of a grid whose blocks begin before the grid before it
constexpr int kMostTurnsLog2 = 9;            // fibers of a block get at most 2^9 turns until another block may run
constexpr std::size_t kMostPublished = 32;   // fewer pieces of memory than this are published between two blocks' turns

[[noreturn]] void fail_of_deadlock(const std::list<Block>& blocks) {
  std::string waits;
  for (const Block& block : blocks) waits += block.text_of_waits();
  fail("deadlock:" + waits);
}

// Removes a block that is done.
std::list<Block>::iterator end(std::list<Block>& blocks, std::list<Block>::iterator block) {
  GridRun& run = block->run;
  if (--run.unfinished == 0) run.has_ended = 1;
  return blocks.erase(block);
}

// A block that has yet to begin.
struct Start {
  GridRun* run;
  std::int64_t index;
};

// The blocks of all grids in the order in which they begin: grid after grid, but some of the last grid's blocks may
// come first if it begins early.
std::vector<Start> order_of_starts(std::vector<GridRun>& runs) {
  std::vector<Start> starts;
  for (GridRun& run : runs) {
    const std::size_t first = starts.size();
    for (std::int64_t i = 0; i < run.grid.blocks; ++i) starts.push_back({&run, schedule.ith_block(i, run.grid.blocks)});
    const auto blocks = starts.begin() + static_cast<std::ptrdiff_t>(first);
    if (schedule.is_concurrent()) {
      for (std::size_t i = starts.size() - first; i > 1; --i)
        std::swap(blocks[i - 1], blocks[schedule.random_below(i)]);
    }
    if (run.before != nullptr && schedule.is_early()) {
      const auto early = std::min<std::ptrdiff_t>(kMostEarlyBlocks, starts.end() - blocks);
      std::rotate(starts.begin(), blocks, blocks + early);
    }
  }
  return starts;
}

// Starts a block when all blocks before it have ended or wait for another block. So more than one block is under way
// only if blocks wait for each other.
void run_in_order(const std::vector<Start>& starts) {
  std::list<Block> started;
  auto next = starts.begin();
  while (next != starts.end() || !started.empty()) {
    bool progress = false;
    for (auto block = started.begin(); block != started.end();) {
      progress |= block->advance(std::numeric_limits<std::int64_t>::max());
      block = block->done() ? end(started, block) : std::next(block);
    }
    if (progress) continue;
    if (next == starts.end()) {
      if (started.empty()) break;
      fail_of_deadlock(started);
    }
    started.emplace_back(*next->run, next->index);
    ++next;
  }
}

// Runs several blocks at once, each for a random number of turns.
class ConcurrentRun {
 public:
  explicit ConcurrentRun(const std::vector<Start>& starts)
      : next_(starts.begin()),
        end_(starts.end()),
        most_resident_(schedule.random_below(2) == 0 ? kMostResidentBlocks
                                                     : 1 + schedule.random_below(kMostResidentBlocks)) {}

  void run() {
    while (next_ != end_ || !resident_.empty()) {
      while (next_ != end_ && has_room()) start();
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

  // Whether the next block may begin. Blocks that may wait for another grid take no room away from its blocks.
  bool has_room() const {
    const auto may_wait = [](const GridRun& run) { return run.before != nullptr && run.before->has_ended == 0; };
    const auto waiting = static_cast<std::size_t>(
        std::count_if(resident_.begin(), resident_.end(), [&](const Block& block) { return may_wait(block.run); }));
    if (!may_wait(*next_->run)) return resident_.size() - waiting < most_resident_;
    return waiting < kMostEarlyBlocks || resident_.size() < most_resident_;
  }
  void start() {
    resident_.emplace_back(*next_->run, next_->index);
    ++next_;
  }
  Blocks::iterator end(Blocks::iterator block) {
    for (Fiber& fiber : block->fibers) fiber.stores.move_to(ended_stores_);
    block->stores.move_to(ended_stores_);
    if (block->run.unfinished == 1) ended_stores_.publish_all();  // the grid ends
    return emulator::end(resident_, block);
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

  std::vector<Start>::const_iterator next_, end_;
  const std::size_t most_resident_;
  Blocks resident_;
  StoreBuffer ended_stores_;  // stores of blocks that have ended
};

// Runs the grid; if there is one before it, that has not begun either.
void run(const Grid* before, const Grid& grid) {
  const DeviceWork work;
  schedule = Schedule::from_environment();
  std::vector<GridRun> runs;
  runs.reserve(2);  // the second points to the first
  if (before != nullptr) runs.push_back({*before, nullptr, before->blocks, before->blocks == 0});
  runs.push_back({grid, before == nullptr ? nullptr : runs.data(), grid.blocks});
  const std::vector<Start> starts = order_of_starts(runs);
  concurrent = schedule.is_concurrent();
  if (concurrent) {
    ConcurrentRun(starts).run();
  } else {
    run_in_order(starts);
  }
  concurrent = false;
  position = nullptr;
}

// The host thread's grid that is launched and has not begun.
thread_local std::optional<Grid> kept;

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

void launch(Grid grid) {
  if (grid.threads <= 0 || grid.threads > kMaxThreads || grid.threads % kWarp != 0) {
    fail("a block of " + std::to_string(grid.threads) + " threads");
  }
  if (grid.smem_bytes > max_smem_bytes()) fail(std::to_string(grid.smem_bytes) + " bytes of shared memory");
  if (grid.blocks < 0 || grid.blocks > 0x7FFFFFFF) fail(std::to_string(grid.blocks) + " blocks");
  if (current != nullptr) fail("a kernel launches another");
  if (!grid.begins_early) run_kept_grid();
  if (grid.next_begins_early) {
    run_kept_grid();
    kept = std::move(grid);
    return;
  }
  const std::optional<Grid> before = std::exchange(kept, std::nullopt);
  run(before ? &*before : nullptr, grid);
}

void run_kept_grid() {
  const std::optional<Grid> grid = std::exchange(kept, std::nullopt);
  if (grid) run(nullptr, *grid);
}

void check_no_grid_is_kept() {
  if (!kept) return;
  if (std::uncaught_exceptions() == 0) fail("memory is released before the kernel that begins early is launched");
  run_kept_grid();  // the call ends here
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
