// A backend whose products of bfloat16 have a Dot of their own. To be included after a DotBf16.
#pragma once

#include "backend.h"
#include "cpu/generic/linear-inl.h"

namespace qlora_native {
namespace {

// `kOthers`: the backend of the other dtypes and operations.
template <const Backend& (*kOthers)()>
Backend with_bf16_products() {
  Backend backend = kOthers();
  backend.linear_forward = [](const LinearForwardArgs& args, const Stream& stream) {
    args.x.dtype == DType::bf16 ? Linear<DotBf16>::forward(args) : kOthers().linear_forward(args, stream);
  };
  backend.linear_backward_input = [](const LinearBackwardInputArgs& args, const Stream& stream) {
    args.dy.dtype == DType::bf16 ? Linear<DotBf16>::backward_input(args)
                                 : kOthers().linear_backward_input(args, stream);
  };
  backend.lora_gradients = [](const LoraGradientsArgs& args, const Stream& stream) {
    args.x.dtype == DType::bf16 ? Linear<DotBf16>::lora_gradients(args) : kOthers().lora_gradients(args, stream);
  };
  return backend;
}

}  // namespace
}  // namespace qlora_native
