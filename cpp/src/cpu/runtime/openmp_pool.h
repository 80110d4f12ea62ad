// The thread pool of a program without torch, which is OpenMP's. The library or the program includes this file,
// whichever is compiled with OpenMP.
#pragma once
#include <omp.h>

#include <cstdint>

namespace qlora_native {

inline void openmp_parallel_for(std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
#pragma omp parallel for schedule(static, 1)
  for (std::int64_t task = 0; task < tasks; ++task) body(context, task, task + 1);
}

inline int openmp_threads() { return omp_get_max_threads(); }

}  // namespace qlora_native
