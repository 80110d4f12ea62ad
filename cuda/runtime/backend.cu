// The table of the backend, "cuda" or "cuda_emulated". Each operation runs while its stream's device is current.
#include "backend.h"

#include "runtime/device_tensors.h"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {

std::unique_ptr<Driver> make_driver(int device);  // driver.cu, or emulator/emulated_driver.cpp

namespace {

template <class Args, void (*kOperation)(const Args&, const Stream&)>
void on_device(const Args& args, const Stream& stream) {
  const DeviceGuard guard(stream);
  with_device_tensors(args, [&](const Args& on_device) { kOperation(on_device, stream); });
}

}  // namespace

const Backend& backend() {
  static constexpr Backend table = {
      .quantize = on_device<QuantizeArgs, quantize>,
      .quantize_absmax = on_device<QuantizeAbsmaxArgs, quantize_absmax>,
      .quantize_microscaled = on_device<QuantizeMicroscaledArgs, quantize_microscaled>,
      .dequantize = on_device<DequantizeArgs, dequantize>,
      .linear_forward = on_device<LinearForwardArgs, linear_forward>,
      .linear_backward_input = on_device<LinearBackwardInputArgs, linear_backward_input>,
      .lora_gradients = on_device<LoraGradientsArgs, lora_gradients>,
      .cross_entropy = on_device<CrossEntropyArgs, cross_entropy>,
      .gated_activation = on_device<GatedActivationArgs, gated_activation>,
      .gated_activation_backward = on_device<GatedActivationBackwardArgs, gated_activation_backward>,
      .rms_norm = on_device<RmsNormArgs, rms_norm>,
      .rms_norm_backward = on_device<RmsNormBackwardArgs, rms_norm_backward>,
      .optimizer_8bit_step = on_device<Optimizer8bitArgs, optimizer_8bit_step>,
      .make_driver = make_driver,
  };
  return table;
}

}  // namespace qlora_native::QLN_CUDA
