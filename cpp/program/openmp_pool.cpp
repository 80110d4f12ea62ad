// Compiled into each program that links a shared library without a pool of its own (QLN_OPENMP_IN_PROGRAM).
#include "openmp_pool.h"
#include "qlora_native/runtime.h"

namespace {
struct UseOpenMP {
  UseOpenMP() { qlora_native::set_thread_pool(qlora_native::openmp_parallel_for, qlora_native::openmp_threads); }
} use_openmp;
}  // namespace
