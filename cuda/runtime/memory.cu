// Memory for a Workspace if the application gives none. The library has a memory pool for each device, because the
// device's default pool would release all of it to the system at the next synchronization. This file has no device
// code.
#include <map>
#include <mutex>

#include "runtime/capture.h"
#include "runtime/launch.h"

namespace qlora_native::cuda {
namespace {

// The free memory that a pool does not release. It is more than a call with an inner dimension of 28,672 in 16 bits
// takes, which copies 8192 rows beside its panels (product/panels.cu).
constexpr std::uint64_t kReleaseThreshold = std::uint64_t{512} << 20;

cudaMemPool_t make_pool(int device) {
  const RelaxedCapture relaxed;
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  QLN_CHECK_CUDA(cudaMemPoolCreate(&pool, &properties));
  std::uint64_t bytes = kReleaseThreshold;
  QLN_CHECK_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &bytes));
  return pool;
}

cudaMemPool_t pool_of(int device) {
  // The pools are never destroyed: at the end of the process CUDA may be gone before statics are destroyed.
  static auto& pools = *new std::map<int, cudaMemPool_t>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const auto found = pools.find(device);
  return found != pools.end() ? found->second : pools.emplace(device, make_pool(device)).first->second;
}

}  // namespace

DeviceMemory allocate_workspace(std::size_t bytes, const Stream& stream) {
  DeviceMemory memory;
  QLN_CHECK_CUDA(cudaMallocFromPoolAsync(&memory.data, bytes, pool_of(stream.index), handle_of(stream)));
  return memory;
}

void release_workspace(const DeviceMemory& memory, const Stream& stream) {
  cudaFreeAsync(memory.data, handle_of(stream));
}

}  // namespace qlora_native::cuda
