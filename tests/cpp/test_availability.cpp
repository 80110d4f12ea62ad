// Guards the reasons why a GPU cannot be used: each has its own sentence, which says what to do.
#include "runtime/availability.h"

#include "expect.h"

namespace qlora_native {
namespace {

const CudaMachine::Gpu kHopper{"NVIDIA H100", 9, 0}, kTuring{"Tesla T4", 7, 5}, kThor{"NVIDIA Thor", 11, 0};

TEST(usable_gpu_has_no_reason) {
  EXPECT(unavailable_reason({.runtime_version = 13000, .driver_version = 13000, .error = "", .gpus = {kHopper}}) == "");
  // One usable GPU is enough. The driver may be newer than the runtime ...
  EXPECT(unavailable_reason(
             {.runtime_version = 12040, .driver_version = 13000, .error = "", .gpus = {kTuring, kHopper}}) == "");
  // ... or older, with the same major version.
  EXPECT(unavailable_reason({.runtime_version = 12080, .driver_version = 12000, .error = "", .gpus = {kHopper}}) == "");
}

TEST(missing_driver_and_old_driver_are_told_apart) {
  EXPECT(unavailable_reason({.runtime_version = 13000,
                             .driver_version = 0,
                             .error = "CUDA driver version is insufficient for CUDA runtime version",
                             .gpus = {}}) ==
         "no CUDA device can be used here: this build has CUDA 13.0, but no NVIDIA driver is installed; install driver "
         "R580 or later");
  EXPECT(unavailable_reason({.runtime_version = 13000,
                             .driver_version = 12040,
                             .error = "CUDA driver version is insufficient for CUDA runtime version",
                             .gpus = {}}) ==
         "no CUDA device can be used here: this build has CUDA 13.0, which needs the NVIDIA driver R580 or later, and "
         "the one installed is of CUDA 12.4; update the driver, or build qlora_native with an nvcc of CUDA 12");
}

TEST(other_causes_are_named) {
  EXPECT(unavailable_reason(
             {.runtime_version = 13000, .driver_version = 13000, .error = "system not yet initialized", .gpus = {}}) ==
         "no CUDA device can be used here: system not yet initialized");
  EXPECT(unavailable_reason({.runtime_version = 13000, .driver_version = 13000, .error = "", .gpus = {}}) ==
         "no CUDA device can be used here: the driver reports no GPU; is CUDA_VISIBLE_DEVICES set?");
  EXPECT(unavailable_reason({.runtime_version = 12040, .driver_version = 12040, .error = "", .gpus = {kTuring}}) ==
         "no CUDA device can be used here: expected a GPU of compute capability 8.0 or later, got Tesla T4 (compute "
         "capability 7.5)");
}

TEST(launch_without_code_says_how_to_build_it) {
  EXPECT(no_code_for(kThor) ==
         "this build has no code for NVIDIA Thor (compute capability 11.0); build qlora_native with CUDAARCHS=110");
  EXPECT(no_code_for(kTuring) ==
         "Tesla T4 (compute capability 7.5): expected a GPU of compute capability 8.0 or later");
}

}  // namespace
}  // namespace qlora_native

int main() {
  using namespace qlora_native;
  return run_tests();
}
