// The functions that the application has set (runtime.h), for the backends that call them.
#pragma once

#include "qlora_native/runtime.h"

namespace qlora_native {

struct Hooks {
  ParallelFor parallel_for = nullptr;
  int (*threads)() = nullptr;
  AllocateMemory allocate = nullptr;
  ReleaseMemory release = nullptr;
  DenseGemm dense_gemm = nullptr;
};
const Hooks& hooks();  // runtime.cpp

// Kernels of products that disable_cuda_kernels() names, as bits, and those of a device.
enum CudaKernel : unsigned { kCudaGemv = 1, kCudaGemm = 2, kCudaWgmma = 4, kCudaPanels = 8 };
unsigned disabled_cuda_kernels(int device);  // runtime.cpp

// How many threads the pool has that is used where none was set (cpu/runtime/parallel.cpp).
int default_threads();

}  // namespace qlora_native
