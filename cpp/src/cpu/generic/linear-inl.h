// The three functions of linear.h for one Dot.
#pragma once

#include "cpu/generic/backward-inl.h"
#include "cpu/generic/forward_few-inl.h"
#include "cpu/generic/forward_many-inl.h"

namespace qlora_native {
namespace {

template <class Dot>
struct Linear {
  static void forward(const LinearForwardArgs& args) {
    if (args.x.rows == 0) return;
    with_rows(args.weight, [&](const auto& rows) {
      if (args.x.rows <= FewRows<Dot>::kMost)
        FewRows<Dot>::forward(rows, args);
      else
        ManyRows<Dot>::forward(rows, args);
    });
  }
  static void backward_input(const LinearBackwardInputArgs& args) {
    with_rows(args.weight, [&](const auto& rows) { Backward<Dot>::input(rows, args); });
  }
  static void lora_gradients(const LoraGradientsArgs& args) { Backward<Dot>::gradients(args); }

 private:
  template <class F>
  static void with_rows(const QuantizedWeightView& weight, F&& f) {
    if (weight.bits == 4)
      f(QuantizedRows<Dot, 4>(weight));
    else
      f(QuantizedRows<Dot, 8>(weight));
  }
};

}  // namespace
}  // namespace qlora_native
