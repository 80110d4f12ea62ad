// The codebooks of the 4-bit formats and the 8-bit dynamic maps. They lie in the host's memory, so a caller copies them
// to the device before an operation on cuda.
#pragma once

#include <array>
#include <string_view>

#include "qlora_native/types.h"

namespace qlora_native {

// The 16 values of "nf4" (QLoRA, appendix E), "fp4" (bitsandbytes' e2m1 in bit-pattern order), "int4"
// ((i - 8) / 7 for i = 0 ... 15), or "mxfp4" and "nvfp4" (E2M1 in bit-pattern order: OCP Microscaling Formats v1.0,
// section 5.3.3). Throws Error on another name.
QLN_API const std::array<float, 16>& codebook(std::string_view format);

// The 8-bit dynamic map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015), as bitsandbytes'
// create_dynamic_map() lays it out: 256 ascending values.
//
//   signed     values in (-1, 1], element 127 is 0; for double-quantized scales and AdamW's first moment
//   unsigned   values in [0, 1], element 0 is 0; for AdamW's second moment
QLN_API const std::array<float, 256>& dynamic_map(bool is_signed = true);

}  // namespace qlora_native
