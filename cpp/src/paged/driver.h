// The functions of a device's driver that paging and panels need. Driver is an interface, so that the order of the
// calls can be tested without a device. It is implemented by cuda/runtime/driver.cu and, for the emulator, by
// cuda/emulator/emulated_driver.h.
#pragma once

#include <cstddef>

namespace qlora_native {

// Paged arrays begin at multiples of this, in both memories: it is the alignment of cudaMalloc, and vector loads need
// it.
constexpr std::size_t kPagedAlignment = 256;

// The driver of one device, which it makes current for calls that need that. Pointers to streams and events come from
// the driver; a stream may also be a caller's. Work in a stream happens in order, and later: only synchronize() waits.
// Failures are exceptions, except when something is given back.
class Driver {
 public:
  // managed memory moves between host and device; pinned memory stays on the host, and the device can access it.
  enum class Memory { managed, pinned, device };
  enum class Place { host, device };

  virtual ~Driver() = default;

  // Whether host and device may use managed memory at the same time, and whether it can be prefetched.
  virtual bool is_concurrent() = 0;
  // Whether the stream is being captured into a graph.
  virtual bool is_capturing(void* stream) = 0;
  virtual std::size_t free_bytes() = 0;  // free memory of the device

  virtual void* allocate(Memory kind, std::size_t bytes) = 0;
  virtual void release(Memory kind, void* memory) noexcept = 0;
  // Tells the driver that this managed memory belongs on the host, and that the device may access it there.
  virtual void advise(void* memory, std::size_t bytes) = 0;
  // Whether all of [memory, memory + bytes) was last prefetched to the device.
  virtual bool is_on_device(const void* memory, std::size_t bytes) = 0;

  virtual void* create_stream() = 0;
  virtual void destroy_stream(void* stream) noexcept = 0;
  virtual void prefetch(void* memory, std::size_t bytes, Place place, void* stream) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes, void* stream) = 0;

  virtual void* create_event(bool timed = false) = 0;  // is_earlier() may compare timed events
  virtual void destroy_event(void* event) noexcept = 0;
  virtual void record(void* event, void* stream) = 0;
  virtual void wait(void* stream, void* event) = 0;  // work that is put into the stream from now on waits
  virtual void synchronize(void* event) noexcept = 0;
  virtual bool is_done(void* event) = 0;
  virtual bool is_earlier(void* first, void* second) = 0;  // both events must be done
};

}  // namespace qlora_native
