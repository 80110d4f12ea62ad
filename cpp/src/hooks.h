// The functions that the host program has set (runtime.h), for the backends that call them.
#pragma once

#include "qlora_native/runtime.h"

namespace qlora_native {

struct Hooks {
  AllocateMemory allocate = nullptr;
  ReleaseMemory release = nullptr;
  DenseGemm dense_gemm = nullptr;
};
const Hooks& hooks();  // runtime.cpp

}  // namespace qlora_native
