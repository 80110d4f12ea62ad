// The driver of the emulated device (driver.h). Kernels run when they are launched. Work in a stream that the driver
// has created runs as late as possible, namely when something waits for it: so an update that does not wait for its
// prefetch computes with the old contents of the memory. Every call is reported to `trace`.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "paged/driver.h"

namespace qlora_native::cuda_emulated {

class EmulatedDriver final : public Driver {
 public:
  // What a test may set.
  struct Options {
    bool concurrent = true;
    bool capturing = false;
    bool eager = false;                                 // work in streams runs at once
    int events_left = std::numeric_limits<int>::max();  // that can be created
    std::size_t free_bytes = std::size_t{1} << 40;
    std::function<void(const std::string& call)> trace = [](const std::string&) {};
  };

  EmulatedDriver() = default;
  explicit EmulatedDriver(Options* options) : options_(options) {}
  ~EmulatedDriver() override;

  bool is_concurrent() override;
  bool is_capturing(void* stream) override;
  std::size_t free_bytes() override;
  void* allocate(Memory kind, std::size_t bytes) override;
  void release(Memory kind, void* memory) noexcept override;
  void advise(void* memory, std::size_t bytes) override;
  bool is_on_device(const void* memory, std::size_t bytes) override;
  void* create_stream() override;
  void destroy_stream(void* stream) noexcept override;
  void prefetch(void* memory, std::size_t bytes, Place place, void* stream) override;
  void copy(void* to, const void* from, std::size_t bytes, void* stream) override;
  void* create_event(bool timed) override;
  void destroy_event(void* event) noexcept override;
  void record(void* event, void* stream) override;
  void wait(void* stream, void* event) override;
  void synchronize(void* event) noexcept override;
  bool is_done(void* event) override;
  bool is_earlier(void* first, void* second) override;

 private:
  struct EmulatedStream {
    std::string name;
    std::vector<std::function<void()>> work;
    std::size_t done = 0;  // how many of `work` have run
  };
  struct Event {
    std::string name;
    EmulatedStream* stream = nullptr;  // where it was recorded; null is the caller's, in which nothing is pending
    std::size_t work = 0;              // how many pieces of the stream's work precede the event
    std::int64_t time = 0;             // when the stream reached the event
    bool timed = false;
  };
  void enqueue(void* stream, std::function<void()> work);
  static void run(EmulatedStream& stream, std::size_t work);
  std::string name_of(const void* memory) const;
  static std::string name_of_stream(void* stream);

  Options defaults_;
  Options* options_ = &defaults_;
  std::map<const std::byte*, std::vector<bool>> managed_;  // which pages are on the device
  std::map<const void*, std::string> names_;
  std::int64_t time_ = 0;
  int streams_ = 0, events_ = 0;
  int live_ = 0;  // streams, events and memory that were not released
};

}  // namespace qlora_native::cuda_emulated
