// PagedArena: memory for the state of an 8-bit optimizer that does not stay on the GPU.
//
// An arena holds the state of one parameter group, in the order in which it is updated, in memory that host and device
// share (cudaMallocManaged). optimizer_8bit_step recognizes a state in an arena by its address, and updates the arena
// segment by segment. While it updates one segment, the next one is prefetched to the device on the arena's own
// stream, and if memory is short the one before goes back to the host. Only the caller's stream waits, on events.
//
// If host and device cannot use managed memory at the same time, the state lies in pinned memory of the host. Three
// slots of device memory form a ring: one segment is copied in, one is updated, and one is copied back.
#pragma once

#include <memory>
#include <vector>

#include "qlora_native/optimizer.h"

namespace qlora_native {

// Describes the state of one parameter, which decides how much memory it needs.
struct PagedState {
  std::int64_t elements = 0;
  bool in_8_bits = true;  // false for fp32 state, which has no absmax
  Algorithm algorithm = Algorithm::adamw;
};

struct PagedOptions {
  // The bytes of moments in a segment. 32 MB take over a millisecond on a PCIe bus, a hundred times as long as the call
  // that copies them; and three such segments are a small part of a GPU's memory.
  std::size_t segment_bytes = std::size_t{32} << 20;
  bool pinned = false;  // use pinned memory and the ring even if managed memory can be used
};

struct PagedStats {
  std::int64_t bytes_managed = 0;   // the state in the arena
  std::int64_t bytes_resident = 0;  // the part of it that is on the device
  std::int64_t prefetches = 0;      // how many segments were fetched ahead of their update
  std::int64_t stalls = 0;          // how many of these an update had to wait for; counted once both have happened
};

class QLN_API PagedArena {
 public:
  // Allocates memory for `states` and sets it to zero. The device of `stream` will update them. Throws Error; throws
  // Unavailable if the backend of the device has no paging, as the cpu's.
  PagedArena(const std::vector<PagedState>& states, const Stream& stream, const PagedOptions& options = {});
  PagedArena(const PagedArena&) = delete;
  PagedArena& operator=(const PagedArena&) = delete;
  ~PagedArena();  // CUDA frees the memory when the device has done all work that it was given before

  std::byte* data() const;  // also for the host, once the device has done all work that it was given
  std::size_t bytes() const;
  // Puts pointers to the state of states[index] into `tensor`; those to moments that it does not have become null. The
  // first and the third moment of ademamix lie as bitsandbytes keeps them: state3 is state1 + elements, and absmax3 is
  // absmax1 + blocks.
  void place(std::size_t index, Optimizer8bitTensor& tensor) const;
  PagedStats stats();  // waits for nothing; not to be called while a step is being issued

  class Impl;

 private:
  explicit PagedArena(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace qlora_native
