// Replaces cuda.cpp if there is no CUDA toolkit.
#include "device.h"

namespace trainer {

std::unique_ptr<Device> make_cuda_device() {
  const std::string reason = qlora_native::cuda_unavailable_reason();
  throw qlora_native::Unavailable("--device cuda: " +
                                  (reason.empty() ? "this trainer was built where no CUDA toolkit was found: build it "
                                                    "again where nvcc is, or use --device cpu"
                                                  : reason));
}

}  // namespace trainer
