// Launches, memory and attributes of a device, for host code. As of the instructions (device/simt.cuh), there are two
// implementations with the same names: by the CUDA runtime, and over the emulator.
//
//   launch<kernel>(shape, stream, args...)                launches a kernel, instead of <<<
//   fill_bytes(data, byte, bytes, stream)                 as cudaMemsetAsync
//   num_sms, max_smem_bytes, reserved_smem_bytes(stream)  attributes of the stream's device
//   compute_capability(stream)                            90 for 9.0
//   is_hopper(stream)                                     whether it has the instructions of device/hopper.cuh
//   ptx_version<kernel>(stream)                           the architecture that the device's code of a kernel is of
//   bind_context(stream)                                  lets this host thread call the driver
//   DeviceGuard(stream)                                   makes the stream's device current while it lives
//   allocate_workspace, release_workspace, poison         memory of a Workspace (workspace.h)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/layout.h"
#include "device/simt.cuh"
#include "qlora_native/runtime.h"
#include "qlora_native/types.h"

namespace qlora_native::QLN_CUDA {

struct LaunchShape {
  std::int64_t blocks;         // fewer than 2^31; 0: nothing is launched
  int threads;                 // in each block; a multiple of 32
  std::size_t smem_bytes = 0;  // at most max_smem_bytes()
  // Blocks of a cluster, which run at the same time and reach each other's shared memory (hopper.cuh): a divisor of
  // `blocks`, at most 8. 1: there are no clusters, which not every architecture has.
  int cluster = 1;
  // The kernel may begin before the one launched before it has ended, on devices of compute capability 9.0 or more. It
  // must call griddepcontrol_wait() before it reads what that kernel writes, and before it writes what that kernel
  // reads or writes. A block of it must call that in any case, because the kernel after it begins when it has ended.
  // All memory of both must be there until this kernel has been launched, and nothing else may be put into the stream
  // between them, an allocation neither.
  bool programmatic_launch = false;
  bool next_programmatic_launch = false;  // the kernel that is launched next; for the emulator alone
};

}  // namespace qlora_native::QLN_CUDA

#ifdef __CUDACC__
#include "runtime/launch_cuda.h"
#else
#include "runtime/launch_emulated.h"
#endif

namespace qlora_native::QLN_CUDA {

// Whether the device's code of a kernel has griddepcontrol, which begins with compute_90. A later device does not tell:
// it may run PTX of compute_80, which a driver has compiled for it, and in which griddepcontrol_wait() is empty.
template <auto kKernel>
bool has_griddepcontrol(const Stream& stream) {
  constexpr int kFirst = 90;
  return ptx_version<kKernel>(stream) >= kFirst;
}

template <auto kKernel, class... Args>
void launch(LaunchShape shape, const Stream& stream, const Args&... args) {
  if (shape.programmatic_launch && !has_griddepcontrol<kKernel>(stream)) shape.programmatic_launch = false;
  launch_kernel<kKernel>(shape, stream, args...);
}

// The grid of a grid-stride loop over `items` items, with no more blocks than fill the device a few times.
inline LaunchShape looping_grid(std::int64_t items, int threads, const Stream& stream) {
  constexpr std::int64_t kBlocksPerSm = 8;
  const std::int64_t blocks = ceil_div(items, threads);
  const std::int64_t max_blocks = kBlocksPerSm * num_sms(stream);
  return {.blocks = blocks < max_blocks ? blocks : max_blocks, .threads = threads};
}

}  // namespace qlora_native::QLN_CUDA
