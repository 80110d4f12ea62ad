// Memory for the state of an 8-bit optimizer that does not stay on the GPU: PagedArena.
//
// An arena holds the state of one parameter group, in the order in which it is updated, in memory that host and device
// share (cudaMallocManaged). optimizer_8bit_step finds out by the addresses that a state lies in an arena, and then
// goes through it in stretches: while one is updated, the next comes to the device on a stream of the arena's own, and
// where memory is short the one before goes back. Nothing waits but the caller's stream, on events.
//
// Where managed memory cannot be used by host and device at once, the state lives in pinned memory of the host, and
// three stretches of device memory are its ring: one is filled, one updated, one copied back.
#pragma once

#include <memory>
#include <vector>

#include "qlora_native/optimizer.h"

namespace qlora_native {

class Driver;

// The state of one parameter: what room it needs.
struct PagedState {
  std::int64_t elements = 0;
  bool in_8_bits = true;  // else fp32, without absmax
  Algorithm algorithm = Algorithm::adamw;
};

struct PagedOptions {
  // Moments of a stretch. 32 MB take over a millisecond on a PCIe bus, a hundred times what asking for them does, and
  // of a GPU's memory three such stretches are little.
  std::size_t stretch_bytes = std::size_t{32} << 20;
  bool pinned = false;  // the ring, also where managed memory would do
};

struct PagedStats {
  std::int64_t bytes_managed = 0;   // of state in the arena
  std::int64_t bytes_resident = 0;  // of those, on the device
  std::int64_t prefetches = 0;      // stretches that were asked for ahead of their update
  std::int64_t stalls = 0;          // of those, how many an update had to wait for; known once both have happened
};

class QLN_API PagedArena {
 public:
  // Room for `states`, all zero. `stream`: whose device will update them.
  // Throws Error, and Unavailable where the device's backend has nothing to page: on the cpu.
  PagedArena(const std::vector<PagedState>& states, const Stream& stream, const PagedOptions& options = {});
  PagedArena(const std::vector<PagedState>& states, std::unique_ptr<Driver> driver,
             const PagedOptions& options);  // tests
  PagedArena(const PagedArena&) = delete;
  PagedArena& operator=(const PagedArena&) = delete;
  ~PagedArena();  // CUDA frees such memory when the device has done all that it was asked for before

  std::byte* data() const;  // host and device reach it; whatever was asked of the device must be done first
  std::size_t bytes() const;
  // Puts pointers to the state of states[index] into `tensor`; what it has not is null there. Of ademamix the second
  // and the third moment lie as bitsandbytes keeps them: state3 is state1 + elements, absmax3 absmax1 + blocks.
  void place(std::size_t index, Optimizer8bitTensor& tensor) const;
  PagedStats stats();  // waits for nothing; not while a step is being issued

  class Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace qlora_native
