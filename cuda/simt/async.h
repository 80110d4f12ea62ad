// What runs beside the threads of a block on compute capability 9.0: barriers that count arrivals and bytes, copies of
// tiles, products of four warps. The emulator keeps them here, away from fibers (fibers.cpp), which call and wait:
//
//   - A barrier's phase is complete when as many arrivals as were said have come and all bytes that were expected. One
//     arrival more ends the process; so does a thread that arrives twice in a phase, waits twice for one, or has missed
//     one: PTX allows some of that, and our kernels want none of it.
//   - A copy of a tile spoils its destination when it is asked for, and takes place early or late, as the schedule has
//     it, in any order. It may only arrive at a barrier that was published to the copy engine.
//   - A product reads shared memory some time between its issue and the wait for it. Until that wait its sums are
//     spoiled; and neither they nor its registers may have been changed by then.
//   - What a thread writes by store_shared() the copy engine and products may read once that thread has published it
//     by fence_proxy_async(). (Writes through plain pointers are not followed.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt/tensor_map.h"

namespace qlora_native::cuda_emulated::emulator {

// The shared memory of a block has addresses of 18 bits here, as a matrix descriptor has them.
class SharedMemory {
 public:
  SharedMemory(std::byte* data, std::size_t bytes, std::uint32_t first_address);
  bool holds(const void* p, std::size_t bytes) const;
  std::uint32_t address_of(const void* p) const;
  std::byte* at(std::uint32_t address) const;  // ends the process where there is none
  // Writes of threads that the asynchronous proxy may not read yet.
  void note_store(const void* p, std::size_t bytes, int thread);
  void publish_stores(int thread);
  // The asynchronous proxy reads, or writes.
  void check_published(const void* p, std::size_t bytes, const char* reader) const;
  void forget_stores(const void* p, std::size_t bytes);

 private:
  static constexpr std::size_t kWord = 4;
  std::byte* const data_;
  const std::size_t bytes_;
  const std::uint32_t first_address_;
  std::vector<std::uint16_t> writers_;  // of each word that is not published: the thread and one; else 0
};

class Mbarriers {
 public:
  void init(std::uint64_t* barrier, int arrivals, int thread);
  void publish(int thread);  // those that a thread has made, to the copy engine
  void arrive(std::uint64_t* barrier, std::uint32_t expected_bytes, int thread);
  // The phase that the wait is for; is_complete() says whether it is over.
  std::int64_t begin_wait(std::uint64_t* barrier, std::uint32_t parity, int thread);
  bool is_complete(std::uint64_t* barrier, std::int64_t phase);
  void check_published(std::uint64_t* barrier);
  void complete_bytes(std::uint64_t* barrier, std::uint32_t bytes);

 private:
  struct Mbarrier {
    int arrivals, pending;
    std::int64_t bytes = 0;  // expected and not there, or the other way round
    std::int64_t phase = 0;  // that is under way
    int made_by;
    bool is_published = false;
    std::map<int, std::int64_t> waited, arrived;  // by thread: the last phase
  };
  Mbarrier& find(std::uint64_t* barrier);
  static void end_phase_if_complete(Mbarrier& barrier);
  std::map<const std::uint64_t*, Mbarrier> barriers_;
};

class TileCopies {
 public:
  TileCopies(SharedMemory& memory, Mbarriers& barriers) : memory_(memory), barriers_(barriers) {}
  // Begins a copy, of the tile whose first element is (row, col).
  void begin(std::byte* to, const TileSource& source, std::int64_t row, std::int64_t col, std::uint64_t* barrier);
  std::size_t under_way() const { return copies_.size(); }
  void finish(std::size_t i);

 private:
  struct Copy {
    std::byte* to;
    TileSource source;
    std::int64_t row, col;
    std::uint64_t* barrier;
  };
  // A 16-byte vector's place in shared memory.
  std::byte* place(const Copy& copy, std::int64_t bytes) const;
  SharedMemory& memory_;
  Mbarriers& barriers_;
  std::vector<Copy> copies_;
};

// a[64, 16] . b[16, cols] by the threads of a warpgroup.
class WgmmaProduct {
 public:
  using ToF32 = float (*)(std::uint16_t bits);
  WgmmaProduct(SharedMemory& memory, ToF32 to_f32, int cols, std::uint64_t b_descriptor);
  void take_a(int thread, const std::uint32_t (&a)[4]);
  void compute();  // if it was not yet: reads b
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

// A thread's part of the products of its warpgroup, in groups.
class WgmmaQueue {
 public:
  ~WgmmaQueue();
  void fence() { is_fenced_ = true; }
  void add(std::shared_ptr<WgmmaProduct> product, int thread, const std::uint32_t* a, float* d, int sums);
  void commit();
  void wait(std::size_t groups_left);
  bool empty() const { return groups_.empty() && open_.empty(); }

 private:
  struct Sums {
    std::vector<float> values;
    int under_way = 0;
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
  std::vector<std::vector<Part>> groups_;  // oldest first
  std::map<float*, Sums> sums_;            // that are spoiled in the meantime
};

[[noreturn]] void fail(const std::string& what);  // fibers.h

}  // namespace qlora_native::cuda_emulated::emulator
