// What a kernel may use beside simt.cuh on a device of compute capability 9.0 (sm_90a): barriers in shared memory that
// count arrivals and bytes, copies of tiles by the device's copy engine, and products of four warps.
// instructions_hopper.cuh has the instructions, device/instructions_hopper_emulated.h their emulation. Only files of
// product/wgmma/ include this file, because these instructions compile for no other architecture.
//
//   mbarrier_init/arrive/wait()        a phase completes when all threads and all expected bytes have arrived
//   tma_load_tile()                    copies a tile of a matrix in global memory; its bytes count at such a barrier
//   wgmma<T, kCols>()                  d[64, kCols] += a[64, 16] . b[16, kCols]: a in registers, b in shared memory
//   sync_cluster()                     waits for all threads of a cluster's blocks (LaunchShape::cluster)
//   store_async()                      stores into the shared memory of a block of the cluster; its bytes count there
//   mbarrier_wait_in_cluster()         waits for what blocks of the cluster store so
//   tma_load_tile_multicast()          copies a tile to several blocks of the cluster
//   ClusterMbarriers                   such barriers of a block of the cluster, to arrive at
//   prefetch_map(), prefetch_sector()  prefetch a tensor map, and a sector of global memory into L2
//   fence_proxy_async()                lets wgmma and TMA read what this thread has stored to shared memory
//   de-, increase_max_registers()      set how many registers each thread of a warpgroup may use
#pragma once

#include "common/tensor_map.h"
#include "device/simt.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kWarpgroup = 4 * kWarp;
// A wgmma multiplies 64 rows over 16 elements of the inner dimension.
constexpr int kWgmmaRows = 64, kWgmmaInner = 16;
constexpr int kMbarrierBytes = 8;
constexpr int kSectorBytes = 32;  // what L2 loads at once
// TMA writes to addresses that are multiples of kTmaAlignment. A tile of b with rows of 128 bytes begins at a multiple
// of kSwizzledAlignment, because the swizzle repeats every eight rows.
constexpr int kTmaAlignment = 128, kSwizzledRowBytes = 128, kSwizzledAlignment = 8 * kSwizzledRowBytes;

}  // namespace qlora_native::QLN_CUDA

#ifdef __CUDACC__
#include "device/instructions_hopper.cuh"
#else
#include "device/instructions_hopper_emulated.h"
#endif

namespace qlora_native::QLN_CUDA {

// The descriptor of wgmma's b in shared memory, whose rows have 64 16-bit elements (128 bytes) and the swizzle
// bytes_128. A row of it is a column of the product. `address` is where the first of the 16 elements of the inner
// dimension lies. PTX ISA, "Matrix descriptor":
//
//   bits 0-13    the address, in units of 16 bytes
//   bits 16-29   the distance along the rows; this swizzle does not use it, and it is 1
//   bits 32-45   the distance between groups of eight rows, in units of 16 bytes
//   bits 62-63   the swizzle; 1 is 128 bytes
constexpr std::uint64_t kDescriptorOfSwizzledRows =
    std::uint64_t{1} << 62 | std::uint64_t{kSwizzledAlignment / 16} << 32 | std::uint64_t{1} << 16;
constexpr std::uint64_t descriptor_of_swizzled_rows(std::uint32_t address) {
  return kDescriptorOfSwizzledRows | (address & 0x3FFFF) >> 4;
}

}  // namespace qlora_native::QLN_CUDA
