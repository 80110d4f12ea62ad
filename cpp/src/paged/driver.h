// What paging and panels ask of a device's driver. An interface, so that the order of the calls is tested without a
// device: its implementations are cuda/driver.cu and the emulator's, cuda/simt/emulated_driver.h.
#pragma once

#include <cstddef>

namespace qlora_native {

// Of one device, which is made current where a call needs that. Streams and events are the driver's own pointers; a
// stream may also be a caller's. What is put into a stream happens in order, and later: only synchronize() waits.
// Failures are exceptions, except where something is given back.
class Driver {
 public:
  enum class Memory { managed, pinned, device };  // that moves; of the host, and the device sees it; of the device
  enum class Place { host, device };

  virtual ~Driver() = default;

  // Whether host and device may use managed memory at the same time, and prefetch it.
  virtual bool is_concurrent() = 0;
  // Whether the stream is being captured into a graph.
  virtual bool is_capturing(void* stream) = 0;
  virtual std::size_t free_bytes() = 0;  // of the device

  virtual void* allocate(Memory kind, std::size_t bytes) = 0;
  virtual void release(Memory kind, void* memory) noexcept = 0;
  // That `memory`, managed, belongs on the host, and that the device may reach it there.
  virtual void advise(void* memory, std::size_t bytes) = 0;
  // Where all of [memory, memory + bytes) was prefetched to last; false: not the device, or not all.
  virtual bool is_on_device(const void* memory, std::size_t bytes) = 0;

  virtual void* create_stream() = 0;
  virtual void destroy_stream(void* stream) noexcept = 0;
  virtual void prefetch(void* memory, std::size_t bytes, Place place, void* stream) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes, void* stream) = 0;

  virtual void* create_event(bool timed = false) = 0;  // timed: is_earlier() may compare it
  virtual void destroy_event(void* event) noexcept = 0;
  virtual void record(void* event, void* stream) = 0;
  virtual void wait(void* stream, void* event) = 0;  // of what comes into the stream from now on
  virtual void synchronize(void* event) noexcept = 0;
  virtual bool is_done(void* event) = 0;
  virtual bool is_earlier(void* first, void* second) = 0;  // of two that are done
};

}  // namespace qlora_native
