// Memory on the stream's device for the kernels of one call. It is from the application's allocator, if that has set
// one (runtime.h), else from the backend.
#pragma once

#include "device/simt.cuh"
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

template <class T>
__global__ void clear_kernel(T* at, std::int64_t count) {
  griddepcontrol_launch_dependents();
  for (std::int64_t i = thread_index(); i < count; i += block_threads()) at[i] = T{};
}

// The flags and tickets that blocks of a call's kernels share. A memset before all of the kernels sets them to 0. Where
// the first kernel calls griddepcontrol_wait() before it takes a ticket, a kernel does that instead, which the first
// one may overlap (LaunchShape::programmatic_launch), so that its launch costs no time.
class Counters {
 public:
  Counters(std::int64_t count, const Stream& stream, bool next_programmatic_launch = false)
      : workspace_(static_cast<std::size_t>(count) * sizeof(std::uint32_t), stream),
        next_(reinterpret_cast<std::uint32_t*>(workspace_.data())),
        next_programmatic_launch_(next_programmatic_launch && count > 0) {
    if (next_programmatic_launch_) {
      launch<clear_kernel<std::uint32_t>>({.blocks = 1, .threads = 256, .next_programmatic_launch = true}, stream,
                                          next_, count);
    } else if (count > 0) {
      fill_bytes(next_, 0, static_cast<std::size_t>(count) * sizeof(std::uint32_t), stream);
    }
  }
  bool next_programmatic_launch() const { return next_programmatic_launch_; }
  // The next `count` of them; null if there are none.
  std::uint32_t* take(std::int64_t count) {
    if (count == 0) return nullptr;
    next_ += count;
    return next_ - count;
  }

 private:
  const Workspace workspace_;
  std::uint32_t* next_;
  const bool next_programmatic_launch_;
};

}  // namespace qlora_native::QLN_CUDA
