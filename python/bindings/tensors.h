// What the files of torch ops share: from torch's tensors to pointers, with the checks that memory safety needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "qlora_native/error.h"
#include "qlora_native/types.h"

namespace qlora_native {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check(bool ok, const char* argument, const std::string& expected, const std::string& got) {
  if (!ok) throw Error(argument, expected, got);
}

inline std::string name_of_type(ScalarType type) { return torch::headeronly::toString(type); }

// One tensor of a list, as an argument's name. Names become text only in an error: an optimizer has thousands of them.
struct ListItem {
  const char* list;
  std::int64_t index;
};
inline std::string text_of(const char* argument) { return argument; }
inline std::string text_of(const ListItem& item) {
  return std::string(item.list) + "[" + std::to_string(item.index) + "]";
}

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
      throw Error(text_of(argument), "float32, bfloat16 or float16", name_of_type(type));
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// The data of a contiguous tensor with `numel` elements of `type` beside `like`.
template <class Name>
void* data_of(const Tensor& tensor, ScalarType type, std::int64_t numel, const Tensor& like, const Name& argument) {
  if (tensor.scalar_type() != type) {
    throw Error(text_of(argument), name_of_type(type), name_of_type(tensor.scalar_type()));
  }
  if (tensor.numel() != numel) {
    throw Error(text_of(argument), std::to_string(numel) + " elements", std::to_string(tensor.numel()));
  }
  if (!tensor.is_contiguous()) throw Error(text_of(argument), "a contiguous tensor", "other strides");
  if (!same_device(tensor, like)) {
    throw Error(text_of(argument), "the device of the other tensors", "another device");
  }
  return tensor.data_ptr();
}

inline Stream stream_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return {};
  return {.device = Device::cuda, .index = tensor.get_device_index(), .handle = nullptr};
}

}  // namespace qlora_native
