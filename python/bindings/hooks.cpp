// What the library gets from torch (runtime.h): its threads, and on a GPU its memory.
#include "qlora_native/runtime.h"

#include <memory>
#include <string>

#include "tensors.h"

namespace qlora_native {
namespace {

// torch's own products are in its current stream, and so is its memory.
torch::stable::Device device_of(const Stream& stream) {
  using torch::headeronly::DeviceType;
  if (stream.device == Device::cpu) return {DeviceType::CPU};
  check(stream.handle == current_cuda_stream(stream.index), "stream", "torch's current stream of its device",
        "another one");
  return {DeviceType::CUDA, static_cast<torch::stable::DeviceIndex>(stream.index)};
}

// Of torch's caching allocator, which so knows of it and keeps it for others; a CUDA graph's are its own.
DeviceMemory allocate(std::size_t bytes, const Stream& stream) {
  const torch::stable::Device device = device_of(stream);
  const auto size = static_cast<std::int64_t>(bytes);
  try {
    auto tensor = std::make_unique<Tensor>(
        torch::stable::empty({&size, 1}, ScalarType::Byte, std::nullopt, device, std::nullopt, std::nullopt));
    return {.data = tensor->data_ptr(), .handle = tensor.release()};
  } catch (const std::exception&) {  // its text is that of a failed call
    throw Unavailable("torch is out of memory. A call needs " + std::to_string(bytes) + " bytes beside its result");
  }
}
void release(const DeviceMemory& memory, const Stream&) { delete static_cast<Tensor*>(memory.handle); }

}  // namespace

void install_torch_hooks() {
  // Its pool, so that the two never fight over the cores.
  set_thread_pool(
      [](std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
        torch::stable::parallel_for(0, tasks, /*grain_size=*/1,
                                    [=](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
      },
      [] { return static_cast<int>(torch::stable::get_num_threads()); });
  set_device_memory(allocate, release);
}

}  // namespace qlora_native
