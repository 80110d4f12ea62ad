#include "qlora_native/runtime.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <string_view>

#include "backend.h"
#include "common/checks.h"
#include "hooks.h"
#include "qlora_native/error.h"

namespace qlora_native {

std::string version() { return QLN_VERSION; }

namespace {

constexpr int kMaxCudaDevices = 64;
constexpr std::string_view kCudaKernels[] = {"gemv", "gemm", "wgmma", "panels"};  // in the order of CudaKernel
constinit std::atomic<unsigned> set_disabled_kernels[kMaxCudaDevices];

constinit Hooks set_hooks;  // constinit, because a library of ops may set them while it is loaded

bool choose_emulated() {
  const char* value = std::getenv("QLN_BACKEND");
  const std::string name = value == nullptr ? "" : value;
  if (name == "cuda_emulated") return true;
  if (name.empty() || name == "cpu") return false;
  throw Unavailable("QLN_BACKEND: expected cpu or cuda_emulated, got \"" + name + "\"");
}

bool is_emulated() {
  static const bool chosen = choose_emulated();  // if it throws, the next call tries again
  return chosen;
}

}  // namespace

const Hooks& hooks() { return set_hooks; }

void set_thread_pool(ParallelFor parallel_for, int (*threads)()) {
  set_hooks.parallel_for = parallel_for;
  set_hooks.threads = threads;
}

int num_threads() { return std::max(1, set_hooks.threads != nullptr ? set_hooks.threads() : default_threads()); }

void set_device_memory(AllocateMemory allocate, ReleaseMemory release) {
  set_hooks.allocate = allocate;
  set_hooks.release = release;
}

void set_dense_gemm(DenseGemm dense_gemm) { set_hooks.dense_gemm = dense_gemm; }

void disable_cuda_kernels(int device, const std::vector<std::string>& kernels) {
  check(device >= 0 && device < kMaxCudaDevices, "device", "0 ... " + std::to_string(kMaxCudaDevices - 1), device);
  unsigned bits = 0;
  for (const std::string& name : kernels) {
    const auto* const known = std::find(std::begin(kCudaKernels), std::end(kCudaKernels), name);
    check(known != std::end(kCudaKernels), "kernels", "gemv, gemm, wgmma or panels", name);
    bits |= 1u << (known - std::begin(kCudaKernels));
  }
  set_disabled_kernels[device].store(bits, std::memory_order_relaxed);
}

unsigned disabled_cuda_kernels(int device) {
  return device < kMaxCudaDevices ? set_disabled_kernels[device].load(std::memory_order_relaxed) : 0;
}

std::vector<std::string> available_isas() { return cpu_isas(); }

std::string current_isa() { return cpu_isa(); }

std::string cuda_unavailable_reason() { return cuda::unavailable_reason(); }

std::string cpu_tensors_backend() { return is_emulated() ? "cuda_emulated" : "cpu"; }

const Backend& backend_for(const Stream& stream) {
  if (stream.device == Device::cuda) {
    static const std::string reason = cuda_unavailable_reason();
    if (!reason.empty()) throw Unavailable(reason);
    return cuda::backend();
  }
  return is_emulated() ? cuda_emulated::backend() : cpu_backend();
}

const Backend& backend_for_host(const Stream& stream, const char* operation, const char* instead) {
  if (stream.device != Device::cpu)
    throw Unavailable(std::string(operation) + ": there are kernels for the CPU alone" + instead);
  return cpu_backend();
}

}  // namespace qlora_native
