// RelaxedCapture, for things that the library makes once and keeps: they may first be needed while a CUDA graph is
// captured. Only device builds include this file.
#pragma once

#include <cuda_runtime.h>

#include "runtime/check.h"

namespace qlora_native::cuda {

// By default a capture, in this thread or another, forbids calls that might wait for work that is only recorded. While
// an object of this class lives, this thread may make them. That is safe for the calls that need it: creating a stream
// or a pool, loading code, allocating memory and querying an event wait for nothing that is only recorded, an event
// that is waited for was recorded outside of captures, and memory is freed when the device has done its earlier work.
class RelaxedCapture {
 public:
  RelaxedCapture() noexcept { cudaThreadExchangeStreamCaptureMode(&mode_); }  // cannot fail with a valid mode
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // the constructor puts the old mode here
};

}  // namespace qlora_native::cuda
