// What is made once and stays may first be needed while a graph is captured. Device builds only.
#pragma once

#include <cuda_runtime.h>

#include "simt/check.h"

namespace qlora_native::cuda {

// As long as it lives, this thread may call what a capture forbids by default lest it wait for work that is only
// recorded: a new stream or pool waits for nothing.
class RelaxedCapture {
 public:
  RelaxedCapture() { QLN_CHECK_CUDA(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // and then what it was before
};

}  // namespace qlora_native::cuda
