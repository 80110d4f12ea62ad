// The Python module qlora_native._C. Importing it loads the library of the torch ops, which registers them (ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "qlora_native/qlora_native.h"

namespace qn = qlora_native;

namespace qlora_native {
void bind_paged(pybind11::module_& module);  // paged.cpp
}

PYBIND11_MODULE(_C, module) {
  // Error is a std::invalid_argument and becomes a ValueError; Unavailable becomes a RuntimeError.
  module.def("version", &qn::version);
  module.def("available_isas", &qn::available_isas,
             "The instruction sets that this build has and this machine runs, the best first.");
  module.def("current_isa", &qn::current_isa, "The instruction set in use. QLN_FORCE_ISA forces one.");
  module.def("cpu_tensors_backend", &qn::cpu_tensors_backend, "The backend for CPU tensors. QLN_BACKEND chooses it.");
  module.def("num_threads", &qn::num_threads,
             "The number of threads that an operation would use now, which is torch's.");
  module.def("cuda_unavailable_reason", &qn::cuda_unavailable_reason,
             "The reason why device \"cuda\" cannot be used; empty if it can.");
  module.def("disable_cuda_kernels", &qn::disable_cuda_kernels, pybind11::arg("device"), pybind11::arg("kernels"),
             "Do without some of the kernels \"gemv\", \"gemm\", \"wgmma\" and \"panels\" in products on a GPU.");
  module.def(
      "codebook", [](const std::string& format) { return qn::codebook(format); }, pybind11::arg("format"),
      "The 16 levels of \"nf4\", \"fp4\", \"int4\", \"mxfp4\" or \"nvfp4\".");
  module.def("dynamic_map", &qn::dynamic_map, pybind11::arg("is_signed") = true,
             "The 256 ascending levels of the 8-bit dynamic map, for double-quantized scales and optimizers' moments.");
  qn::bind_paged(module);
}
