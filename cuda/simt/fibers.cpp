// The schedule of a grid, and its blocks in that order.
#include "simt/fibers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <list>
#include <numeric>
#include <utility>

#include "simt/block.h"

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
constinit thread_local const Grid* grid = nullptr;

namespace {

constexpr int kMaxThreads = 1024, kMostClusterBlocks = 8;
constexpr std::size_t kHopperSmemBytes = 227 * 1024;
// So many blocks at most run at the same time under the schedule "concurrent"; a device may have room for more.
constexpr std::size_t kMostResidentBlocks = 6;
constexpr int kMostTurnsLog2 = 9;           // fibers of a block get at most 2^9 turns until another block may run
constexpr std::size_t kMostPublished = 32;  // fewer pieces of memory than this are published between two blocks' turns

[[noreturn]] void fail_of_deadlock(const std::list<Block>& blocks) {
  std::string waits;
  for (const Block& block : blocks) waits += block.text_of_waits();
  fail("deadlock:" + waits);
}

// Starts the cluster's blocks, which are the i-th and those after it in the order of the schedule; without clusters
// this is one block. Under a random order they run before or behind each other and those that have begun.
void start_cluster(std::int64_t i, std::int64_t count, std::list<Block>& blocks) {
  if (grid->cluster == 1) {
    blocks.emplace_back(schedule.ith_block(i, count));
    return;
  }
  const auto cluster = std::make_shared<Cluster>();
  cluster->blocks.resize(static_cast<std::size_t>(grid->cluster));
  for (const std::int64_t end = i + grid->cluster; i < end; ++i) {
    const std::size_t place = schedule.is_random() ? schedule.random_below(blocks.size() + 1) : blocks.size();
    blocks.emplace(std::next(blocks.begin(), static_cast<std::ptrdiff_t>(place)), schedule.ith_block(i, count),
                   cluster);
  }
}

// Starts a block, or the blocks of a cluster, when all blocks before have ended or wait for another block. So more than
// one block, or cluster, is under way only if blocks wait for each other.
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
    start_cluster(next, count, started);
    next += grid->cluster;
  }
}

// Runs several blocks at once, each for a random number of turns. They begin in any order, as in CUDA.
class ConcurrentRun {
 public:
  explicit ConcurrentRun(std::int64_t count)
      : count_(count),
        to_start_(static_cast<std::size_t>(count / grid->cluster)),
        most_resident_(schedule.random_below(2) == 0 ? kMostResidentBlocks
                                                     : 1 + schedule.random_below(kMostResidentBlocks)) {
    std::iota(to_start_.begin(), to_start_.end(), std::int64_t{0});
  }

  void run() {
    while (!to_start_.empty() || !resident_.empty()) {
      while (!to_start_.empty() && has_room()) start();
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

  // There is room for one cluster in any case.
  bool has_room() const {
    return resident_.empty() || resident_.size() + static_cast<std::size_t>(grid->cluster) <= most_resident_;
  }
  void start() {
    std::swap(to_start_[schedule.random_below(to_start_.size())], to_start_.back());
    start_cluster(to_start_.back() * grid->cluster, count_, resident_);
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

  const std::int64_t count_;
  std::vector<std::int64_t> to_start_;  // clusters
  std::size_t most_resident_;
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

namespace {

// A number that an environment variable may give in place of the emulated device's own.
unsigned long long number_of_device(const char* variable, const char* unit, unsigned long long own) {
  const char* value = std::getenv(variable);
  if (value == nullptr || *value == '\0') return own;
  char* end = nullptr;
  const unsigned long long number = std::strtoull(value, &end, 10);
  if (*end != '\0' || number == 0) fail(std::string(variable) + ": expected " + unit + ", got " + value);
  return number;
}

}  // namespace

std::size_t max_smem_bytes() { return number_of_device("QLN_EMULATED_SMEM", "bytes", kHopperSmemBytes); }

int multiprocessors() {
  constexpr int kFew = 3;
  return static_cast<int>(number_of_device("QLN_EMULATED_MULTIPROCESSORS", "a number of multiprocessors", kFew));
}

void run(const Grid& launched) {
  if (launched.threads <= 0 || launched.threads > kMaxThreads || launched.threads % kWarp != 0) {
    fail("a block of " + std::to_string(launched.threads) + " threads");
  }
  if (launched.smem_bytes > max_smem_bytes()) fail(std::to_string(launched.smem_bytes) + " bytes of shared memory");
  if (launched.blocks < 0 || launched.blocks > 0x7FFFFFFF) fail(std::to_string(launched.blocks) + " blocks");
  if (launched.cluster < 1 || launched.cluster > kMostClusterBlocks || launched.blocks % launched.cluster != 0) {
    fail(std::to_string(launched.blocks) + " blocks in clusters of " + std::to_string(launched.cluster));
  }
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
