// The instruction sets. Each is a whole backend over the same algorithms (*-inl.h).
#pragma once

#include "backend.h"
#include "cpu/product/linear.h"

namespace qlora_native {

struct CpuBackend {
  Backend table;
  const Products* bf16 = nullptr;  // its products of bfloat16; null in the scalar one, which makes no jobs
};

const CpuBackend& reference_backend();     // reference.cpp: scalar, the oracle of the others
const CpuBackend& avx2_backend();          // avx2/backend.cpp: AVX2, FMA, F16C
const CpuBackend& avx512_backend();        // avx512/backend_f32.cpp: AVX-512 F, BW, DQ, VL
const CpuBackend& avx512_bf16_backend();   // avx512/backend_bf16.cpp: the same and BF16, VBMI
const CpuBackend& amx_bf16_backend();      // amx/backend.cpp: the same and AMX-TILE, AMX-BF16
const CpuBackend& amx_emulated_backend();  // amx/backend_emulated.cpp: that in plain C++
const CpuBackend& neon_backend();          // neon/backend.cpp: Advanced SIMD of 64-bit Arm
const CpuBackend& neon_bf16_backend();     // neon/backend_bf16.cpp: the same and FEAT_BF16

}  // namespace qlora_native
