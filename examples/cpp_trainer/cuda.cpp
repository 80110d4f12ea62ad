// A GPU: one stream, and managed memory, whose pages move to the processor that accesses them. This is host code, so it
// needs no nvcc.
#include <cuda_runtime_api.h>

#include <stdexcept>

#include "device.h"

namespace qn = qlora_native;

namespace trainer {
namespace {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

std::string mebibytes(std::size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

class CudaDevice final : public Device {
 public:
  CudaDevice() {
    check(cudaSetDevice(kIndex), "cudaSetDevice");
    int concurrent = 0;
    check(cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, kIndex), "cudaDeviceGetAttribute");
    if (concurrent == 0)
      throw qn::Unavailable("--device cuda: this GPU does not let the host use managed memory while it works");
    std::size_t total = 0;
    check(cudaMemGetInfo(&free_, &total), "cudaMemGetInfo");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~CudaDevice() override { cudaStreamDestroy(stream_); }

  std::string name() const override {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, kIndex), "cudaGetDeviceProperties");
    return properties.name;
  }
  qn::Stream stream() const override { return {qn::Device::cuda, kIndex, stream_}; }
  void synchronize() override { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

  // Managed memory may be larger than the GPU's memory, but then the machine does little but move pages.
  void* allocate(std::size_t bytes) override {
    if (allocated_ + bytes + kLeftFree > free_)
      throw std::runtime_error("--device cuda: " + mebibytes(allocated_ + bytes) + " wanted, and " +
                               mebibytes(kLeftFree) + " to stay free, of the " + mebibytes(free_) +
                               " that the GPU had free: try a smaller --batch or --sequence");
    void* memory = nullptr;
    check(cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal), "cudaMallocManaged");
    allocated_ += bytes;
    return memory;
  }
  void free(void* memory, std::size_t bytes) noexcept override {
    cudaFree(memory);  // waits for work that still uses the memory
    allocated_ -= bytes;
  }

 private:
  static constexpr int kIndex = 0;
  static constexpr std::size_t kLeftFree = std::size_t{512} << 20;  // for kernels, the library's own memory, a display

  cudaStream_t stream_ = nullptr;
  std::size_t free_ = 0, allocated_ = 0;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device() {
  const std::string reason = qn::cuda_unavailable_reason();
  if (!reason.empty()) throw qn::Unavailable("--device cuda: " + reason);
  return std::make_unique<CudaDevice>();
}

}  // namespace trainer
