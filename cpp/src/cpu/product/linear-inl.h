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
    switch (choose(args, part)) {
      case cpu::ProductKernel::small_m:
        return make_job<ForwardSmallM, Dot>(args, part);
      case cpu::ProductKernel::panels:
        return make_job<ForwardPanels, InOrder>(args, part);
      default:
        return make_job<Forward, Dot>(args, part);
    }
  }
  static std::unique_ptr<Job> backward_input(const LinearBackwardInputArgs& args, const WeightRows& part) {
    if (choose(args, part) == cpu::ProductKernel::panels) return make_job<BackwardInputPanels, InOrder>(args, part);
    return make_job<BackwardInput, Dot>(args, part);
  }

 private:
  using InOrder = DotF32<Dot::kActivation>;  // its chunks can be stored in the order of their elements

  template <class Args>
  static cpu::ProductKernel choose(const Args& args, const WeightRows& part) {
    const cpu::ProductShape shape = cpu::product_shape(args, part, false);
    const cpu::ProductKernel kernel = cpu::choose_product(shape, cpu::forced_kernel());
    cpu::log_product(shape, kernel);
    return kernel;
  }
};

template <class Dot>
constexpr Products kProductsOf{Linear<Dot>::forward, Linear<Dot>::backward_input, lora_gradient<Dot>};

}  // namespace
}  // namespace qlora_native::QLN_ISA
