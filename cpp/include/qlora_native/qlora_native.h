// Includes all of qlora_native: 4-bit weights, low-rank adapters, the products of both, and the optimizers.
#pragma once

#include "qlora_native/attention.h"      // attention, rotary: what a block computes on the CPU alone
#include "qlora_native/calibrate.h"      // gram, weighted_scales, quantize_with_feedback: calibrated quantization
#include "qlora_native/codebook.h"       // nf4, fp4, int4, E2M1; the 8-bit dynamic maps
#include "qlora_native/cross_entropy.h"  // cross_entropy: loss and gradient of rows of logits
#include "qlora_native/elementwise.h"    // gated_activation, rms_norm: the operations between a block's products
#include "qlora_native/error.h"          // Error, Unavailable
#include "qlora_native/linear.h"         // linear_forward, linear_backward_input, lora_gradients
#include "qlora_native/optimizer.h"      // optimizer_8bit_step: AdamW, Lion, AdEMAMix
#include "qlora_native/paged.h"          // PagedArena: state of optimizer_8bit_step that does not stay on the GPU
#include "qlora_native/paged_weights.h"  // PagedWeights: frozen weights that do not stay on the GPU
#include "qlora_native/quantize.h"  // quantize, quantize_absmax, quantize_microscaled, dequantize, check_quantized_weight
#include "qlora_native/runtime.h"  // instruction sets, threads
#include "qlora_native/types.h"    // DType, Device, Stream, Matrix, QuantizedWeightView
