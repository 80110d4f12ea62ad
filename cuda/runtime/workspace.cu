#include "runtime/workspace.h"

#include "device/simt.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

// No template of a header: before nvcc 13.0 a launch of one may take the code of another file that has it, and that of
// wgmma's files is for sm_90a alone.
__global__ void clear_kernel(std::uint32_t* at, std::int64_t count) {
  griddepcontrol_launch_dependents();
  for (std::int64_t i = thread_index(); i < count; i += block_threads()) at[i] = 0;
}

}  // namespace

void clear_words(std::uint32_t* at, std::int64_t count, const Stream& stream) {
  launch<clear_kernel>({.blocks = 1, .threads = 256, .next_programmatic_launch = true}, stream, at, count);
}

}  // namespace qlora_native::QLN_CUDA
