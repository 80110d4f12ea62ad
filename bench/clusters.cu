// Prints how many clusters of 2, 4 and 8 blocks the GPU holds at once, if a block has the threads and the shared memory
// of wgmma/. Graphics processing clusters differ in their number of SMs, so that large clusters leave some SMs idle.
//
//   nvcc -std=c++20 -arch=native -Icuda -Icpp/src -Icpp/include -o clusters bench/clusters.cu && ./clusters
#include <cstdio>
#include <cstdlib>

#include "product/config.h"

namespace {

constexpr int kThreads = 384;  // of wgmma/: two warpgroups that multiply, and one that loads

__global__ void kernel() {}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

}  // namespace

int main() {
  const int smem_bytes = static_cast<int>(qlora_native::wgmma_smem_bytes(256));
  int num_sms = 0, major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  if (major != 9) {
    std::printf("wgmma/ does not run on this GPU\n");
    return 0;
  }
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  for (const unsigned blocks : {2u, 4u, 8u}) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {blocks, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = smem_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    std::printf("clusters of %u: %d at once, on %u of %d SMs\n", blocks, clusters, clusters * blocks, num_sms);
  }
}
