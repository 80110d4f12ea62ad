// PagedArena for Python. Its memory is handed out as DLPack capsules, which become tensors that keep the arena alive.
// (torch's stable ABI can make such tensors only from 2.11 on.)
#include "qlora_native/paged.h"

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "algorithm.h"
#include "common/layout.h"

namespace py = pybind11;

namespace qlora_native {
namespace {

struct Paged {
  std::vector<PagedState> states;
  std::shared_ptr<PagedArena> arena;
  Stream stream;
};

Paged make(const std::vector<std::pair<std::int64_t, bool>>& states, bool cuda, int index, const std::string& algorithm,
           const std::optional<std::size_t>& segment_bytes, bool pinned) {
  const py::gil_scoped_release released;
  std::vector<PagedState> list;
  for (const auto& [elements, in_8_bits] : states) {
    list.push_back({elements, in_8_bits, algorithm_of(algorithm)});
  }
  PagedOptions options{.pinned = pinned};
  if (segment_bytes) options.segment_bytes = *segment_bytes;
  const Stream stream{.device = cuda ? Device::cuda : Device::cpu, .index = index};
  auto arena = std::make_shared<PagedArena>(list, stream, options);
  return {std::move(list), std::move(arena), stream};
}

// An array of states[index] as a tensor, [elements]. Each has a storage of its own, because torch cannot save a storage
// that two dtypes share.
py::capsule array(const Paged& paged, void* data, DLDataType dtype, std::int64_t elements) {
  struct Managed {
    DLManagedTensor tensor;
    std::shared_ptr<PagedArena> arena;
    std::int64_t shape;
  };
  auto* const managed = new Managed{{}, paged.arena, elements};
  const bool cuda = paged.stream.device == Device::cuda;
  managed->tensor.dl_tensor = {.data = data,
                               .device = {cuda ? kDLCUDA : kDLCPU, paged.stream.index},
                               .ndim = 1,
                               .dtype = dtype,
                               .shape = &managed->shape,
                               .strides = nullptr,
                               .byte_offset = 0};
  managed->tensor.manager_ctx = managed;
  managed->tensor.deleter = [](DLManagedTensor* self) { delete static_cast<Managed*>(self->manager_ctx); };
  return py::capsule(&managed->tensor, "dltensor", [](PyObject* object) {
    // A consumer that has taken the tensor has renamed the capsule and calls the deleter itself.
    if (!PyCapsule_IsValid(object, "dltensor")) return;
    auto* const tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
    tensor->deleter(tensor);
  });
}

// The arrays of a parameter: state1, state2 if the algorithm has one, and with 8-bit moments absmax1 and absmax2. In
// ademamix state1 and absmax1 hold two moments each.
std::vector<py::capsule> arrays(const Paged& paged, std::size_t index) {
  const PagedState& state = paged.states.at(index);
  constexpr DLDataType kByte = {kDLUInt, 8, 1}, kFloat = {kDLFloat, 32, 1};
  Optimizer8bitTensor tensor;
  paged.arena->place(index, tensor);
  std::vector<py::capsule> found;
  const std::int64_t blocks = ceil_div(state.elements, kOptimizer8bitBlocksize);
  const int moments_in_state1 = tensor.state3 != nullptr ? 2 : 1;
  found.push_back(array(paged, tensor.state1, state.in_8_bits ? kByte : kFloat, moments_in_state1 * state.elements));
  if (tensor.state2 != nullptr) {
    found.push_back(array(paged, tensor.state2, state.in_8_bits ? kByte : kFloat, state.elements));
  }
  if (!state.in_8_bits) return found;
  found.push_back(array(paged, tensor.absmax1, kFloat, moments_in_state1 * blocks));
  if (tensor.absmax2 != nullptr) found.push_back(array(paged, tensor.absmax2, kFloat, blocks));
  return found;
}

py::dict stats(const Paged& paged) {
  const PagedStats found = paged.arena->stats();
  py::dict result;
  result["bytes_managed"] = found.bytes_managed;
  result["bytes_resident"] = found.bytes_resident;
  result["prefetches"] = found.prefetches;
  result["stalls"] = found.stalls;
  return result;
}

}  // namespace

void bind_paged(py::module_& module) {
  py::class_<Paged>(module, "PagedArena",
                    "Memory for the state of an 8-bit optimizer that moves between host and GPU (paged.h).")
      .def(py::init(&make), py::arg("states"), py::arg("cuda"), py::arg("index"), py::arg("algorithm") = "adamw",
           py::arg("segment_bytes") = py::none(), py::arg("pinned") = false)
      .def("arrays", &arrays, py::arg("index"),
           "DLPack capsules over those arrays of states[index] that the algorithm has: state1, state2 and, with 8-bit "
           "moments, absmax1, absmax2.")
      .def("stats", &stats);
}

}  // namespace qlora_native
