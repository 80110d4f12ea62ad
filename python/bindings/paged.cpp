// PagedArena and PagedWeights for Python. Their memory is handed out as DLPack capsules, which become tensors that keep
// it alive. (torch's stable ABI can make such tensors only from 2.11 on.)
#include "qlora_native/paged.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "algorithm.h"
#include "common/layout.h"
#include "dlpack.h"
#include "qlora_native/paged_weights.h"

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
  return dlpack(paged.arena, data, dtype, elements, paged.stream);
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

// ---- weights ----

// The memory of weights[i] is released when the last tensor over it is gone.
struct PagedLayers {
  std::vector<std::vector<std::size_t>> bytes;
  std::shared_ptr<PagedWeights> weights;
  Stream stream;
  std::vector<std::weak_ptr<void>> owners;
};

PagedLayers make_weights(std::vector<std::vector<std::size_t>> bytes, std::size_t device_bytes, bool cuda, int index) {
  const py::gil_scoped_release released;
  const Stream stream{.device = cuda ? Device::cuda : Device::cpu, .index = index};
  auto weights = std::make_shared<PagedWeights>(bytes, device_bytes, stream);
  const std::size_t count = bytes.size();
  return {std::move(bytes), std::move(weights), stream, std::vector<std::weak_ptr<void>>(count)};
}

std::vector<py::capsule> arrays_of_weight(PagedLayers& layers, std::size_t index) {
  const std::vector<std::size_t>& bytes = layers.bytes.at(index);
  std::shared_ptr<void> owner = layers.owners[index].lock();
  if (owner == nullptr) {
    owner = std::shared_ptr<void>(layers.weights->data(index, 0), [weights = layers.weights, index](void*) {
      try {
        weights->release(index);
      } catch (const std::exception&) {
        // The device has failed, or the program ends and the driver is gone.
      }
    });
    layers.owners[index] = owner;
  }
  std::vector<py::capsule> found;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    found.push_back(dlpack(owner, layers.weights->data(index, i), {kDLUInt, 8, 1}, static_cast<std::int64_t>(bytes[i]),
                           layers.stream));
  }
  return found;
}

py::dict stats_of_weights(const PagedLayers& layers) {
  const PagedWeightsStats found = layers.weights->stats();
  py::dict result;
  result["bytes_managed"] = found.bytes_managed;
  result["bytes_resident"] = found.bytes_resident;
  result["bytes_fetched"] = found.bytes_fetched;
  result["prefetches"] = found.prefetches;
  result["stalls"] = found.stalls;
  result["faults"] = found.faults;
  return result;
}

void refresh(const PagedLayers& layers, std::uintptr_t stream) {
  Stream of_writer = layers.stream;
  of_writer.handle = reinterpret_cast<void*>(stream);
  for (const std::weak_ptr<void>& each : layers.owners) {
    if (const std::shared_ptr<void> owner = each.lock()) paged_weight_written(owner.get(), of_writer);
  }
}

void weight_written(std::uintptr_t array, bool cuda, int index, std::uintptr_t stream) {
  paged_weight_written(
      reinterpret_cast<const void*>(array),
      {.device = cuda ? Device::cuda : Device::cpu, .index = index, .handle = reinterpret_cast<void*>(stream)});
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
  py::class_<PagedLayers>(module, "PagedWeights",
                          "Memory for frozen weights that are copied to the GPU ahead of their use (paged_weights.h).")
      .def(py::init(&make_weights), py::arg("weights"), py::arg("device_bytes"), py::arg("cuda"), py::arg("index"))
      .def("arrays", &arrays_of_weight, py::arg("index"), "DLPack capsules of bytes over the arrays of weights[index].")
      .def("stats", &stats_of_weights)
      .def("refresh", &refresh, py::arg("stream"), "Forget the copies on the device, after work in a stream wrote.");
  module.def("paged_weight_written", &weight_written, py::arg("array"), py::arg("cuda"), py::arg("index"),
             py::arg("stream"), "Tell that work in a stream has written to a weight, which may be paged.");
}

}  // namespace qlora_native
