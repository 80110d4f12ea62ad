// Memory of a Workspace where the host program gives none: of a pool of the library's own, one a device. The device's
// default pool would give all of it back to the system at the next synchronization. Host code alone, but the runtime's.
#include <map>
#include <mutex>

#include "capture.h"
#include "simt/simt.cuh"

namespace qlora_native::cuda {
namespace {

// Of free memory that a pool keeps: more than a call takes over 28,672 columns in 16 bits, which copies 8192 rows
// beside its panels (product/panels.cu).
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
  // For as long as the process: at its end CUDA may be gone before what is destroyed then.
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
