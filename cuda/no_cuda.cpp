// The cuda backend of a build without CUDA: the symbols of backend.cu, all of which say so.
#include "backend.h"
#include "qlora_native/error.h"
#include "qlora_native/runtime.h"

namespace qlora_native {
namespace {

constexpr const char* kReason = "this build has no CUDA backend: move the tensors to the CPU";

template <class Args>
void unavailable(const Args&, const Stream&) {
  throw Unavailable(kReason);
}

}  // namespace

std::string cuda_unavailable_reason() { return kReason; }

const Backend& cuda_backend() {
  static constexpr Backend backend = {
      .quantize = unavailable<QuantizeArgs>,
      .quantize_absmax = unavailable<QuantizeAbsmaxArgs>,
      .dequantize = unavailable<DequantizeArgs>,
      .linear_forward = unavailable<LinearForwardArgs>,
      .linear_backward_input = unavailable<LinearBackwardInputArgs>,
      .lora_gradients = unavailable<LoraGradientsArgs>,
      .adamw_8bit_step = unavailable<AdamW8bitArgs>,
  };
  return backend;
}

}  // namespace qlora_native
