// quantize_microscaled on the CPU, the same for every instruction set: its arithmetic is exact or a single rounding.
#pragma once

#include "qlora_native/quantize.h"

namespace qlora_native {

void quantize_microscaled_on_cpu(const QuantizeMicroscaledArgs& args, const Stream& stream);

}  // namespace qlora_native
