// The table of functions that every backend fills. Their arguments have been checked before they are called.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "qlora_native/attention.h"
#include "qlora_native/calibrate.h"
#include "qlora_native/cross_entropy.h"
#include "qlora_native/elementwise.h"
#include "qlora_native/linear.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native {

class Driver;  // paged/driver.h

struct Backend {
  void (*quantize)(const QuantizeArgs&, const Stream&);
  void (*quantize_absmax)(const QuantizeAbsmaxArgs&, const Stream&);
  void (*quantize_microscaled)(const QuantizeMicroscaledArgs&, const Stream&);
  void (*dequantize)(const DequantizeArgs&, const Stream&);
  void (*linear_forward)(const LinearForwardArgs&, const Stream&);
  void (*linear_backward_input)(const LinearBackwardInputArgs&, const Stream&);
  void (*lora_gradients)(const LoraGradientsArgs&, const Stream&);
  void (*cross_entropy)(const CrossEntropyArgs&, const Stream&);
  void (*gated_activation)(const GatedActivationArgs&, const Stream&);
  void (*gated_activation_backward)(const GatedActivationBackwardArgs&, const Stream&);
  void (*rms_norm)(const RmsNormArgs&, const Stream&);
  void (*rms_norm_backward)(const RmsNormBackwardArgs&, const Stream&);
  void (*attention)(const AttentionArgs&, const Stream&);  // only the CPU's tables have this and the next five
  void (*attention_backward)(const AttentionBackwardArgs&, const Stream&);
  void (*rotary)(const RotaryArgs&, const Stream&);
  void (*gram)(const GramArgs&, const Stream&);
  void (*weighted_scales)(const WeightedScalesArgs&, const Stream&);
  void (*quantize_with_feedback)(const QuantizeWithFeedbackArgs&, const Stream&);
  void (*optimizer_8bit_step)(const Optimizer8bitArgs&, const Stream&);
  std::unique_ptr<Driver> (*make_driver)(int device);  // for paging; null if the backend has none
};

// cpu/backend/isa.cpp: the instruction set in use as a backend, its name, and the names of all that this machine runs,
// best first.
const Backend& cpu_backend();
std::string cpu_isa();
std::vector<std::string> cpu_isas();

// cuda/runtime/backend.cu is compiled for devices and for an emulator of one. In a build without one of these,
// cuda/runtime/no_cuda.cpp or cuda/runtime/no_emulator.cpp defines the same symbols, and backend() throws Unavailable.
namespace cuda {
const Backend& backend();
std::string unavailable_reason();  // what runtime.h's cuda_unavailable_reason() returns
}  // namespace cuda
namespace cuda_emulated {
const Backend& backend();
}

// Both are in runtime.cpp. The second one is for what only the CPU's tables have, which also serve the emulated device:
// its memory is the host's. `instead` ends the error: what to use on a GPU.
const Backend& backend_for(const Stream& stream);
const Backend& backend_for_host(const Stream& stream, const char* operation, const char* instead = "");

}  // namespace qlora_native
