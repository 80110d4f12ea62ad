// What each file of this folder gives the backend. Arguments have been checked.
#pragma once

#include "backend.h"
#include "gemm_config.h"
#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

void quantize(const QuantizeArgs&, const Stream&);
void quantize_absmax(const QuantizeAbsmaxArgs&, const Stream&);
void dequantize(const DequantizeArgs&, const Stream&);
void linear_forward(const LinearForwardArgs&, const Stream&);
void linear_backward_input(const LinearBackwardInputArgs&, const Stream&);
// Products of the kind that gemm_config has chosen: on tensor cores, for few rows, for many. `u` and `v` are given.
void gemm_forward(const LinearForwardArgs&, const ConstMatrix& u, const GemmConfig&, const Stream&);
void gemm_backward(const LinearBackwardInputArgs&, const ConstMatrix& v, const GemmConfig&, const Stream&);
void gemv_forward(const LinearForwardArgs&, const ConstMatrix& u, const GemmConfig&, const Stream&);
void panels_forward(const LinearForwardArgs&, const ConstMatrix& u, const GemmConfig&, const Stream&);
void panels_backward(const LinearBackwardInputArgs&, const ConstMatrix& v, const GemmConfig&, const Stream&);
void lora_gradients(const LoraGradientsArgs&, const Stream&);
void optimizer_8bit_step(const Optimizer8bitArgs&, const Stream&);

}  // namespace qlora_native::QLN_CUDA
