// A block that runs, with its threads as fibers. fibers.cpp runs the blocks of a grid, block.cpp the fibers of a block;
// rendezvous.cpp has what fibers wait for within their block, and accesses.cpp how they read and write global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "emulator/context.h"
#include "emulator/fibers.h"
#include "emulator/store_buffer.h"

namespace qlora_native::cuda_emulated::emulator {

constexpr int kWarp = 32;
// The stack of a fiber. A kernel's locals are small, but AddressSanitizer's redzones around them are not.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

inline std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// A copy by cp.async.
struct Copy {
  void* to;
  const void* from;
  int bytes, zeros;
  void run() const;  // accesses.cpp
};

struct Warp {
  int arrived = 0;
  Site site;
  void* lanes[kWarp];
  bool is_held_back = false;
};

// The threads that have arrived at a numbered barrier (bar.sync), or at a rendezvous of their warpgroup.
struct Rendezvous {
  std::vector<struct Fiber*> fibers;
  std::vector<void*> lanes;
  int threads = 0;
  Site site;
};
constexpr int kWarpgroup = 4 * kWarp;
constexpr int kNamedBarriers = 16;  // in a block

// A thread.
struct Fiber {
  enum class State { ready, at_barrier, at_rendezvous, waiting, at_mbarrier, done };
  Position position;
  struct Block* block;
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

// A grid that runs.
struct GridRun {
  const Grid& grid;
  const GridRun* before;    // the grid before it, which may not have ended yet; or null
  std::int64_t unfinished;  // blocks that have not ended
  std::uint32_t has_ended = 0;
  bool has_waited = false;  // a thread has called griddepcontrol_wait()
};

// The blocks of a cluster. cluster.cpp has what their threads do together.
struct Cluster {
  std::vector<struct Block*> blocks;      // by rank; null: it has not begun, or has ended
  std::vector<struct Fiber*> at_barrier;  // threads that wait at the barrier
  std::int32_t interval = 1;              // 1 + how many barriers all threads have passed
  bool is_released = false;               // the last of them was a release of each thread
  bool all_release = true;                // so far of those that have arrived at the next one
  int ended_threads = 0;
};

struct Block {
  GridRun& run;
  std::int64_t index;
  std::shared_ptr<Cluster> cluster;  // null in a kernel without clusters
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
  std::unique_ptr<AsyncStores> async_stores;  // from blocks of the cluster
  Rendezvous named_barriers[kNamedBarriers];
  std::vector<Rendezvous> warpgroups;
  std::vector<int> max_registers;  // for each warp; 0 if it has not called setmaxnreg
  bool is_last = false;            // the answer of is_last_to_arrive()
  int barriers_passed = 0;         // by all threads: the block's, and the cluster's

  Block(GridRun& run, std::int64_t index, std::shared_ptr<Cluster> cluster = nullptr);
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();

  int rank() const { return static_cast<int>(index % static_cast<std::int64_t>(cluster->blocks.size())); }
  bool done() const { return unfinished == 0; }
  // Resumes each fiber until it waits, round after round, until no fiber can run or `steps` fibers have been resumed.
  // Returns whether any was.
  bool advance(std::int64_t steps);
  const Grid& grid() const { return run.grid; }
  std::string describe_waits() const;  // what its fibers wait for
  // Issues a copy, which the schedule may also finish.
  void load_tile(std::byte* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier);
  void store_vector(std::byte* to, const std::byte* value, std::uint64_t* barrier);

 private:
  static void main_of_fiber();
  void release_barrier();
  // Under a random order some warps pause for some rounds, while the others run as far as barriers let them.
  void hold_back_some_warps();
  bool let_all_warps_run();  // returns whether any warp was held back
  // Tiles that TMA loads arrive in any order: at random times, or when no fiber can run.
  void finish_some_copies();
  bool finish_a_copy();  // returns whether there was one
};

// What the host thread runs: one fiber at a time, of the blocks of one grid, or of two.
extern constinit thread_local Fiber* current;
extern constinit thread_local Schedule schedule;

// A thread of the block ends, the last of them, or one of the others (cluster.cpp).
void end_thread_of_cluster(Block& block);

inline void suspend(Fiber& self, Fiber::State state, Site site) {
  self.state = state;
  self.site = site;
  self.context.switch_to(self.block->scheduler);
}

}  // namespace qlora_native::cuda_emulated::emulator
