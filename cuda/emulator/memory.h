// The memory of the emulated device is apart from the host's, like that of a real device. A registry holds all of it:
//
//   of the device  The memory that a Workspace takes, the driver's Memory::device, and a call's tensors, which are
//                  copied there and back (call_memory.h). Its pages can be accessed only while a DeviceWork lives: that
//                  is while a kernel runs, or the device does other work. If host code touches them at another time,
//                  the process ends with a message; on a real device the host would read other bytes, or fault.
//   managed        Managed and pinned memory, and memory that the application gives to a Workspace. Host code and
//                  kernels may access it at any time.
//
// A launch checks every word of its arguments. If a word is an address of mapped memory that is not in the registry,
// the process ends, because a kernel on a device could not read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace qlora_native::cuda_emulated::emulator {

// Memory of the device. `name` is for messages.
std::byte* allocate_on_device(std::size_t bytes, const std::string& name);
void release_on_device(void* memory);
// Managed memory, at a multiple of 256 bytes, as cudaMallocManaged's is.
std::byte* allocate_managed(std::size_t bytes, const std::string& name);
void release_managed(void* memory);

// Registers memory that the application owns as managed memory, until it is unregistered.
void register_managed(const void* memory, std::size_t bytes, const std::string& name);
void unregister_managed(const void* memory);

// Whether the address lies in memory that a kernel can reach.
bool is_reachable(const void* address);

// While an object of this class lives, the device is at work, and this process can access the device's pages.
class DeviceWork {
 public:
  DeviceWork();
  DeviceWork(const DeviceWork&) = delete;
  DeviceWork& operator=(const DeviceWork&) = delete;
  ~DeviceWork();
};

// Ends the process if a word of these bytes is an address that a kernel cannot reach. `call` is the launch's
// __PRETTY_FUNCTION__, which names the kernel; `number` is the argument's, counted from 1.
void check_argument(const char* call, int number, const std::byte* bytes, std::size_t size);
template <class T>
void check_argument(const char* call, int number, const T& argument) {
  if constexpr (sizeof(T) >= sizeof(void*)) {
    // Padding may hold old bytes that look like an address, so it is cleared.
    alignas(T) std::byte copy[sizeof(T)];
    std::memcpy(copy, &argument, sizeof(T));
#if __has_builtin(__builtin_clear_padding)
    __builtin_clear_padding(reinterpret_cast<T*>(copy));
#endif
    check_argument(call, number, copy, sizeof(T));
  }
}

// A standard allocator of managed memory, for a test's std::vector that kernels read and write.
template <class T>
struct ManagedAllocator {
  using value_type = T;
  ManagedAllocator() = default;
  template <class U>
  ManagedAllocator(const ManagedAllocator<U>&) {}
  T* allocate(std::size_t count) { return reinterpret_cast<T*>(allocate_managed(count * sizeof(T), "managed")); }
  void deallocate(T* memory, std::size_t) { release_managed(memory); }
  bool operator==(const ManagedAllocator&) const { return true; }
};

}  // namespace qlora_native::cuda_emulated::emulator
