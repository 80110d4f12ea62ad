// Memory of the core as DLPack capsules, which torch.from_dlpack turns into tensors.
#pragma once

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "qlora_native/types.h"

namespace qlora_native {

// A tensor [elements] over memory of the stream's device, which keeps `owner` alive.
inline pybind11::capsule dlpack(std::shared_ptr<void> owner, void* data, DLDataType dtype, std::int64_t elements,
                                const Stream& stream) {
  struct Managed {
    DLManagedTensor tensor;
    std::shared_ptr<void> owner;
    std::int64_t shape;
  };
  auto* const managed = new Managed{{}, std::move(owner), elements};
  managed->tensor.dl_tensor = {.data = data,
                               .device = {stream.device == Device::cuda ? kDLCUDA : kDLCPU, stream.index},
                               .ndim = 1,
                               .dtype = dtype,
                               .shape = &managed->shape,
                               .strides = nullptr,
                               .byte_offset = 0};
  managed->tensor.manager_ctx = managed;
  managed->tensor.deleter = [](DLManagedTensor* self) { delete static_cast<Managed*>(self->manager_ctx); };
  return pybind11::capsule(&managed->tensor, "dltensor", [](PyObject* object) {
    // A consumer that has taken the tensor has renamed the capsule and calls the deleter itself.
    if (!PyCapsule_IsValid(object, "dltensor")) return;
    auto* const tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
    tensor->deleter(tensor);
  });
}

}  // namespace qlora_native
