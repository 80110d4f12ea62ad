#include "device.h"

#include <stdexcept>

namespace qn = qlora_native;

namespace trainer {
namespace {

std::unique_ptr<Device>& current() {
  static std::unique_ptr<Device> device = std::make_unique<Device>();
  return device;
}

}  // namespace

std::string Device::name() const { return qn::current_isa() + ", " + std::to_string(qn::num_threads()) + " threads"; }

Device& device() { return *current(); }

void use_device(const std::string& name) {
  if (name == "cuda")
    current() = make_cuda_device();
  else if (name != "cpu")
    throw std::invalid_argument("--device: expected cpu or cuda, got " + name);
}

}  // namespace trainer
