// The products of linear.h for activations of one dtype, each by the kernel that config.h chooses.
#pragma once

#include <memory>

#include "cpu/product/backward-inl.h"
#include "cpu/product/config.h"
#include "cpu/product/forward-inl.h"
#include "cpu/product/forward_small_m-inl.h"
#include "cpu/product/linear.h"
#include "cpu/product/panels-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
struct Linear {
  static std::unique_ptr<Job> forward(const LinearForwardArgs& args, const WeightRows& part) {
    switch (choose(cpu::ProductShape::Product::forward, args.weight, args.lora, part, args.x.dtype)) {
      case cpu::ProductKernel::small_m:
        return make_job<ForwardSmallM, Dot>(args, part);
      case cpu::ProductKernel::panels:
        return make_job<ForwardPanels, InOrder>(args, part);
      default:
        return make_job<Forward, Dot>(args, part);
    }
  }
  static std::unique_ptr<Job> backward_input(const LinearBackwardInputArgs& args, const WeightRows& part) {
    if (choose(cpu::ProductShape::Product::backward_input, args.weight, args.lora, part, args.dy.dtype) ==
        cpu::ProductKernel::panels)
      return make_job<BackwardInputPanels, InOrder>(args, part);
    return make_job<BackwardInput, Dot>(args, part);
  }

 private:
  using InOrder = DotF32<Dot::kActivation>;  // its chunks can be stored in the order of their elements

  static cpu::ProductKernel choose(cpu::ProductShape::Product product, const QuantizedWeightView& weight,
                                   const LoraView& lora, const WeightRows& part, DType dtype) {
    const cpu::ProductShape shape = cpu::product_shape(product, weight, lora, part, dtype, false);
    const cpu::ProductConfig config = cpu::choose_product(shape, cpu::forced_kernel());
    cpu::log_product(shape, config);
    return config.kernel;
  }
};

template <class Dot>
constexpr Products kProductsOf{Linear<Dot>::forward, Linear<Dot>::backward_input, lora_gradient<Dot>};

}  // namespace
}  // namespace qlora_native::QLN_ISA
