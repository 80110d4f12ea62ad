// What the files of the scalar backend share.
#pragma once

#include "backend.h"

namespace qlora_native::reference {

// Element i of an array of `dtype`, from and to fp32 (reference.cpp).
float load(const void* data, DType dtype, std::int64_t i);
void store(void* data, DType dtype, std::int64_t i, float value);

void adamw_8bit_step(const AdamW8bitArgs& args, const Stream&);  // reference_adamw.cpp

}  // namespace qlora_native::reference
