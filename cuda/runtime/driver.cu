// Implements Driver (driver.h) with the CUDA runtime. This file has no device code.
#include <memory>

#include "paged/driver.h"
#include "runtime/capture.h"
#include "runtime/check.h"

namespace qlora_native::cuda {
namespace {

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

// A call in a thread that has no context makes one on the current device, so the driver's own is made current first,
// also where a call would do its work without. What must not throw, as at the end of a process, does not do so.
class RuntimeDriver final : public Driver {
 public:
  explicit RuntimeDriver(int device) : device_(device) {}

  bool is_concurrent() override {
    int value = 0;
    QLN_CHECK_CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrConcurrentManagedAccess, device_));
    return value != 0;
  }
  bool is_capturing(void* stream) override {
    const CurrentDevice current(device_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    QLN_CHECK_CUDA(cudaStreamIsCapturing(stream_of(stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }
  std::size_t free_bytes() override {
    const CurrentDevice current(device_);
    std::size_t free = 0, total = 0;
    QLN_CHECK_CUDA(cudaMemGetInfo(&free, &total));
    return free;
  }

  void* allocate(Memory kind, std::size_t bytes) override {
    const CurrentDevice current(device_);
    const RelaxedCapture relaxed;  // another thread may be capturing
    void* memory = nullptr;
    switch (kind) {
      case Memory::managed:
        QLN_CHECK_CUDA(cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal));
        break;
      case Memory::pinned:
        QLN_CHECK_CUDA(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
        break;
      case Memory::device:
        QLN_CHECK_CUDA(cudaMalloc(&memory, bytes));
        break;
    }
    return memory;
  }
  void release(Memory kind, void* memory) noexcept override {
    const RelaxedCapture relaxed;
    if (kind == Memory::pinned)
      cudaFreeHost(memory);
    else
      cudaFree(memory);
  }
  void advise(void* memory, std::size_t bytes) override {
    const CurrentDevice current(device_);
    QLN_CHECK_CUDA(cudaMemAdvise(memory, bytes, cudaMemAdviseSetPreferredLocation, location_of(Place::host)));
    QLN_CHECK_CUDA(cudaMemAdvise(memory, bytes, cudaMemAdviseSetAccessedBy, location_of(Place::device)));
  }
  bool is_on_device(const void* memory, std::size_t bytes) override {
    const CurrentDevice current(device_);
    int device = cudaInvalidDeviceId;
    QLN_CHECK_CUDA(
        cudaMemRangeGetAttribute(&device, sizeof(device), cudaMemRangeAttributeLastPrefetchLocation, memory, bytes));
    return device == device_;
  }

  void* create_stream() override {
    const CurrentDevice current(device_);
    const RelaxedCapture relaxed;
    cudaStream_t stream = nullptr;
    QLN_CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  void destroy_stream(void* stream) noexcept override { cudaStreamDestroy(stream_of(stream)); }
  void prefetch(void* memory, std::size_t bytes, Place place, void* stream) override {
    const CurrentDevice current(device_);
#if CUDART_VERSION >= 13000
    QLN_CHECK_CUDA(cudaMemPrefetchAsync(memory, bytes, location_of(place), 0, stream_of(stream)));
#else
    QLN_CHECK_CUDA(cudaMemPrefetchAsync(memory, bytes, location_of(place), stream_of(stream)));
#endif
  }
  void copy(void* to, const void* from, std::size_t bytes, void* stream) override {
    const CurrentDevice current(device_);
    QLN_CHECK_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream)));
  }

  void* create_event(bool timed) override {
    const CurrentDevice current(device_);
    const RelaxedCapture relaxed;
    cudaEvent_t event = nullptr;
    QLN_CHECK_CUDA(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming));
    return event;
  }
  void destroy_event(void* event) noexcept override { cudaEventDestroy(event_of(event)); }
  // The default stream, whose handle is null, is that of the current device.
  void record(void* event, void* stream) override {
    const CurrentDevice current(device_);
    QLN_CHECK_CUDA(cudaEventRecord(event_of(event), stream_of(stream)));
  }
  void wait(void* stream, void* event) override {
    const CurrentDevice current(device_);
    QLN_CHECK_CUDA(cudaStreamWaitEvent(stream_of(stream), event_of(event), cudaEventWaitDefault));
  }
  void synchronize(void* event) noexcept override {
    const RelaxedCapture relaxed;
    cudaEventSynchronize(event_of(event));
  }
  bool is_done(void* event) override {
    const CurrentDevice current(device_);
    const RelaxedCapture relaxed;  // another thread may be capturing
    const cudaError_t error = cudaEventQuery(event_of(event));
    if (error == cudaErrorNotReady) {
      cudaGetLastError();  // this is no failure, so the next call must not report it
      return false;
    }
    QLN_CHECK_CUDA(error);
    return true;
  }
  bool is_earlier(void* first, void* second) override {
    const CurrentDevice current(device_);
    const RelaxedCapture relaxed;
    float milliseconds = 0.0f;
    QLN_CHECK_CUDA(cudaEventElapsedTime(&milliseconds, event_of(first), event_of(second)));
    return milliseconds > 0.0f;
  }

 private:
#if CUDART_VERSION >= 13000
  cudaMemLocation location_of(Place place) const {
    cudaMemLocation location{};
    location.type = place == Place::host ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
    location.id = place == Place::host ? 0 : device_;
    return location;
  }
#else
  int location_of(Place place) const { return place == Place::host ? cudaCpuDeviceId : device_; }
#endif

  int device_;
};

}  // namespace

std::unique_ptr<Driver> make_driver(int device) { return std::make_unique<RuntimeDriver>(device); }

}  // namespace qlora_native::cuda
