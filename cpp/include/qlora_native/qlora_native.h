// qlora_native: 4-bit weights, low-rank adapters and the products over both. Table of contents:
#pragma once

#include "qlora_native/codebook.h"  // nf4, fp4, int4; the dynamic map of the scales
#include "qlora_native/error.h"     // Error, Unavailable
#include "qlora_native/linear.h"    // linear_forward, linear_backward_input, lora_gradients
#include "qlora_native/quantize.h"  // quantize, quantize_absmax, dequantize
#include "qlora_native/runtime.h"   // instruction sets, threads
#include "qlora_native/types.h"     // DType, Device, Stream, Matrix, QuantizedWeightView
