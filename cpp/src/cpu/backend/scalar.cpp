// The scalar backend.
#include "cpu/backend/isa.h"
#include "cpu/isa/scalar/reference.h"
#include "cpu/quantize/quantize_microscaled.h"

namespace qlora_native {

const CpuBackend& reference_backend() {
  static constexpr CpuBackend backend = {{
      .quantize = reference::quantize,
      .quantize_absmax = reference::quantize_absmax,
      .quantize_microscaled = quantize_microscaled_on_cpu,
      .dequantize = reference::dequantize,
      .linear_forward = reference::linear_forward,
      .linear_backward_input = reference::linear_backward_input,
      .lora_gradients = reference::lora_gradients,
      .cross_entropy = reference::cross_entropy,
      .gated_activation = reference::gated_activation,
      .gated_activation_backward = reference::gated_activation_backward,
      .rms_norm = reference::rms_norm,
      .rms_norm_backward = reference::rms_norm_backward,
      .attention = reference::attention,
      .attention_backward = reference::attention_backward,
      .rotary = reference::rotary,
      .gram = reference::gram,
      .weighted_scales = reference::weighted_scales,
      .quantize_with_feedback = reference::quantize_with_feedback,
      .optimizer_8bit_step = reference::optimizer_8bit_step,
  }};
  return backend;
}

}  // namespace qlora_native
