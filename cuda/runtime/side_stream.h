// A stream beside a caller's: the next panel is decoded in it while the caller's stream multiplies one (panels.cu).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "paged/driver.h"
#include "qlora_native/types.h"

namespace qlora_native {

class SideStream {
 public:
  explicit SideStream(std::unique_ptr<Driver> driver);
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  ~SideStream();

  // The side stream of a caller's stream. No other stream shares it, so two callers do not wait for each other, and
  // what is captured into a graph stays in that graph.
  static SideStream& of(const Stream& caller);

  // For each i in [0, count): prepare(i, stream), then use(i) in the caller's stream. The side stream prepares i + 1
  // while i is used, but not before i - 1 has been used, so two buffers are enough. Whatever is enqueued in the
  // caller's stream after this call runs after all of it, even if the call has thrown.
  void overlap(std::int64_t count, void* caller, const std::function<void(std::int64_t i, void* stream)>& prepare,
               const std::function<void(std::int64_t i)>& use);

 private:
  std::mutex mutex_;  // several threads may have the same stream
  std::unique_ptr<Driver> driver_;
  void* stream_ = nullptr;
  void *used_ = nullptr, *prepared_ = nullptr;  // events
};

}  // namespace qlora_native
