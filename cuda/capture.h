// What is made once and stays may first be needed while a graph is captured. Device builds only.
#pragma once

#include <cuda_runtime.h>

#include "simt/check.h"

namespace qlora_native::cuda {

// As long as it lives, this thread may call what a capture, its own or another thread's, forbids by default lest it
// wait for work that is only recorded: a new stream or pool waits for nothing, nor does a question after an event, and
// memory is given back when the device has done what it was asked for before.
class RelaxedCapture {
 public:
  RelaxedCapture() noexcept { cudaThreadExchangeStreamCaptureMode(&mode_); }  // fails for no mode that there is
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // and then what it was before
};

}  // namespace qlora_native::cuda
