// Memory on the stream's device for the kernels of one call. It is from the application's allocator, if that has set
// one (runtime.h), else from the backend.
#pragma once

#include "hooks.h"
#include "runtime/launch.h"

namespace qlora_native::QLN_CUDA {

class Workspace {
 public:
  Workspace(std::size_t bytes, const Stream& stream) : stream_(stream) {
    if (bytes == 0) return;
    if (hooks().allocate != nullptr) {
      memory_ = hooks().allocate(bytes, stream);
      make_reachable(memory_, bytes);
    } else {
      memory_ = allocate_workspace(bytes, stream);
    }
    poison(memory_.data, bytes);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (memory_.data == nullptr) return;
    if (hooks().allocate != nullptr) {
      make_unreachable(memory_);
      hooks().release(memory_, stream_);
    } else {
      release_workspace(memory_, stream_);
    }
  }
  std::byte* data() const { return static_cast<std::byte*>(memory_.data); }

 private:
  Stream stream_;
  DeviceMemory memory_;
};

// Sets words to 0 by a kernel, which the next kernel of the stream may overlap.
void clear_words(std::uint32_t* at, std::int64_t count, const Stream& stream);

// The flags and tickets that blocks of a call's kernels share. They are 0 after clear(), which precedes all of the
// kernels, and follows the allocation of all of the call's memory: nothing may come between kernels that overlap
// (LaunchShape::programmatic_launch).
class Counters {
 public:
  Counters(std::int64_t count, const Stream& stream)
      : stream_(stream),
        count_(count),
        workspace_(static_cast<std::size_t>(count) * sizeof(std::uint32_t), stream),
        next_(reinterpret_cast<std::uint32_t*>(workspace_.data())) {}
  // The next `count` of them; null if there are none.
  std::uint32_t* take(std::int64_t count) {
    if (count == 0) return nullptr;
    next_ += count;
    return next_ - count;
  }
  // Sets all of them to 0, by a memset. With `next_waits` the first kernel calls griddepcontrol_wait() before it takes
  // a ticket, so a kernel does it instead, which the first one may overlap, and its launch costs no time. Returns
  // whether the first kernel may be launched so.
  bool clear(bool next_waits = false) const {
    if (count_ == 0) return false;
    auto* const all = reinterpret_cast<std::uint32_t*>(workspace_.data());
    if (next_waits) {
      clear_words(all, count_, stream_);
    } else {
      fill_bytes(all, 0, static_cast<std::size_t>(count_) * sizeof(std::uint32_t), stream_);
    }
    return next_waits;
  }

 private:
  const Stream stream_;
  const std::int64_t count_;
  const Workspace workspace_;
  std::uint32_t* next_;
};

}  // namespace qlora_native::QLN_CUDA
