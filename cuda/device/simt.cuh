// What a kernel may use. The .cu files of the operations (product/, quantize/, optimizer/) are compiled twice: by nvcc
// with instructions.cuh, as the backend "cuda", and by the host's compiler with device/instructions_emulated.h, an
// emulator, as the backend "cuda_emulated". QLN_CUDA is the namespace of the backend that is being compiled. Names and
// meanings are the same in both.
//
//   launch<kernel>(shape, stream, args...)      launches a kernel, instead of <<<
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

// The elements that one vector instruction loads or stores. Its address must be a multiple of its size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

// mma_16x8x16 multiplies 16 rows by 8 columns, over 16 elements of the inner dimension.
constexpr int kMmaRows = 16, kMmaCols = 8, kMmaInner = 16;

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
  // All memory of both must be there until this kernel has been launched.
  bool programmatic_launch = false;
  bool next_programmatic_launch = false;  // the kernel that is launched next; for the emulator alone
};

// Every architecture from sm_80 on gives a block at least so much; sm_86, sm_89 and sm_120 give no more.
constexpr std::size_t kMinSmemBytes = 99 * 1024;

// SharedAddress::row_of_byte looks into a table that begins kRowsBegin bytes behind a multiple of 64 KB in shared
// memory. There is such a place near the beginning, because a block's shared memory begins at address 0 (in the machine
// code of sm_80) or behind the KB that a device keeps for itself (sm_90). product_config checks that a device keeps no
// more.
constexpr std::uint32_t kRowsBegin = 1024, kRowBytes = 256;

}  // namespace qlora_native::QLN_CUDA

#ifdef __CUDACC__
#include "device/instructions.cuh"
#else
#include "device/instructions_emulated.h"
#endif
#include "runtime/workspace.h"
