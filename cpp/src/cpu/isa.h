// The instruction sets: each is a whole Backend over the same algorithms (generic/*-inl.h).
#pragma once

#include "backend.h"

namespace qlora_native {

const Backend& reference_backend();     // reference.cpp: scalar, the oracle of the others
const Backend& avx2_backend();          // avx2/backend.cpp: AVX2, FMA, F16C
const Backend& avx512_backend();        // avx512/backend_f32.cpp: AVX-512 F, BW, DQ, VL
const Backend& avx512_bf16_backend();   // avx512/backend_bf16.cpp: the same and BF16, VBMI
const Backend& amx_bf16_backend();      // amx/backend.cpp: the same and AMX-TILE, AMX-BF16
const Backend& amx_emulated_backend();  // amx/backend_emulated.cpp: that in plain C++
const Backend& neon_backend();          // neon/backend.cpp: Advanced SIMD of 64-bit Arm
const Backend& neon_bf16_backend();     // neon/backend_bf16.cpp: the same and FEAT_BF16

}  // namespace qlora_native
