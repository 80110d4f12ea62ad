#include "qlora_native/runtime.h"

#include <cstdlib>

#include "backend.h"
#include "common/codebook.h"
#include "common/microscaling.h"
#include "hooks.h"
#include "qlora_native/codebook.h"
#include "qlora_native/error.h"

namespace qlora_native {

std::string version() { return QLN_VERSION; }

namespace {

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

void set_device_memory(AllocateMemory allocate, ReleaseMemory release) {
  set_hooks.allocate = allocate;
  set_hooks.release = release;
}

void set_dense_gemm(DenseGemm dense_gemm) { set_hooks.dense_gemm = dense_gemm; }

std::string cpu_tensors_backend() { return is_emulated() ? "cuda_emulated" : "cpu"; }

const Backend& backend_for(const Stream& stream) {
  if (stream.device == Device::cuda) {
    static const std::string reason = cuda_unavailable_reason();
    if (!reason.empty()) throw Unavailable(reason);
    return cuda::backend();
  }
  return is_emulated() ? cuda_emulated::backend() : cpu_backend();
}

const std::array<float, 16>& codebook(std::string_view format) {
  if (format == "nf4") return kNf4;
  if (format == "fp4") return kFp4;
  if (format == "int4") return kInt4;
  if (format == "mxfp4" || format == "nvfp4") return kE2m1;
  throw Error("format", "nf4, fp4, int4, mxfp4 or nvfp4", std::string(format));
}

const std::array<float, 256>& dynamic_map(bool is_signed) { return is_signed ? kDynamicMap : kUnsignedDynamicMap; }

}  // namespace qlora_native
