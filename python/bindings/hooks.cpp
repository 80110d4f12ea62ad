// The hooks (runtime.h) by which the library uses torch's threads, and on a GPU torch's memory and dense product.
#include "qlora_native/runtime.h"

#include <array>
#include <initializer_list>
#include <memory>
#include <string>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensors.h"

// The reason why a call of torch's C API has failed in this thread. torch has this function from 2.13 on; older ones
// print the reason instead.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace qlora_native {
namespace {

std::string reason_of_failure() {
  if (torch_exception_get_what_without_backtrace == nullptr) return "torch has printed why";
  return torch_exception_get_what_without_backtrace();
}

// torch multiplies and allocates in its current stream, so no other stream can be served.
torch::stable::Device device_of(const Stream& stream) {
  using torch::headeronly::DeviceType;
  if (stream.device == Device::cpu) return {DeviceType::CPU};
  check(stream.handle == current_cuda_stream(stream.index), "stream", "torch's current stream of its device",
        "another one");
  return {DeviceType::CUDA, static_cast<torch::stable::DeviceIndex>(stream.index)};
}

// Allocates by torch's caching allocator, which then reuses the memory; under a CUDA graph it comes from the graph's
// pool.
DeviceMemory allocate(std::size_t bytes, const Stream& stream) {
  const torch::stable::Device device = device_of(stream);
  const auto size = static_cast<std::int64_t>(bytes);
  try {
    auto tensor = std::make_unique<Tensor>(
        torch::stable::empty({&size, 1}, ScalarType::Byte, std::nullopt, device, std::nullopt, std::nullopt));
    return {.data = tensor->data_ptr(), .handle = tensor.release()};
  } catch (const std::exception&) {  // its text says only which call has failed
    throw Unavailable("torch is out of memory. A call needs " + std::to_string(bytes) +
                      " bytes beside its result: " + reason_of_failure());
  }
}
void release(const DeviceMemory& memory, const Stream&) { delete static_cast<Tensor*>(memory.handle); }

ScalarType type_of(DType dtype) {
  return dtype == DType::f32 ? ScalarType::Float : dtype == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

// A tensor over memory that it does not own. Autograd does not know it.
Tensor tensor_over(const void* data, DType dtype, std::initializer_list<std::int64_t> sizes,
                   std::initializer_list<std::int64_t> strides, const torch::stable::Device& device) {
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.begin(), sizes.size()},
                                  {strides.begin(), strides.size()}, device, type_of(dtype));
}

// Calls linear.out, which is mm.out or, with a bias, addmm.out; or addmm.out with `out` itself for an addend. Autocast
// has no rule for functions with an `out`, and autograd does nothing, because no tensor requires a gradient. torch's
// settings act as in F.linear: whether fp32 may be rounded to TF32, and whether partial sums may be rounded to 16 bits.
void dense_gemm(const DenseGemmArgs& args, const Stream& stream) {
  const torch::stable::Device device = device_of(stream);
  const std::int64_t inner = args.x.cols, cols = args.out.cols, stride = args.w.stride;
  const auto matrix = [&](const auto& m) {
    return tensor_over(m.data, m.dtype, {m.rows, m.cols}, {m.stride, 1}, device);
  };
  const auto w_row_stride = args.transpose_w ? stride : 1, w_col_stride = args.transpose_w ? 1 : stride;
  const Tensor x = matrix(args.x), out = matrix(args.out);
  const auto expect_success = [&](AOTITorchError error) {
    if (error == TORCH_SUCCESS) return;
    throw Unavailable("torch's product [" + std::to_string(args.x.rows) + ", " + std::to_string(inner) + "] . [" +
                      std::to_string(inner) + ", " + std::to_string(cols) + "] failed: " + reason_of_failure());
  };
  if (args.accumulate) {
    const Tensor w = tensor_over(args.w.data, args.w.dtype, {inner, cols}, {w_col_stride, w_row_stride}, device);
    return expect_success(aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), w.get(), 1.0, 1.0));
  }
  const Tensor weight = tensor_over(args.w.data, args.w.dtype, {cols, inner}, {w_row_stride, w_col_stride}, device);
  OptionalTensor bias;
  if (args.bias != nullptr) bias = tensor_over(args.bias, args.out.dtype, {cols}, {1}, device);
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(out)};
  expect_success(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference to `out` and releases it
}

}  // namespace

void install_torch_hooks() {
  // torch's own threads, so that two pools never compete for the cores.
  set_thread_pool(
      [](std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
        torch::stable::parallel_for(0, tasks, /*grain_size=*/1,
                                    [=](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
      },
      [] { return static_cast<int>(torch::stable::get_num_threads()); });
  set_device_memory(allocate, release);
  set_dense_gemm(dense_gemm);
}

}  // namespace qlora_native
