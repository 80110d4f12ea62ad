// Guards the reasons why a GPU cannot be used: each has its own sentence, which says what to do.
#include "runtime/availability.h"

#include <string>
#include <utility>

#include "expect.h"

namespace qlora_native {
namespace {

const CudaMachine::Gpu kHopper{"NVIDIA H100", 9, 0}, kTuring{"Tesla T4", 7, 5}, kThor{"NVIDIA Thor", 11, 0};

TEST(usable_gpu_has_no_reason) {
  // One usable GPU is enough. The driver may be newer than the runtime, or older with the same major version.
  EXPECT(unavailable_reason({13000, 13000, "", {kHopper}}) == "");
  EXPECT(unavailable_reason({12040, 13000, "", {kTuring, kHopper}}) == "");
  EXPECT(unavailable_reason({12080, 12000, "", {kHopper}}) == "");
}

TEST(each_cause_is_named) {
  const std::string insufficient = "CUDA driver version is insufficient for CUDA runtime version";
  const std::pair<CudaMachine, const char*> causes[] = {
      {{13000, 0, insufficient, {}},
       "this build has CUDA 13.0, but no NVIDIA driver is installed; install driver R580 or later"},
      {{13000, 12040, insufficient, {}},
       "this build has CUDA 13.0, which needs the NVIDIA driver R580 or later, and the one installed is of CUDA 12.4; "
       "update the driver, or build qlora_native with an nvcc of CUDA 12"},
      {{13000, 13000, "system not yet initialized", {}}, "system not yet initialized"},
      {{13000, 13000, "", {}}, "the driver reports no GPU; is CUDA_VISIBLE_DEVICES set?"},
      {{12040, 12040, "", {kTuring}},
       "expected a GPU of compute capability 8.0 or later, got Tesla T4 (compute capability 7.5)"},
  };
  for (const auto& [machine, cause] : causes)
    EXPECT(unavailable_reason(machine) == std::string("no CUDA device can be used here: ") + cause);
}

TEST(launch_without_code_says_how_to_build_it) {
  EXPECT(no_code_for(kThor) ==
         "this build has no code for NVIDIA Thor (compute capability 11.0); build qlora_native with CUDAARCHS=110");
  EXPECT(no_code_for(kTuring) ==
         "Tesla T4 (compute capability 7.5): expected a GPU of compute capability 8.0 or later");
}

}  // namespace
}  // namespace qlora_native

int main() { return run_tests(); }
