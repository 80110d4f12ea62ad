// The device that runs qlora_native's operations, and memory that it shares with the host.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "qlora_native/qlora_native.h"

namespace trainer {

// This class is the CPU, whose operations have finished when they return. The GPU is in cuda.cpp.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const;
  virtual qlora_native::Stream stream() const { return {}; }
  // Waits for all work on the stream. Only then may the host touch memory that the work reads or writes.
  virtual void synchronize() {}
  virtual void* allocate(std::size_t bytes) { return ::operator new(bytes); }
  virtual void free(void* memory, std::size_t /*bytes*/) noexcept { ::operator delete(memory); }
};

// The device in use: the CPU, or the one that use_device() has chosen ("cpu" or "cuda") before any Shared was made.
Device& device();
void use_device(const std::string& name);

// Throws qlora_native::Unavailable if no GPU can be used. Defined in cuda.cpp or no_cuda.cpp.
std::unique_ptr<Device> make_cuda_device();

template <class T>
struct SharedAllocator {
  using value_type = T;

  SharedAllocator() = default;
  template <class U>
  SharedAllocator(const SharedAllocator<U>& /*other*/) {}
  T* allocate(std::size_t count) { return static_cast<T*>(device().allocate(count * sizeof(T))); }
  void deallocate(T* memory, std::size_t count) noexcept { device().free(memory, count * sizeof(T)); }
  template <class U>
  bool operator==(const SharedAllocator<U>& /*other*/) const {
    return true;
  }
};

// A vector in memory that the device in use can read and write too.
template <class T>
using Shared = std::vector<T, SharedAllocator<T>>;
using Floats = Shared<float>;

}  // namespace trainer
