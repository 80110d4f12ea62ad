// What the tests of the emulator share: memory that a test and its kernels access, and the orders of threads and
// blocks.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "emulator/memory.h"

namespace qlora_native::cuda_emulated {

template <class T>
using Managed = std::vector<T, emulator::ManagedAllocator<T>>;

const std::vector<std::string> kConcurrent = {"concurrent:1", "concurrent:2", "concurrent:3", "concurrent:4",
                                              "concurrent:5"};
const std::vector<std::string> kSchedules = [] {
  std::vector<std::string> all = {"forward", "reverse", "random:1", "random:2", "random:3"};
  all.insert(all.end(), kConcurrent.begin(), kConcurrent.end());
  return all;
}();

template <class F>
void under_each_schedule(const F& f, const std::vector<std::string>& schedules = kSchedules) {
  for (const std::string& schedule : schedules) {
    setenv("QLN_SCHEDULE", schedule.c_str(), 1);
    f();
  }
  unsetenv("QLN_SCHEDULE");
}

}  // namespace qlora_native::cuda_emulated
