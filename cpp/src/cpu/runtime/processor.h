// What this processor has, and what the operating system lets a process use of it.
#pragma once

namespace qlora_native {

bool has_avx2();         // and FMA, F16C, BMI2
bool has_avx512();       // F, BW, DQ, VL
bool has_avx512_bf16();  // and VBMI
bool has_amx_bf16();
bool has_amx_fp16();
bool amx_is_permitted();  // whether the operating system grants tile registers
bool has_arm_bf16();      // FEAT_BF16

}  // namespace qlora_native
