// The instruction sets. Each is a whole backend over the same algorithms (*-inl.h).
#pragma once

#include "backend.h"
#include "cpu/product/linear.h"

namespace qlora_native {

struct CpuBackend {
  Backend table;
  const Products* bf16 = nullptr;  // its products of bfloat16; null in the scalar one, which makes no jobs
};

const CpuBackend& reference_backend();     // the oracle of the others
const CpuBackend& avx2_backend();          // AVX2, FMA, F16C
const CpuBackend& avx512_backend();        // AVX-512 F, BW, DQ, VL
const CpuBackend& avx512_bf16_backend();   // the same and BF16, VBMI
const CpuBackend& amx_bf16_backend();      // the same and AMX-TILE, AMX-BF16
const CpuBackend& amx_emulated_backend();  // that in plain C++
const CpuBackend& neon_backend();          // Advanced SIMD of 64-bit Arm
const CpuBackend& neon_bf16_backend();     // the same and FEAT_BF16

}  // namespace qlora_native
