// What a kernel may use beside simt.cuh on a device of compute capability 9.0 (sm_90a): barriers in shared memory that
// count arrivals and bytes, copies of tiles by the device's copy engine, and products of four warps. device_hopper.cuh
// has the instructions, host_hopper.h their emulation. Only files of product/hopper/ include this: what it promises
// compiles for no other architecture.
//
//   mbarrier_init/arrive/wait()   a phase is complete when all arrivals have come, and all bytes that were expected
//   tma_load_tile()               a tile of a matrix in global memory, which arrives at such a barrier
//   wgmma<kCols>()                d[64, kCols] += a[64, 16] . b[16, kCols]: a from registers, b from shared memory
//   fence_proxy_async()           what this thread stored to shared memory may be read by wgmma and TMA from here on
//   set_max_registers()           of each thread of a warpgroup
#pragma once

#include "simt/simt.cuh"
#include "simt/tensor_map.h"

namespace qlora_native::QLN_CUDA {

constexpr int kWarpgroup = 4 * kWarp;
// What wgmma multiplies: 64 rows, 16 of the inner dimension.
constexpr int kWgmmaRows = 64, kWgmmaInner = 16;
constexpr int kMbarrierBytes = 8;
// TMA writes to addresses of the first alignment. A tile of b whose rows have 128 bytes begins at one of the second,
// because vectors change places among eight of its rows.
constexpr int kTmaAlignment = 128, kSwizzledRowBytes = 128, kSwizzledAlignment = 8 * kSwizzledRowBytes;

}  // namespace qlora_native::QLN_CUDA

#ifdef __CUDACC__
#include "simt/device_hopper.cuh"
#else
#include "simt/host_hopper.h"
#endif

namespace qlora_native::QLN_CUDA {

// The descriptor describes wgmma's b, whose rows of 64 16-bit elements lie 128 bytes apart with the swizzle bytes_128.
// Rows of b are columns of the product; `address` is that of the first of 16 elements of the inner dimension. PTX ISA,
// "Matrix descriptor": addresses and distances in units of 16 bytes; the distance between groups of eight rows; 1 for
// the one along the rows, which this swizzle does not use; mode 1, 128 bytes.
constexpr std::uint64_t kDescriptorOfSwizzledRows =
    std::uint64_t{1} << 62 | std::uint64_t{kSwizzledAlignment / 16} << 32 | std::uint64_t{1} << 16;
constexpr std::uint64_t descriptor_of_swizzled_rows(std::uint32_t address) {
  return kDescriptorOfSwizzledRows | (address & 0x3FFFF) >> 4;
}

}  // namespace qlora_native::QLN_CUDA
