// Says why the backend "cuda" cannot run on a machine, and what to do about it. The functions take a description of the
// machine, which the CUDA runtime fills in, so that they can be tested without a GPU.
#pragma once

#include <string>
#include <vector>

namespace qlora_native {

struct CudaMachine {
  // Versions as CUDA writes them: 13000 is CUDA 13.0. The driver's is the latest that it runs; 0 if there is no driver.
  int runtime_version = 0;
  int driver_version = 0;
  std::string error;  // the error when devices were counted; empty if there was none
  struct Gpu {
    std::string name;
    int major, minor;  // the compute capability
  };
  std::vector<Gpu> gpus;
};

// Empty if a GPU can be used.
std::string unavailable_reason(const CudaMachine& machine);

// Says what to do if this build has no code for the GPU.
std::string no_code_for(const CudaMachine::Gpu& gpu);

}  // namespace qlora_native
