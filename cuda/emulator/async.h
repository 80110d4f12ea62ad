// Emulates what runs beside the threads of a block on compute capability 9.0: barriers that count arrivals and bytes,
// copies of tiles, and products of four warps. Fibers (rendezvous.cpp) call these classes and wait for them. The rules:
//
//   - A phase of a barrier completes when all arrivals have been counted and all expected bytes have arrived. One
//     arrival too many ends the process. So does a thread that arrives twice in a phase, waits twice for a phase, or
//     misses one: PTX allows some of these, but our kernels do none of them.
//   - A copy of a tile fills its destination with NaN when it is issued. The schedule decides when it takes place and
//     in which order. Its barrier must have been published to the copy engine, and its destination must not overlap
//     that of another copy in flight. A multicast copy is a separate copy in each block (cluster.cpp). A vector that a
//     block stores into another one (st.async) is treated in the same way.
//   - A product reads shared memory at some time between its issue and the wait for it. Until that wait its
//     accumulators are NaN, and the thread must change neither them nor the registers of a.
//   - The copy engine and products may read what a thread has written by store_shared() only after that thread has
//     published it by fence_proxy_async(). (Writes through plain pointers are not tracked.)
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor_map.h"

namespace qlora_native::cuda_emulated::emulator {

// The shared memory of a block. Its addresses have 18 bits, like those in a matrix descriptor.
class SharedMemory {
 public:
  SharedMemory(std::byte* data, std::size_t bytes, std::uint32_t first_address);
  bool holds(const void* p, std::size_t bytes) const;
  std::uint32_t address_of(const void* p) const;
  std::byte* at(std::uint32_t address) const;  // ends the process if the address is outside
  // Tracks what threads have written and the asynchronous proxy (TMA and wgmma) may not read yet.
  void note_store(const void* p, std::size_t bytes, int thread);
  void publish_stores(int thread);
  // The first is called before the asynchronous proxy reads, the second after it has written.
  void check_published(const void* p, std::size_t bytes, const char* reader) const;
  void forget_stores(const void* p, std::size_t bytes);

 private:
  static constexpr std::size_t kWord = 4;
  std::byte* const data_;
  const std::size_t bytes_;
  const std::uint32_t first_address_;
  std::pair<std::size_t, std::size_t> words_of(const void* p, std::size_t bytes) const;  // the first, and the end
  std::vector<std::uint16_t> writers_;  // for each word: 1 + the thread that wrote it, or 0 if it is published
};

class Mbarriers {
 public:
  // `barriers_passed`: by all threads of the block until now.
  void init(std::uint64_t* barrier, int arrivals, int thread, int barriers_passed);
  // Another thread of the block may use a barrier when all threads have met after its initialization.
  void check_initialized(std::uint64_t* barrier, int thread, int barriers_passed);
  // Lets the copy engine use the barriers that this thread has initialized, and other blocks of the cluster from the
  // next interval on.
  void publish(int thread, std::int32_t interval);
  void arrive(std::uint64_t* barrier, std::uint32_t expected_bytes, int thread);
  // Returns the phase to wait for; is_complete() says whether that phase is over.
  std::int64_t begin_wait(std::uint64_t* barrier, std::uint32_t parity, int thread);
  bool is_complete(std::uint64_t* barrier, std::int64_t phase);
  void check_published(std::uint64_t* barrier);
  void check_published_before(std::int32_t interval, std::uint64_t* barrier);
  void complete_bytes(std::uint64_t* barrier, std::uint32_t bytes);
  // Tracks the barriers at which other blocks of the cluster arrive. Some thread must wait for each of their phases.
  void note_remote_arrivals(std::uint64_t* barrier) { find(barrier).has_remote_arrivals = true; }
  // At a barrier that counts what other blocks store, no thread may wait in the scope of its block.
  void note_remote_stores(std::uint64_t* barrier);
  void note_wait_in_block(std::uint64_t* barrier);
  bool remote_arrivals_were_waited_for() const;

 private:
  struct Mbarrier {
    int arrivals, pending;
    std::int64_t bytes = 0;  // bytes expected less bytes arrived; below 0 if bytes arrive before they are expected
    std::int64_t phase = 0;  // the current phase
    int initialized_by, initialized_in;  // thread, and how many barriers the block had passed
    bool is_published = false, has_remote_arrivals = false, has_remote_stores = false, has_waits_in_block = false;
    std::int32_t published_in = 0;                // interval
    std::map<int, std::int64_t> waited, arrived;  // each thread's last phase
  };
  Mbarrier& find(std::uint64_t* barrier);
  static void end_phase_if_complete(Mbarrier& barrier);
  static void check_scope_of_waits(const Mbarrier& barrier);
  std::map<const std::uint64_t*, Mbarrier> barriers_;
};

class TileCopies {
 public:
  TileCopies(SharedMemory& memory, Mbarriers& barriers) : memory_(memory), barriers_(barriers) {}
  // Issues a copy of the tile whose first element is (row, col).
  void begin(std::byte* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier);
  std::size_t in_flight() const { return copies_.size(); }
  void finish(std::size_t i);

 private:
  struct Copy {
    std::byte* to;
    TileSource source;
    std::int64_t row, col;
    std::uint64_t* barrier;
  };
  // The place in shared memory of the 16-byte vector that begins `bytes` into the tile.
  std::byte* place(const Copy& copy, std::int64_t bytes) const;
  SharedMemory& memory_;
  Mbarriers& barriers_;
  std::vector<Copy> copies_;
};

// Vectors that blocks of the cluster, this one included, store into the block's shared memory (cluster.cpp).
class AsyncStores {
 public:
  static constexpr std::size_t kBytes = 16;
  AsyncStores(SharedMemory& memory, Mbarriers& barriers) : memory_(memory), barriers_(barriers) {}
  void begin(std::byte* to, const std::byte* value, std::uint64_t* barrier);
  std::size_t in_flight() const { return stores_.size(); }
  void finish(std::size_t i);  // the last one takes the i-th place

 private:
  struct Store {
    std::byte* to;
    std::array<std::byte, kBytes> value;
    std::uint64_t* barrier;
  };
  SharedMemory& memory_;
  Mbarriers& barriers_;
  std::vector<Store> stores_;
};

// The product a[64, 16] . b[16, cols] that the threads of a warpgroup compute together.
class WgmmaProduct {
 public:
  using ToF32 = float (*)(std::uint16_t bits);
  WgmmaProduct(SharedMemory& memory, ToF32 to_f32, int cols, std::uint64_t b_descriptor);
  void set_a(int thread, const std::uint32_t (&a)[4]);
  void compute();  // reads b and multiplies; does nothing the second time
  void add_to(int thread, float* d) const;

 private:
  static constexpr int kRows = 64, kInner = 16;
  SharedMemory& memory_;
  const ToF32 to_f32_;
  const int cols_;
  const std::uint64_t descriptor_;
  float a_[kRows][kInner];
  std::vector<float> result_;  // [kRows][cols], or empty
};

// A thread's parts of its warpgroup's products, in the groups that wgmma_commit() closes.
class WgmmaQueue {
 public:
  ~WgmmaQueue();
  void fence() { is_fenced_ = true; }
  void add(std::shared_ptr<WgmmaProduct> product, int thread, const std::uint32_t* a, float* d, int count);
  void commit();
  void wait(std::size_t groups_left);
  bool empty() const { return groups_.empty() && open_.empty(); }

 private:
  struct Accumulators {
    std::vector<float> values;
    int products = 0;  // in flight
  };
  struct Part {
    std::shared_ptr<WgmmaProduct> product;
    int thread;
    const std::uint32_t* a;
    std::uint32_t issued[4];
    float* d;
  };
  bool is_fenced_ = false;
  std::vector<Part> open_;
  std::vector<std::vector<Part>> groups_;        // oldest first
  std::map<float*, Accumulators> accumulators_;  // the values of each d, which holds NaN until the wait
};

[[noreturn]] void fail(const std::string& what);  // fibers.h

}  // namespace qlora_native::cuda_emulated::emulator
