// The memory of the emulated device, apart from the host's, as a device's is. A registry knows all of it:
//
//   of the device  What a Workspace takes, the driver's Memory::device, and a call's tensors, which are copied there
//                  and back (call_memory.h). Its pages can be read and written while a DeviceWork lives, that is while
//                  a kernel runs, or what else the device does. Host code that touches them at another time ends the
//                  process with a sentence, where a real device would give it other bytes, or a fault.
//   of both        Managed and pinned memory, and what the host program gives a Workspace.
//
// A launch looks at every word of its arguments that is an address of mapped memory, and ends the process where that
// is not in the registry: a kernel on a device could not read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace qlora_native::cuda_emulated::emulator {

// Memory of the device, at a multiple of 256 bytes, as cudaMalloc's is. `name` is for messages.
std::byte* allocate_on_device(std::size_t bytes, const std::string& name);
void release_on_device(void* memory);
// The same of memory that host and device share.
std::byte* allocate_for_both(std::size_t bytes, const std::string& name);
void release_for_both(void* memory);

// Memory that the host program owns and says is the device's: kernels may be given it until it is withdrawn.
void declare_for_both(const void* memory, std::size_t bytes, const std::string& name);
void withdraw(const void* memory);

// Whether the address lies in memory that a kernel can reach.
bool is_reachable(const void* address);

// While one lives, the pages of the device can be accessed by this process: the device is at work.
class DeviceWork {
 public:
  DeviceWork();
  DeviceWork(const DeviceWork&) = delete;
  DeviceWork& operator=(const DeviceWork&) = delete;
  ~DeviceWork();
};

// Ends the process if a word of these bytes is an address that a kernel cannot reach. `call`: __PRETTY_FUNCTION__ of
// the launch, which names the kernel; `number`: of the argument, counted from 1.
void check_argument(const char* call, int number, const std::byte* bytes, std::size_t size);
template <class T>
void check_argument(const char* call, int number, const T& argument) {
  if constexpr (sizeof(T) >= sizeof(void*)) {
    // Padding holds what was there before, which may look like an address.
    alignas(T) std::byte copy[sizeof(T)];
    std::memcpy(copy, &argument, sizeof(T));
#if __has_builtin(__builtin_clear_padding)
    __builtin_clear_padding(reinterpret_cast<T*>(copy));
#endif
    check_argument(call, number, copy, sizeof(T));
  }
}

// A standard allocator of memory for both: a test's std::vector that kernels read and write.
template <class T>
struct ManagedAllocator {
  using value_type = T;
  ManagedAllocator() = default;
  template <class U>
  ManagedAllocator(const ManagedAllocator<U>&) {}
  T* allocate(std::size_t count) { return reinterpret_cast<T*>(allocate_for_both(count * sizeof(T), "managed")); }
  void deallocate(T* memory, std::size_t) { release_for_both(memory); }
  bool operator==(const ManagedAllocator&) const { return true; }
};

}  // namespace qlora_native::cuda_emulated::emulator
