// The emulator runs kernels on a machine without a GPU. It tests indexing, synchronization and layout, and says nothing
// about speed. It has no product code, and knows no operation: device/ and runtime/ implement a kernel's instructions
// and its launch over it. The rules:
//
//   - The threads of a block are fibers, which one host thread runs, each until it waits for others or ends. Threads
//     that meet at different calls, or never, end the process with file and line.
//   - QLN_SCHEDULE=forward|reverse|random:SEED|concurrent:SEED is the order in which fibers run. Results must not
//     depend on it.
//   - cp_async only queues a copy, and cp_async_wait does it. Shared memory begins as NaN.
//   - A vector that is loaded from or stored to a misaligned address ends the process.
//   - The device's memory is apart from the host's (memory.h). Barriers, tiles by TMA and wgmma have rules of their own
//     (async.h), and so have clusters (cluster.cpp).
//
// Under the schedules forward, reverse and random a fiber runs until it waits, and a block starts when all blocks
// before it have ended or wait for others. Under random some warps are held back while others run. These schedules find
// mistakes inside a block. The schedule concurrent finds mistakes between blocks. Its model:
//
//   - Blocks begin in a random order. Half of the kernels have six resident at once, the others a random number up to
//     six, as on a device where another kernel runs. One of them runs for a random number of steps (a step resumes one
//     fiber), then another. If all that are resident wait for a block that has not begun, that is a deadlock.
//   - A fiber may be interrupted before each access to global memory by load_vector, store_vector or cp_async. It
//     always is before signal, wait_for and an atomic. It continues after other threads, of any block, have run.
//   - At first only the thread itself sees what its store_vector writes to global memory. Its block sees it from the
//     next barrier of the block, or sync_warp of the warp, on. All blocks see it when a thread that sees it calls
//     signal, or at a random later time, at the latest when the kernel has ended. 16-byte pieces may become visible in
//     any order.
//   - The blocks of a cluster begin together (cluster.cpp has the rules of clusters).
//   - Of each dependent kernel (LaunchShape::programmatic_launch), up to two blocks, or clusters, begin before the
//     kernels before it.
//   - A Workspace begins as NaN or, half of the time, as words of 1, which are flags that an earlier call has raised.
//
// The model's limits: accesses through plain pointers are neither interrupted nor buffered. So blocks of a kernel must
// pass data to each other through load_vector and store_vector, and a thread must not read through a plain pointer what
// it has stored by store_vector in the same kernel. A load never takes place early: a wait_for that does not acquire
// would not be found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/async.h"

namespace qlora_native::cuda_emulated {

// The source location of a wait in a kernel. The waits take it as a default argument, which is evaluated at the call.
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
// that depends on the order shows a missing barrier. Every launch starts from the seed again.
class Schedule {
 public:
  static Schedule from_environment();
  void arrange(std::vector<int>& order);                             // orders a block's fibers, anew for each round
  std::int64_t ith_block(std::int64_t i, std::int64_t count) const;  // the index of the block that starts as the i-th
  bool coin();  // whether an asynchronous copy is done at once, as a device may do it
  // The same for what runs beside the threads (async.h). It is early under `reverse` and late under `forward`.
  bool is_early() { return order_ == Order::reverse || coin(); }
  bool is_concurrent() const { return order_ == Order::concurrent; }
  bool is_random() const { return order_ == Order::random || order_ == Order::concurrent; }
  std::size_t random_below(std::size_t count);  // a random number, 0 ... count - 1

 private:
  enum class Order { forward, reverse, random, concurrent } order_ = Order::forward;
  std::uint64_t state_ = 0;
  std::uint32_t next();
};

// The shape of a launch, and the kernel with its arguments, which every thread calls.
struct Grid {
  std::int64_t blocks;
  int threads;
  std::size_t smem_bytes;
  int cluster;  // blocks of a cluster; 1: without clusters
  bool programmatic_launch, next_programmatic_launch;
  std::function<void()> thread;
};

// The largest shared memory of a block: Hopper's, or QLN_EMULATED_SMEM, which stands for a device with less.
std::size_t max_smem_bytes();
// How many SMs the device has: QLN_EMULATED_SMS, or 3, which are so few that several blocks of a persistent grid wait
// for each other.
int num_sms();
// The shared memory of each block that the device reserves.
constexpr std::size_t kReservedSmemBytes = 1024;
// The architecture that the code of kernels is of: QLN_EMULATED_PTX, or 90. Code of an earlier one has no
// griddepcontrol, and a grid of it must not be dependent.
int ptx_version();

// In a host thread the driver's functions can be called only after a context was bound, which launches, fills and
// allocations do too.
void bind_context();
void check_context(const char* call);

// Runs the grid, and returns when it is done. If the next grid is dependent, this one only begins when the last of such
// a chain is launched, and then all of them run: blocks of one begin before the others, in their middle, or after them,
// by the schedule. A dependent grid that follows no such grid ends the process.
// Several host threads may launch grids at once. A mistake of the kernel that no device would forgive (a deadlock,
// lanes that meet at different calls) ends the process, with file and line.
void launch(Grid grid);
// Runs the host thread's grids that are launched and have not begun. Whatever else a stream does must wait for them.
void run_pending_grids();
// The process ends if memory is allocated or released before the grids that may still use it have begun: `what` is done
// with it.
void check_no_pending_grid(const char* what);

// Fills fresh memory with values that a kernel must not rely on.
void poison(void* memory, std::size_t bytes);

// ---- called by fibers --------------------------------------------------------------------------------------------

// The position of the running fiber.
struct Position {
  int thread;
  int threads;
  std::int64_t block;
  std::int64_t blocks;
  std::byte* smem;
  std::size_t smem_bytes;
};
extern thread_local const Position* position;

[[noreturn]] void fail(const std::string& what);
// Ends the process if some of these bytes are not in the block's shared memory.
inline void check_shared(const void* p, std::size_t bytes) {
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(p) - reinterpret_cast<std::uintptr_t>(position->smem);
  if (at > position->smem_bytes || bytes > position->smem_bytes - at)
    fail("an access beyond the shared memory of a block");
}

void barrier(Site site);  // waits for all threads of the block
// The lanes of a warp meet: the last one to arrive runs `exchange` on the operands of all lanes; then all of them
// continue.
void warp_collective(void* lane, void (*exchange)(void* const* lanes), Site site);
// Waits until another block has set *flag to value.
void wait_for(const std::uint32_t* flag, std::uint32_t value, Site site);
// Publishes every store that the thread sees, then sets *flag to value.
void signal(std::uint32_t* flag, std::uint32_t value);
// The block publishes its stores and adds one to the counter. Returns whether this made it `count`.
bool is_last_to_arrive(std::uint32_t* counter, int count, Site site);
void griddepcontrol_wait(Site site);

// Whether the schedule is "concurrent". Under the others an access to memory is a plain copy.
extern constinit thread_local bool concurrent;
void load(void* to, const void* from, std::size_t bytes);
void store(void* to, const void* from, std::size_t bytes);
void yield();         // lets other threads and blocks run
void share_stores();  // makes the thread's stores visible to its block

// Copies in groups, like cp.async: each is only queued, and takes place when the thread waits for its group.
void copy_async(void* to, const void* from, int bytes, int zeros);
void commit_copies();
void wait_for_copies(int groups_left);

// These call the functions of async.h with the running thread and the shared memory of its block.
std::uint32_t shared_address(const void* p);
void note_shared_store(const void* p, std::size_t bytes);
void publish_shared_stores();
void mbarrier_init(std::uint64_t* barrier, int arrivals);
void mbarrier_publish();
void mbarrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes);
void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity, bool in_cluster, Site site);
void load_tile(void* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier);
void named_barrier(int number, int threads, Site site);
// The threads of a warpgroup meet, as the lanes of a warp do in warp_collective().
void warpgroup_collective(void* lane, void (*exchange)(void* const* lanes), Site site);
std::shared_ptr<WgmmaProduct> begin_wgmma(WgmmaProduct::ToF32 to_f32, int cols, std::uint64_t b_descriptor);
void compute_if_early(WgmmaProduct& product);
WgmmaQueue& wgmma_queue();
void set_max_registers(int count, Site site);

// The blocks of a cluster (cluster.cpp).
void cluster_barrier(bool releases, Site site);  // waits for all threads of all blocks of the cluster
// These store 16 bytes, load a tile and arrive at a barrier, each at the same offset in the shared memory of other
// blocks of the cluster: that of `rank`, or those whose bits are set in `ranks`.
void store_async(void* local, const std::byte* value, std::uint64_t* barrier, int rank);
void load_tile_to_blocks(void* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier,
                         std::uint32_t ranks);
void mbarrier_arrive_at_block(std::uint64_t* barrier, int rank);

}  // namespace emulator
}  // namespace qlora_native::cuda_emulated
