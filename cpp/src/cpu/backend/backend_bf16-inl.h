// A backend that multiplies bfloat16, and does all else as another backend does.
#pragma once

#include "cpu/attention/attention_backward-inl.h"
#include "cpu/attention/attention_forward-inl.h"
#include "cpu/backend/isa.h"
#include "cpu/calibrate/gram-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// Dot multiplies in attention and in gram. kOthers is the backend of the other dtypes and operations.
template <class Dot, const Products& kProducts, const CpuBackend& (*kOthers)()>
CpuBackend with_bf16_products() {
  CpuBackend backend = kOthers();
  backend.bf16 = &kProducts;
  backend.table.linear_forward = [](const LinearForwardArgs& args, const Stream& stream) {
    args.x.dtype == DType::bf16 ? linear_forward(args, kProducts) : kOthers().table.linear_forward(args, stream);
  };
  backend.table.linear_backward_input = [](const LinearBackwardInputArgs& args, const Stream& stream) {
    args.dy.dtype == DType::bf16 ? linear_backward_input(args, kProducts)
                                 : kOthers().table.linear_backward_input(args, stream);
  };
  backend.table.lora_gradients = [](const LoraGradientsArgs& args, const Stream& stream) {
    args.x.dtype == DType::bf16 ? lora_gradients(args, kProducts) : kOthers().table.lora_gradients(args, stream);
  };
  backend.table.attention = [](const AttentionArgs& args, const Stream& stream) {
    args.in.dtype == DType::bf16 ? AttentionForward<Dot>::run(args) : kOthers().table.attention(args, stream);
  };
  backend.table.attention_backward = [](const AttentionBackwardArgs& args, const Stream& stream) {
    args.in.dtype == DType::bf16 ? AttentionBackward<Dot>::run(args) : kOthers().table.attention_backward(args, stream);
  };
  backend.table.gram = [](const GramArgs& args, const Stream& stream) {
    args.x.dtype == DType::bf16 ? Gram<Dot>::run(args) : kOthers().table.gram(args, stream);
  };
  return backend;
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
