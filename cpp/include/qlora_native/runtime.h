// What the library found on this machine, and what a host program may set: its thread pool, its dense product, and on a
// GPU its memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "qlora_native/export.h"
#include "qlora_native/types.h"

namespace qlora_native {

// Runs body(context, begin, end) over pieces that cover [0, tasks), and returns when all are done.
using ParallelFor = void (*)(std::int64_t tasks, void (*body)(void* context, std::int64_t begin, std::int64_t end),
                             void* context);

// Replaces the thread pool (OpenMP's by default, where the library was built with it). `threads` says how many
// threads that pool has at the moment. Not to be called while an operation runs.
//
// Fork after use: GCC's OpenMP does not survive fork(). In a child that was forked after its parent's first parallel
// operation, here or anywhere in the process, the child's first operation waits for threads that it does not have, for
// ever. Fork before that, start the program anew (exec), let the child run with one thread (omp_set_num_threads(1)), or
// give a pool that begins its threads in each process, like the one of tests/cpp/pool.h.
QLN_API void set_thread_pool(ParallelFor parallel_for, int (*threads)());

// Threads an operation would use now.
QLN_API int num_threads();

// Memory of a device, for one call.
struct DeviceMemory {
  void* data = nullptr;    // 64 divides the address
  void* handle = nullptr;  // what the host program knows it by
};
// Gives `bytes`, more than 0, to what is put into the stream from now on, and takes them back when all of it has been
// put there, not when it has been done: cudaMallocAsync is meant so, and allocators that keep one pool a stream.
using AllocateMemory = DeviceMemory (*)(std::size_t bytes, const Stream& stream);
using ReleaseMemory = void (*)(const DeviceMemory& memory, const Stream& stream);

// Where operations on a GPU get the memory that they need beside their results; null, as it begins: from a pool of the
// library's own. Both are called by several threads at once; `release` does not throw. Not to be called while an
// operation runs. (A program that links libqlora_native_torch has torch's for both, and calls on its current stream.)
QLN_API void set_device_memory(AllocateMemory allocate, ReleaseMemory release);

// A dense product, all of it in one dtype: out = left . right + bias. Sums are fp32 and rounded once, with the bias in
// them. Every pointer is to memory of the stream's device.
struct DenseGemmArgs {
  ConstMatrix left;   // [rows, inner]
  ConstMatrix right;  // [inner, cols]; with transpose_right [cols, inner]
  bool transpose_right = false;
  const void* bias = nullptr;  // [cols], or null
  Matrix out;                  // [rows, cols]; the columns beside it are not touched
};
using DenseGemm = void (*)(const DenseGemmArgs& args, const Stream& stream);

// The host program's dense product, for linear_forward and linear_backward_input of many rows: they then decode the
// weight a panel at a time and multiply with this. Null, as it begins: the library's own kernels decode on the way, for
// any number of rows. It is called by several threads at once, and may throw. Not to be set while an operation runs.
//   cuda  From 769 rows on. It puts its work into the stream. Extra memory of such a call: two panels, 64 MB at most,
//         and with an adapter 8192 * (inner dimension + rank) elements.
//   cpu   Where that product is the faster one (cpp/src/cpu/way.h): on processors with AMX, bf16 from 1024 rows on, and
//         fp16 from 33 on if AMX multiplies that too. It is to use the threads of the library's pool. Extra memory: a
//         panel, 8 MB at most, and with an adapter 32 MB. Results are as reproducible as that product's.
QLN_API void set_dense_gemm(DenseGemm dense_gemm);

// The instruction sets the cpu backend was built with and this machine runs, best first: of "amx_bf16", "avx512_bf16",
// "avx512", "avx2", or on Arm "neon_bf16", "neon"; then "scalar", and "amx_emulated", which is for tests: the
// algorithms of amx_bf16 in plain C++.
QLN_API std::vector<std::string> available_isas();

// The one in use: the best, or the one that the environment variable QLN_FORCE_ISA names. Chosen at first use;
// throws Unavailable, which says why, if that one cannot run here.
QLN_API std::string current_isa();

// The backend that runs operations on Device::cpu: "cpu", or "cuda_emulated", the CUDA kernels on the CPU, if the
// environment variable QLN_BACKEND says so: slow, and for tests of those kernels where no GPU is. Chosen at first use;
// throws Unavailable if QLN_BACKEND names another.
QLN_API std::string cpu_tensors_backend();

// Why device "cuda" cannot be used, or empty if it can.
QLN_API std::string cuda_unavailable_reason();

QLN_API std::string version();

}  // namespace qlora_native
