// Why the backend "cuda" cannot run on a machine, as a sentence that says what to do: a function of what the CUDA
// runtime says of the machine, so that it is tested where there is no GPU.
#pragma once

#include <string>
#include <vector>

namespace qlora_native {

struct CudaMachine {
  // As CUDA counts them: 13000 is CUDA 13.0. The driver's is the latest that it runs; 0: there is no driver.
  int runtime_version = 0;
  int driver_version = 0;
  std::string error;  // of the question after devices; empty: none
  struct Gpu {
    std::string name;
    int major, minor;  // the compute capability
  };
  std::vector<Gpu> gpus;
};

// Empty where a GPU can be used.
std::string unavailable_reason(const CudaMachine& machine);

// What to do about a launch for which this build has no code.
std::string no_code_for(const CudaMachine::Gpu& gpu);

}  // namespace qlora_native
