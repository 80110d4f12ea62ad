// The engine of the emulator: threads of a block are fibers that one host thread runs in turn, until each waits for
// the others or ends. host.h builds on it what a kernel sees.
//
// Under the schedules forward, reverse and random a fiber runs until it waits, and a block is started when those before
// it have ended or wait for others; under random some warps are held back while others run. They find what is wrong
// inside a block. The schedule concurrent finds what is wrong between blocks; its model is this:
//
//   - Blocks begin in a random order, and six are resident at once. Each runs for a random number of turns, then
//     another one does. Where all of them wait for a block that has not begun, that is a deadlock.
//   - A fiber may be cut before every access to global memory by load_vector, store_vector or cp_async, and always is
//     before signal, wait_for and an atomic. It goes on after other threads of this block and of others have run.
//   - What store_vector writes to global memory the thread alone sees at first. From the block's next barrier on (or
//     the warp's sync_warp) the block sees it. All see it when a thread that sees it calls signal, or at a random
//     later time, one 16-byte piece sooner than another; at the latest when the kernel has ended.
//   - A Workspace begins as NaN or, half of the times, as words of 1: flags that an earlier call has left raised.
//
// What it does not see: accesses through plain pointers are neither cut nor buffered, so what passes between blocks of
// a kernel must go through load_vector and store_vector, and what a thread has stored through store_vector it must not
// read through a plain pointer in the same kernel. A load is never early: that wait_for acquires is taken for granted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt/async.h"

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

// The order of fibers and blocks, from QLN_SCHEDULE: "forward", "reverse", "random:SEED" or "concurrent:SEED". A result
// that depends on it shows a missing barrier. Every launch begins with the seed again.
class Schedule {
 public:
  static Schedule from_environment();
  void arrange(std::vector<int>& order);                         // of the fibers of a block: again for each round
  std::int64_t place(std::int64_t i, std::int64_t count) const;  // the i-th of the blocks
  bool coin();  // whether an asynchronous copy is done at once: what a device may do, too
  // The same of what runs beside the threads (async.h), which is early under `reverse` and late under `forward`.
  bool is_early() { return order_ == Order::reverse || coin(); }
  bool is_concurrent() const { return order_ == Order::concurrent; }
  bool is_random() const { return order_ == Order::random || order_ == Order::concurrent; }
  std::size_t below(std::size_t count);  // a random number

 private:
  enum class Order { forward, reverse, random, concurrent } order_ = Order::forward;
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

// Fills memory that a kernel has not written yet with what it must not rely on.
void spoil(void* memory, std::size_t bytes);

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
// *flag = value, behind every store that the thread sees.
void signal(std::uint32_t* flag, std::uint32_t value);

// Whether the schedule is concurrent: only then is an access to memory more than a copy.
extern constinit thread_local bool concurrent;
void load(void* to, const void* from, std::size_t bytes);
void store(void* to, const void* from, std::size_t bytes);
void cut();           // lets other threads and blocks run
void share_stores();  // with the block

// Copies that are only queued until they are waited for, in groups, as cp.async has them.
void copy_async(void* to, const void* from, int bytes, int zeros);
void commit_copies();
void wait_for_copies(int groups_left);

// These call async.h's, for the thread that runs and the shared memory of its block.
std::uint32_t shared_address(const void* p);
void note_shared_store(const void* p, std::size_t bytes);
void publish_shared_stores();
void mbarrier_init(std::uint64_t* barrier, int arrivals);
void mbarrier_publish();
void mbarrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes);
void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity, Site site);
void load_tile(void* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier);
void named_barrier(int number, int threads, Site site);
// The threads of a warpgroup meet, as those of a warp do in meet().
void meet_warpgroup(void* lane, void (*all)(void* const* lanes), Site site);
std::shared_ptr<WgmmaProduct> begin_wgmma(WgmmaProduct::ToF32 to_f32, int cols, std::uint64_t b_descriptor);
void compute_if_early(WgmmaProduct& product);
WgmmaQueue& wgmma_queue();
void set_max_registers(int count);

[[noreturn]] void fail(const std::string& what);

}  // namespace emulator
}  // namespace qlora_native::cuda_emulated
