// The operations in the backend's table (backend.cu), and the folder of each. Their arguments have been checked. What
// their host code calls is included, too.
#pragma once

#include "backend.h"
#include "runtime/launch.h"
#include "runtime/workspace.h"

namespace qlora_native::QLN_CUDA {

void quantize(const QuantizeArgs&, const Stream&);                                  // quantize/
void quantize_absmax(const QuantizeAbsmaxArgs&, const Stream&);                     // quantize/
void quantize_microscaled(const QuantizeMicroscaledArgs&, const Stream&);           // quantize/
void dequantize(const DequantizeArgs&, const Stream&);                              // quantize/
void linear_forward(const LinearForwardArgs&, const Stream&);                       // product/linear.cu
void linear_backward_input(const LinearBackwardInputArgs&, const Stream&);          // product/linear.cu
void lora_gradients(const LoraGradientsArgs&, const Stream&);                       // product/
void cross_entropy(const CrossEntropyArgs&, const Stream&);                         // loss/
void gated_activation(const GatedActivationArgs&, const Stream&);                   // elementwise/
void gated_activation_backward(const GatedActivationBackwardArgs&, const Stream&);  // elementwise/
void rms_norm(const RmsNormArgs&, const Stream&);                                   // elementwise/
void rms_norm_backward(const RmsNormBackwardArgs&, const Stream&);                  // elementwise/
void optimizer_8bit_step(const Optimizer8bitArgs&, const Stream&);                  // optimizer/step.cu

}  // namespace qlora_native::QLN_CUDA
