// Implements launch.h over the emulator.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string_view>
#include <tuple>

#include "emulator/fibers.h"
#include "emulator/memory.h"

namespace qlora_native::cuda_emulated {

// While an object of this class lives, host code may access the device's memory, as an application does that computes a
// dense product in a stream.
using emulator::DeviceWork;

template <auto kKernel>
int ptx_version(const Stream&) {
  return emulator::ptx_version();
}
inline void bind_context(const Stream&) { emulator::bind_context(); }

template <auto kKernel, class... Args>
void launch_kernel(const LaunchShape& shape, const Stream&, const Args&... args) {
  emulator::bind_context();
  int number = 0;
  (emulator::check_argument(__PRETTY_FUNCTION__, ++number, args), ...);
  emulator::launch({.blocks = shape.blocks,
                    .threads = shape.threads,
                    .smem_bytes = shape.smem_bytes,
                    .cluster = shape.cluster,
                    .programmatic_launch = shape.programmatic_launch,
                    .next_programmatic_launch = shape.next_programmatic_launch,
                    .thread = [all = std::tuple<Args...>(args...)] { std::apply(kKernel, all); }});
}

class DeviceGuard {
 public:
  explicit DeviceGuard(const Stream&) {}
};

inline DeviceMemory allocate_workspace(std::size_t bytes, const Stream&) {
  emulator::bind_context();
  emulator::check_no_pending_grid("allocated");
  return {.data = emulator::allocate_on_device(bytes, "a workspace")};
}
inline void release_workspace(const DeviceMemory& memory, const Stream&) {
  emulator::check_no_pending_grid("released");
  emulator::release_on_device(memory.data);
}
// Memory that the application gives is reachable for kernels from make_reachable() until make_unreachable().
inline void make_reachable(const DeviceMemory& memory, std::size_t bytes) {
  emulator::check_no_pending_grid("allocated");
  emulator::register_managed(memory.data, bytes, "a workspace in the application's memory");
}
inline void make_unreachable(const DeviceMemory& memory) {
  emulator::check_no_pending_grid("released");
  emulator::unregister_managed(memory.data);
}
// Fresh memory may hold anything. Here it is filled mostly with NaN, so that a kernel that reads it is found.
inline void poison(void* memory, std::size_t bytes) {
  const DeviceWork work;
  emulator::poison(memory, bytes);
}

inline void fill_bytes(void* data, int byte, std::size_t bytes, const Stream&) {
  emulator::bind_context();
  emulator::check_argument("fill_bytes", 1, data);
  emulator::run_pending_grids();
  const DeviceWork work;
  std::memset(data, byte, bytes);
}

inline int num_sms(const Stream&) { return emulator::num_sms(); }
inline std::size_t max_smem_bytes(const Stream&) { return emulator::max_smem_bytes(); }
inline std::size_t reserved_smem_bytes(const Stream&) { return emulator::kReservedSmemBytes; }

// No device has this number, so that no measurement decides for the emulator.
inline int compute_capability(const Stream&) { return 0; }
// The emulated device is a Hopper if QLN_FORCE_KERNEL names wgmma.
inline bool is_hopper(const Stream&) {
  const char* const forced = std::getenv("QLN_FORCE_KERNEL");
  return forced != nullptr && std::string_view(forced).starts_with("wgmma");
}

}  // namespace qlora_native::cuda_emulated
