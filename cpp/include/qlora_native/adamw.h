// The names in optimizer.h from the time when AdamW was the only algorithm. AdamW is still the default.
#pragma once

#include "qlora_native/optimizer.h"

namespace qlora_native {

constexpr int kAdamW8bitBlocksize = kOptimizer8bitBlocksize;
using AdamW8bitTensor = Optimizer8bitTensor;
using AdamW8bitGroup = Optimizer8bitGroup;
using AdamW8bitArgs = Optimizer8bitArgs;
inline void adamw_8bit_step(const AdamW8bitArgs& args, const Stream& stream = {}) { optimizer_8bit_step(args, stream); }

}  // namespace qlora_native
