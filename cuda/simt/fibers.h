// The engine of the emulator: threads of a block are fibers that one host thread runs in turn, until each waits for
// the others or ends. host.h builds on it what a kernel sees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace qlora_native::cuda_emulated {

// Where in a kernel a wait was called: the defaults of a function's last argument are evaluated at its call.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

namespace emulator {

// The order of fibers and blocks, from QLN_SCHEDULE: "forward", "reverse" or "random:SEED". A result that depends on
// it shows a missing barrier. Every launch begins with the seed again.
class Schedule {
 public:
  static Schedule from_environment();
  void arrange(std::vector<int>& order);                         // of the fibers of a block: again for each round
  std::int64_t place(std::int64_t i, std::int64_t count) const;  // the i-th of the blocks
  bool coin();  // whether an asynchronous copy is done at once: what a device may do, too

 private:
  enum class Order { forward, reverse, random } order_ = Order::forward;
  std::uint64_t state_ = 0;
  std::uint32_t next();
};

// What a launch runs: the kernel with its arguments, called by every thread.
struct Grid {
  std::int64_t blocks;
  int threads;
  std::size_t smem_bytes;
  void (*thread)(const void* arguments);
  const void* arguments;
};

// Of shared memory, that a block may have: what Hopper's have, or QLN_EMULATED_SMEM, for what runs where there is less.
std::size_t max_smem_bytes();
// And what the device keeps of it for itself.
constexpr std::size_t kReservedSmemBytes = 1024;

// Runs the grid; returns when it is done. Several host threads may run grids at once. A mistake of the kernel that no
// device would forgive (a deadlock, lanes that meet at different calls) ends the process, with file and line.
void run(const Grid& grid);

// ---- called by fibers --------------------------------------------------------------------------------------------

// Of the fiber that runs, for the wrappers of host.h.
struct Position {
  int thread;
  int threads;
  std::int64_t block;
  std::int64_t blocks;
  std::byte* smem;
};
extern thread_local const Position* position;

void barrier(Site site);  // of the block
// Of the warp: the last lane to come runs `all` over what each brought, and then all go on.
void meet(void* lane, void (*all)(void* const* lanes), Site site);
// Until *flag == value, which another block brings about.
void wait_for(const std::uint32_t* flag, std::uint32_t value, Site site);

// Copies that are only queued until they are waited for, in groups, as cp.async has them.
void copy_async(void* to, const void* from, int bytes, int zeros);
void commit_copies();
void wait_for_copies(int groups_left);

[[noreturn]] void fail(const std::string& what);

}  // namespace emulator
}  // namespace qlora_native::cuda_emulated
