#include "runtime/availability.h"

namespace qlora_native {
namespace {

constexpr int kMinMajor = 8;  // mma of bf16 and cp.async begin with sm_80

std::string describe_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
std::string describe(const CudaMachine::Gpu& gpu) {
  return gpu.name + " (compute capability " + std::to_string(gpu.major) + "." + std::to_string(gpu.minor) + ")";
}

// The first driver of a major version of CUDA. It runs every runtime of that version.
std::string first_driver_of(int major) {
  if (major == 12) return "R525";
  if (major == 13) return "R580";
  return "one of CUDA " + std::to_string(major) + ".0";
}

}  // namespace

std::string unavailable_reason(const CudaMachine& machine) {
  const std::string begin = "no CUDA device can be used here: ";
  const std::string built = "this build has CUDA " + describe_version(machine.runtime_version);
  const int major = machine.runtime_version / 1000;
  if (machine.driver_version == 0) {
    return begin + built + ", but no NVIDIA driver is installed; install driver " + first_driver_of(major) +
           " or later";
  }
  if (machine.driver_version / 1000 < major) {
    return begin + built + ", which needs the NVIDIA driver " + first_driver_of(major) +
           " or later, and the one installed is of CUDA " + describe_version(machine.driver_version) +
           "; update the driver, or build qlora_native with an nvcc of CUDA " +
           std::to_string(machine.driver_version / 1000);
  }
  if (!machine.error.empty()) return begin + machine.error;
  if (machine.gpus.empty()) return begin + "the driver reports no GPU; is CUDA_VISIBLE_DEVICES set?";
  std::string names;
  for (const CudaMachine::Gpu& gpu : machine.gpus) {
    if (gpu.major >= kMinMajor) return "";
    names += (names.empty() ? "" : ", ") + describe(gpu);
  }
  return begin + "expected a GPU of compute capability " + std::to_string(kMinMajor) + ".0 or later, got " + names;
}

std::string no_code_for(const CudaMachine::Gpu& gpu) {
  if (gpu.major < kMinMajor) {
    return describe(gpu) + ": expected a GPU of compute capability " + std::to_string(kMinMajor) + ".0 or later";
  }
  return "this build has no code for " + describe(gpu) +
         "; build qlora_native with CUDAARCHS=" + std::to_string(10 * gpu.major + gpu.minor);
}

}  // namespace qlora_native
