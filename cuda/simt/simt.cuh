// What a kernel may use. The .cu files of the operations (product/, quantize/, optimizer/) are compiled twice: by nvcc
// over device.cuh, as the backend "cuda", and by the host's compiler over host.h, an emulator, as the backend
// "cuda_emulated". QLN_CUDA is the namespace of the one being compiled; what both define has the same name and meaning
// in both.
//
//   launch<kernel>(shape, stream, args...)      no <<<>>>
//   dynamic_smem<T>()                           the block's shared memory; no __shared__
//   thread_index() block_index() ...            blocks and grids have one dimension
//   sync_threads() shfl_xor() mma_16x8x16() ... whatever threads do together
//   Bf16, F16                                   16-bit floats: bits, converted through to_f32 and from_f32
#pragma once

#include <cstddef>
#include <cstdint>

#include "qlora_native/types.h"

#ifdef __CUDACC__
#define QLN_CUDA cuda
#else
#define QLN_CUDA cuda_emulated
#endif

namespace qlora_native::QLN_CUDA {

constexpr int kWarp = 32;

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// As many as one vector instruction loads or stores; addresses are multiples of its size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

// What mma_16x8x16 takes: 16 rows, 8 columns, 16 of the inner dimension.
constexpr int kMmaRows = 16, kMmaCols = 8, kMmaInner = 16;

struct LaunchShape {
  std::int64_t blocks;         // fewer than 2^31; 0: nothing is launched
  int threads;                 // of a block, a multiple of 32
  std::size_t smem_bytes = 0;  // at most max_smem_bytes()
};

// What every architecture from sm_80 on gives a block: sm_86, sm_89 and sm_120 have the least.
constexpr std::size_t kLeastSmemBytes = 99 * 1024;

// Where a table in shared memory begins that SharedPlace::row_of_byte looks into: so many bytes behind a multiple of
// 64 KB. A block's begins at address 0 (in the machine code of sm_80), or behind the KB that a device keeps for itself
// (of sm_90), so that there is such a place near the beginning; product_config asks whether it is no more than that.
constexpr std::uint32_t kRowsBegin = 1024, kRowBytes = 256;

}  // namespace qlora_native::QLN_CUDA

#ifdef __CUDACC__
#include "simt/device.cuh"
#else
#include "simt/host.h"
#endif
#include "simt/workspace.h"
