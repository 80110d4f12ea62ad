// The codebooks of the 4-bit formats and the map of the double-quantized scales.
#pragma once

#include <array>
#include <string_view>

namespace qlora_native {

// The 16 values of "nf4" (QLoRA, appendix E), "fp4" (bitsandbytes' e2m1 in bit-pattern order) or "int4"
// ((i - 8) / 7 for i = 0 ... 15). Throws Error on another name.
const std::array<float, 16>& codebook(std::string_view format);

// The signed 8-bit dynamic map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015), as
// bitsandbytes' create_dynamic_map() lays it out: 256 ascending values in (-1, 1], element 127 is 0.
const std::array<float, 256>& dynamic_map();

}  // namespace qlora_native
