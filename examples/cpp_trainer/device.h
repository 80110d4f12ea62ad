// Where qlora_native's operations run, and memory that they and the host both see.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "qlora_native/qlora_native.h"

namespace trainer {

// The cpu, whose operations have ended when they return. cuda.cpp has a GPU.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const;
  virtual qlora_native::Stream stream() const { return {}; }
  // Returns when all that the stream was given is done: only then may the host touch what that reads or writes.
  virtual void synchronize() {}
  virtual void* allocate(std::size_t bytes) { return ::operator new(bytes); }
  virtual void free(void* memory, std::size_t /*bytes*/) noexcept { ::operator delete(memory); }
};

// The one in use: the cpu, or what use_device() has chosen, "cpu" or "cuda", before there was any Shared memory.
Device& device();
void use_device(const std::string& name);

// Throws qlora_native::Unavailable where there is no GPU, or none that will do. In cuda.cpp, or no_cuda.cpp.
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

// A vector that the device in use sees too.
template <class T>
using Shared = std::vector<T, SharedAllocator<T>>;
using Floats = Shared<float>;

}  // namespace trainer
