// The schedule of a grid, and its blocks in that order.
#include "emulator/fibers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <list>
#include <utility>

#include "emulator/block.h"
#include "emulator/memory.h"

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

constexpr int kMaxThreads = 1024, kMaxClusterBlocks = 8;
constexpr int kFirstPtxWithGriddepcontrol = 90;
constexpr std::size_t kHopperSmemBytes = 227 * 1024;
// The blocks that run at the same time under the schedule "concurrent"; a device may have room for more.
constexpr std::size_t kMaxResidentBlocks = 6;
constexpr std::size_t kMaxEarly = 2;       // blocks, or clusters, of a grid that begin before the grids before it
constexpr int kMaxStepsLog2 = 9;           // a block takes at most 2^9 steps until another may run
constexpr std::size_t kMaxPublished = 32;  // fewer pieces of memory than this are published before another block runs

[[noreturn]] void report_deadlock(const std::list<Block>& blocks) {
  std::string waits;
  for (const Block& block : blocks) waits += block.describe_waits();
  fail("deadlock:" + waits);
}

// Removes a block that is done.
std::list<Block>::iterator end(std::list<Block>& blocks, std::list<Block>::iterator block) {
  GridRun& run = block->run;
  if (--run.unfinished == 0) {
    // The next kernel, which waits for this one, would not wait for the one before.
    if (run.grid.programmatic_launch && !run.has_waited) fail("no block of a dependent kernel has waited");
    run.has_ended = 1;
  }
  return blocks.erase(block);
}

// The blocks that begin together: those of a cluster, or one block. `first` is the position of the first of them in the
// order of the schedule.
struct Start {
  GridRun* run;
  std::int64_t first;
};

// All that begin, in order: grid after grid, but some blocks of a dependent grid may precede all of the grids before.
std::vector<Start> order_of_starts(std::vector<GridRun>& runs) {
  std::vector<Start> starts;
  for (GridRun& run : runs) {
    const std::size_t before = starts.size();
    for (std::int64_t i = 0; i < run.grid.blocks; i += run.grid.cluster) starts.push_back({&run, i});
    const auto of_run = starts.begin() + static_cast<std::ptrdiff_t>(before);
    if (schedule.is_concurrent()) {
      for (std::size_t i = starts.size() - before; i > 1; --i) {
        std::swap(of_run[static_cast<std::ptrdiff_t>(i - 1)],
                  of_run[static_cast<std::ptrdiff_t>(schedule.random_below(i))]);
      }
    }
    if (run.before != nullptr && schedule.is_early()) {
      const auto early = std::min<std::ptrdiff_t>(kMaxEarly, starts.end() - of_run);
      std::rotate(starts.begin(), of_run, of_run + early);
    }
  }
  return starts;
}

// Under a random order the blocks of a cluster run before or behind each other and those that have begun.
void begin(const Start& start, std::list<Block>& blocks) {
  const Grid& grid = start.run->grid;
  const auto index_of = [&](std::int64_t position) { return schedule.ith_block(position, grid.blocks); };
  if (grid.cluster == 1) {
    blocks.emplace_back(*start.run, index_of(start.first));
    return;
  }
  const auto cluster = std::make_shared<Cluster>();
  cluster->blocks.resize(static_cast<std::size_t>(grid.cluster));
  for (std::int64_t i = start.first; i < start.first + grid.cluster; ++i) {
    const std::size_t place = schedule.is_random() ? schedule.random_below(blocks.size() + 1) : blocks.size();
    blocks.emplace(std::next(blocks.begin(), static_cast<std::ptrdiff_t>(place)), *start.run, index_of(i), cluster);
  }
}

// Starts a block, or the blocks of a cluster, when all blocks before have ended or wait for another block. So more than
// one block, or cluster, is under way only if blocks wait for each other.
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
      report_deadlock(started);
    }
    begin(*next++, started);
  }
}

// Runs several blocks at once, each for a random number of steps.
class ConcurrentRun {
 public:
  explicit ConcurrentRun(const std::vector<Start>& starts)
      : next_(starts.begin()),
        end_(starts.end()),
        max_resident_(schedule.random_below(2) == 0 ? kMaxResidentBlocks
                                                    : 1 + schedule.random_below(kMaxResidentBlocks)) {}

  void run() {
    while (next_ != end_ || !resident_.empty()) {
      while (next_ != end_ && can_begin()) begin(*next_++, resident_);
      Block& picked =
          *std::next(resident_.begin(), static_cast<std::ptrdiff_t>(schedule.random_below(resident_.size())));
      bool progress = picked.advance(std::int64_t{1} << schedule.random_below(kMaxStepsLog2 + 1));
      publish_some(picked);
      for (auto block = resident_.begin(); block != resident_.end();) {
        if (!progress) progress = block->advance(1);
        block = block->done() ? end(block) : std::next(block);
      }
      if (!progress && !publish_one()) report_deadlock(resident_);
    }
    ended_stores_.publish_all();
  }

 private:
  using Blocks = std::list<Block>;

  // Whether the next blocks may begin. One cluster always may, and blocks that may wait for another grid do not keep
  // its blocks from beginning.
  bool can_begin() const {
    const auto may_wait = [](const GridRun& run) { return run.before != nullptr && run.before->has_ended == 0; };
    const auto count_if = [&](const auto& is_counted) {
      return static_cast<std::size_t>(std::count_if(resident_.begin(), resident_.end(), is_counted));
    };
    const std::size_t more = static_cast<std::size_t>(next_->run->grid.cluster);
    if (may_wait(*next_->run)) {
      const std::size_t early = count_if([&](const Block& block) { return &block.run == next_->run; });
      return early < kMaxEarly * more || resident_.size() + more <= max_resident_;
    }
    const std::size_t others = count_if([&](const Block& block) { return !may_wait(block.run); });
    return others == 0 || others + more <= max_resident_;
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
    for (std::size_t left = schedule.random_below(kMaxPublished); left > 0 && !buffer.empty(); --left) {
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
  const std::size_t max_resident_;
  Blocks resident_;
  StoreBuffer ended_stores_;  // stores of blocks that have ended
};

// Runs grids of which each depends on the one before it.
void run(const std::vector<Grid>& grids) {
  const DeviceWork work;
  schedule = Schedule::from_environment();
  std::vector<GridRun> runs;
  runs.reserve(grids.size());  // a run points to the one before it
  for (const Grid& grid : grids) runs.push_back({grid, runs.empty() ? nullptr : &runs.back(), grid.blocks});
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

// The host thread's grids that are launched and have not begun: each of them but the first depends on the one before.
thread_local std::vector<Grid> pending;
thread_local bool has_context = false;

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

namespace {

// An attribute of the emulated device, which an environment variable may set.
unsigned long long device_attribute(const char* variable, const char* unit, unsigned long long otherwise) {
  const char* value = std::getenv(variable);
  if (value == nullptr || *value == '\0') return otherwise;
  char* end = nullptr;
  const unsigned long long number = std::strtoull(value, &end, 10);
  if (*end != '\0' || number == 0) fail(std::string(variable) + ": expected " + unit + ", got " + value);
  return number;
}

}  // namespace

std::size_t max_smem_bytes() { return device_attribute("QLN_EMULATED_SMEM", "bytes", kHopperSmemBytes); }

int num_sms() {
  constexpr int kDefault = 3;
  return static_cast<int>(device_attribute("QLN_EMULATED_SMS", "a number of SMs", kDefault));
}

int ptx_version() {
  constexpr int kHopper = 90;
  return static_cast<int>(device_attribute("QLN_EMULATED_PTX", "an architecture", kHopper));
}

namespace {

// True in a pseudo-random half of the calls, and not in every second one: each product makes the same number of calls,
// so that every second one could always be the same of them.
bool is_picked_half_of_the_time() {
  static thread_local std::uint32_t calls = 0;
  constexpr std::uint32_t kGoldenRatio = 0x9E3779B9;
  return (++calls * kGoldenRatio) >> 31 != 0;
}

}  // namespace

void launch(Grid grid) {
  if (grid.threads <= 0 || grid.threads > kMaxThreads || grid.threads % kWarp != 0) {
    fail("a block of " + std::to_string(grid.threads) + " threads");
  }
  if (grid.smem_bytes > max_smem_bytes()) fail(std::to_string(grid.smem_bytes) + " bytes of shared memory");
  if (grid.blocks < 0 || grid.blocks > 0x7FFFFFFF) fail(std::to_string(grid.blocks) + " blocks");
  if (grid.cluster < 1 || grid.cluster > kMaxClusterBlocks || grid.blocks % grid.cluster != 0) {
    fail(std::to_string(grid.blocks) + " blocks in clusters of " + std::to_string(grid.cluster));
  }
  if (current != nullptr) fail("a kernel launches another");
  const bool is_last = !grid.next_programmatic_launch;
  if (grid.blocks == 0) {  // nothing is launched
    if (is_last) run_pending_grids();
    return;
  }
  if (grid.programmatic_launch) {
    if (ptx_version() < kFirstPtxWithGriddepcontrol) fail("a dependent kernel whose code has no griddepcontrol");
    if (pending.empty()) fail("a dependent kernel that does not follow another one at once");
  } else {
    run_pending_grids();
  }
  pending.push_back(std::move(grid));
  if (is_last) run_pending_grids();
}

void run_pending_grids() {
  if (!pending.empty()) run(std::exchange(pending, {}));
}

void check_no_pending_grid(const char* what) {
  if (pending.empty()) return;
  if (std::uncaught_exceptions() == 0) {
    fail(std::string("memory is ") + what + " before the dependent kernel is launched");
  }
  run_pending_grids();  // the call ends here
}

void bind_context() { has_context = true; }
void check_context(const char* call) {
  if (!has_context) fail(std::string(call) + " in a thread without a context");
}

void poison(void* memory, std::size_t bytes) {
  std::memset(memory, 0xFF, bytes);  // every float is NaN
  if (!Schedule::from_environment().is_concurrent() || !is_picked_half_of_the_time()) return;
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
