// What the library found on this machine, and what an application may set: a thread pool, a dense product, and the
// allocator of memory on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "qlora_native/types.h"

namespace qlora_native {

// Calls body(context, begin, end) for ranges that together cover [0, tasks), and returns when all calls have returned.
// A body does not call it again, but threads of the application that run operations at the same time do.
using ParallelFor = void (*)(std::int64_t tasks, void (*body)(void* context, std::int64_t begin, std::int64_t end),
                             void* context);

// Replaces the thread pool, which is OpenMP's by default if the library was built with OpenMP. `threads` returns how
// many threads the new pool has at the moment. Not to be called while an operation runs.
//
// GCC's OpenMP does not survive fork(). If a process forks after its first parallel operation, in this library or
// anywhere else, the first operation in the child waits forever for threads that the child does not have. There are
// four ways around this: fork before the first operation; start a new program in the child (exec); let the child run
// with one thread (omp_set_num_threads(1)); or set a pool that starts its threads in each process, like that of
// tests/cpp/pool.h.
QLN_API void set_thread_pool(ParallelFor parallel_for, int (*threads)());

// How many threads an operation would use now.
QLN_API int num_threads();

// Memory of a device, for one call.
struct DeviceMemory {
  void* data = nullptr;    // at a multiple of 64
  void* handle = nullptr;  // identifies the memory to the application
};
// AllocateMemory returns `bytes` (more than 0) of memory for work that is put into the stream from now on.
// ReleaseMemory takes the memory back as soon as all of that work has been put into the stream, before it has run.
// cudaMallocAsync works like this, and so do allocators that keep a pool for each stream.
using AllocateMemory = DeviceMemory (*)(std::size_t bytes, const Stream& stream);
using ReleaseMemory = void (*)(const DeviceMemory& memory, const Stream& stream);

// Sets where operations on a GPU get the memory that they need beside their results. Null, the default, stands for the
// library's own pool. Several threads may call both functions at once; `release` must not throw. Not to be called while
// an operation runs. (libqlora_native_torch sets torch's allocator; a program that links it must call operations on
// torch's current stream.)
QLN_API void set_device_memory(AllocateMemory allocate, ReleaseMemory release);

// A dense product in a single dtype: out = x . w + bias, or out += x . w. It accumulates in fp32, from the bias or from
// what was in `out`, and rounds once. Every pointer is to memory of the stream's device.
struct DenseGemmArgs {
  ConstMatrix x;  // [rows, inner]
  ConstMatrix w;  // [inner, cols]; with transpose_w [cols, inner]
  bool transpose_w = false;
  const void* bias = nullptr;  // [cols], or null
  bool accumulate = false;     // out += x . w; there is no bias then. only the cpu backend uses this
  Matrix out;                  // [rows, cols]; memory between its rows is not touched
};
using DenseGemm = void (*)(const DenseGemmArgs& args, const Stream& stream);

// Sets a dense product of the application for linear_forward and linear_backward_input with many rows: these then
// decode the weight a panel at a time and call the dense product. With null, the default, the library's own kernels
// decode the weight on the way, for any number of rows. Several threads may call the dense product at once, and it may
// throw. Not to be set while an operation runs.
//
//   cuda  It is used from 256 rows on, and must put its work into the stream. Extra memory of such a call: two panels,
//         64 MB at most, and with an adapter 8192 * (inner dimension + rank) elements.
//   cpu   It is used where it is faster (cpp/src/cpu/product/config.h): for fp16 from 33 rows on, on processors whose
//         AMX multiplies fp16; for fp32 from 1024 rows on, with AVX-512 without BF16, if the inner dimension is at most
//         4681. Products with dropout, or with rows of several adapters, never use it. It should use the threads of the
//         library's pool. An adapter is a product of its own, to which the one with W is added: so the part U . (s*B)^T
//         + bias, or V . A, is rounded to the dtype of the result before it becomes a term of the sum. Extra memory of
//         such a call: a panel, 8 MB at most, 1 MB of U or V if the caller wants none, and what the dense product
//         takes. Results are as reproducible as those of the dense product.
QLN_API void set_dense_gemm(DenseGemm dense_gemm);

// Names the kernels that products on a GPU do without, because a check found them wrong there: some of "gemv", "gemm",
// "wgmma" and "panels", which the general kernel or others of these replace. Each call replaces what an earlier one
// named for the device. The device of the backend "cuda_emulated" is 0. Throws Error if a name or the device is
// unknown. `python -m qlora_native check` finds such kernels, and the Python package calls this.
QLN_API void disable_cuda_kernels(int device, const std::vector<std::string>& kernels);

// The instruction sets that the cpu backend was built with and that this machine runs, best first: some of "amx_bf16",
// "avx512_bf16", "avx512" and "avx2", or on Arm "neon_bf16" and "neon"; then "scalar"; then "amx_emulated", which is
// for tests and runs the algorithms of amx_bf16 in plain C++.
QLN_API std::vector<std::string> available_isas();

// The instruction set in use: the best one, or the one that the environment variable QLN_FORCE_ISA names. It is chosen
// at first use. Throws Unavailable, which says why, if the named one cannot run here.
QLN_API std::string current_isa();

// The backend that runs operations on Device::cpu: "cpu", or "cuda_emulated" if the environment variable QLN_BACKEND
// names that. It runs the CUDA kernels on the CPU: slowly, for tests of the kernels without a GPU. The backend is
// chosen at first use. Throws Unavailable if QLN_BACKEND names another one.
QLN_API std::string cpu_tensors_backend();

// The reason why the device "cuda" cannot be used; empty if it can.
QLN_API std::string cuda_unavailable_reason();

QLN_API std::string version();

}  // namespace qlora_native
