// Memory for a Workspace if the host program gives none. It comes from the library's own pool for each device, because
// the device's default pool would give all of it back to the system at the next synchronization. This file has no
// device code.
#include <map>
#include <mutex>

#include "device/simt.cuh"
#include "runtime/capture.h"

namespace qlora_native::cuda {
namespace {

// A pool keeps so much free memory. It is more than a call with an inner dimension of 28,672 in 16 bits takes, which
// copies 8192 rows beside its panels (product/panels.cu).
constexpr std::uint64_t kKeptBytes = std::uint64_t{512} << 20;

cudaMemPool_t make_pool(int device) {
  const RelaxedCapture relaxed;
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  QLN_CHECK_CUDA(cudaMemPoolCreate(&pool, &properties));
  std::uint64_t bytes = kKeptBytes;
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

DeviceMemory allocate_own(std::size_t bytes, const Stream& stream) {
  DeviceMemory memory;
  QLN_CHECK_CUDA(cudaMallocFromPoolAsync(&memory.data, bytes, pool_of(stream.index), handle_of(stream)));
  return memory;
}

void release_own(const DeviceMemory& memory, const Stream& stream) { cudaFreeAsync(memory.data, handle_of(stream)); }

}  // namespace qlora_native::cuda
