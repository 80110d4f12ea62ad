// From torch's tensors to pointers, with the checks that memory safety needs. All files of torch ops use it.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "qlora_native/types.h"

namespace qlora_native {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string name_of_type(ScalarType type) { return torch::headeronly::toString(type); }

// A str argument of an op, which takes it as a handle: torch's own conversion (2.10 ... 2.13) never deletes the copy
// that it makes, so an op that takes a std::string loses one at each call.
inline std::string take_text(StringHandle handle) {
  const char* data = nullptr;
  std::size_t length = 0;
  std::string text;
  if (torch_string_c_str(handle, &data) == 0 && torch_string_length(handle, &length) == 0) text.assign(data, length);
  torch_delete_string(handle);
  return text;
}

// The name of a tensor in a list of arguments, or of an argument, whose index is kAlone. Only an error makes it text,
// because an optimizer has thousands of them.
struct ListItem {
  static constexpr std::int64_t kAlone = -1;
  const char* list;
  std::int64_t index = kAlone;
  std::string operator()() const {
    return index == kAlone ? std::string(list) : std::string(list) + "[" + std::to_string(index) + "]";
  }
};

template <class Name>
DType dtype_of(ScalarType type, const Name& argument) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(argument, "float32, bfloat16 or float16", name_of_type(type));
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// Whether all elements of a tensor lie in its storage. FSDP and offloading free or shrink a storage while tensors still
// refer to it (`untyped_storage().resize_(0)`). The address of their first element is then null, near null, or in
// memory that belongs to somebody else by now.
inline bool has_memory(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  std::int64_t bytes = 0, last = 0;  // `last` becomes the index of the last element in the storage
  if (aoti_torch_get_storage_size(tensor.get(), &bytes) != 0) return false;
  if (aoti_torch_get_storage_offset(tensor.get(), &last) != 0) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (std::size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return last < bytes / static_cast<std::int64_t>(tensor.element_size());
}

template <class Name>
void check_memory(const Tensor& tensor, const Name& argument) {
  check(has_memory(tensor), argument, "a tensor with memory", "one whose storage was freed");
}

// The data of a tensor, after a check that it is contiguous, has `numel` elements of `type` and is on the device of
// `like`.
template <class Name>
void* data_of(const Tensor& tensor, ScalarType type, std::int64_t numel, const Tensor& like, const Name& argument) {
  check(
      tensor.scalar_type() == type, argument, [&] { return name_of_type(type); },
      [&] { return name_of_type(tensor.scalar_type()); });
  check(tensor.numel() == numel, argument, [&] { return std::to_string(numel) + " elements"; }, tensor.numel());
  check(tensor.is_contiguous(), argument, "a contiguous tensor", "other strides");
  check(same_device(tensor, like), argument, "the device of the other tensors", "another device");
  check_memory(tensor, argument);
  return tensor.data_ptr();
}

// The operands of an op that writes into some of them. Memory that it writes must be no other operand's: what was
// checked could change before it is used, as labels that lie in the logits would, and the result would depend on
// threads.
class Operands {
 public:
  void add(const Tensor& tensor, ListItem name, bool written) {
    const std::int64_t numel = tensor.numel();
    if (numel == 0) return;
    std::int64_t span = 1;  // elements from the first to the last
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    for (std::size_t i = 0; i < sizes.size(); ++i) span += (sizes[i] - 1) * strides[i];
    if (span > numel) return;  // another operand may lie in the gaps, as the columns of one matrix do
    const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
    ranges_.push_back({begin, begin + static_cast<std::uintptr_t>(span) * tensor.element_size(), written, name});
  }

  void check_apart() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const Range *last = nullptr, *last_written = nullptr;  // of those before, the one that ends last
    for (const Range& range : ranges_) {
      const Range* const other = range.written ? last : last_written;
      if (other != nullptr && range.begin < other->end) {
        const Range &writer = range.written ? range : *other, &operand = range.written ? *other : range;
        fail(operand.name, "memory apart from that of " + writer.name() + ", which is written", "memory of both");
      }
      if (last == nullptr || range.end > last->end) last = &range;
      if (range.written && (last_written == nullptr || range.end > last_written->end)) last_written = &range;
    }
  }

 private:
  struct Range {
    std::uintptr_t begin, end;
    bool written;
    ListItem name;
  };
  std::vector<Range> ranges_;
};

// torch's current stream of a device, as a cudaStream_t. The function is in a library that a CPU build of torch does
// not have, so it is not linked but looked up in the library that torch has loaded.
inline void* current_cuda_stream(int index) {
  using GetCurrent = std::int32_t (*)(std::int32_t index, void** stream);
  static const GetCurrent get_current = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetCurrent>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get_current == nullptr || get_current(index, &stream) != 0)
    throw Unavailable("torch's current CUDA stream cannot be had: this torch has no CUDA");
  return stream;
}

inline Stream stream_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return {};
  return {.device = Device::cuda,
          .index = tensor.get_device_index(),
          .handle = current_cuda_stream(tensor.get_device_index())};
}

}  // namespace qlora_native
