// What a kernel may use. The .cu files of the operations (product/, quantize/, optimizer/) are compiled twice: by nvcc
// with instructions.cuh, as the backend "cuda", and by the host's compiler with instructions_emulated.h, as the backend
// "cuda_emulated". QLN_CUDA is the namespace of the backend that is being compiled. Names and meanings are the same in
// both. runtime/launch.h does the same for host code.
#pragma once

#include <cstddef>
#include <cstdint>

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

// The shared memory that a block may have on every architecture from sm_80 on; sm_86, sm_89 and sm_120 have no more.
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
