// The torch ops of what is between the products of a block. Their fakes and derivatives are in
// python/qlora_native/_core/elementwise.py.
#include <tuple>

#include "qlora_native/elementwise.h"
#include "rows.h"

namespace qlora_native {
namespace {

Activation activation_of(std::int64_t number) {
  check(number == 0 || number == 1, "activation", "0 (silu) or 1 (gelu_tanh)", number);
  return number == 0 ? Activation::silu : Activation::gelu_tanh;
}

// An operand of the shape of `first`, which the operation's other tensors share.
Rows rows_like(const Tensor& tensor, const Tensor& first, const char* argument) {
  check(first.dim() >= 1, argument, "at least one dimension", "none");
  check(same_device(tensor, first), argument, "the device of the other tensors", "another device");
  return rows_of(tensor, first.size(first.dim() - 1), argument);
}

Tensor gated_activation_op(const Tensor& gate, const Tensor& up, std::int64_t activation) {
  const Rows gate_rows = rows_like(gate, gate, "gate"), up_rows = rows_like(up, gate, "up");
  GatedActivationArgs args{activation_of(activation), gate_rows.matrix, up_rows.matrix, {}};
  Tensor h = gate;
  std::tie(h, args.h) = new_rows(gate, args.gate, args.gate.cols);
  gated_activation(args, stream_of(gate));
  return h;
}

std::tuple<Tensor, Tensor> gated_activation_backward_op(const Tensor& dh, const Tensor& gate, const Tensor& up,
                                                        std::int64_t activation) {
  const Rows gate_rows = rows_like(gate, gate, "gate"), up_rows = rows_like(up, gate, "up");
  const Rows dh_rows = rows_like(dh, gate, "dh");
  GatedActivationBackwardArgs args{activation_of(activation), gate_rows.matrix, up_rows.matrix, dh_rows.matrix, {}, {}};
  Tensor dgate = gate, dup = gate;
  std::tie(dgate, args.dgate) = new_rows(gate, args.gate, args.gate.cols);
  std::tie(dup, args.dup) = new_rows(gate, args.gate, args.gate.cols);
  gated_activation_backward(args, stream_of(gate));
  return {dgate, dup};
}

std::tuple<Tensor, Tensor> rms_norm_op(const Tensor& x, const Tensor& weight, double shift, double eps) {
  const Rows x_rows = rows_like(x, x, "x");
  RmsNormArgs args;
  args.x = x_rows.matrix;
  args.weight = data_of(weight, x.scalar_type(), args.x.cols, x, "weight");
  args.shift = static_cast<float>(shift);
  args.eps = static_cast<float>(eps);
  Tensor y = x, r = torch::stable::new_empty(x, {args.x.rows}, ScalarType::Float);
  std::tie(y, args.y) = new_rows(x, args.x, args.x.cols);
  args.r = static_cast<float*>(r.data_ptr());
  rms_norm(args, stream_of(x));
  return {y, r};
}

Tensor rms_norm_backward_op(const Tensor& dy, const Tensor& x, const Tensor& weight, double shift, const Tensor& r) {
  const Rows x_rows = rows_like(x, x, "x"), dy_rows = rows_like(dy, x, "dy");
  RmsNormBackwardArgs args;
  args.x = x_rows.matrix;
  args.weight = data_of(weight, x.scalar_type(), args.x.cols, x, "weight");
  args.shift = static_cast<float>(shift);
  args.dy = dy_rows.matrix;
  args.r = static_cast<const float*>(data_of(r, ScalarType::Float, args.x.rows, x, "r"));
  Tensor dx = x;
  std::tie(dx, args.dx) = new_rows(x, args.x, args.x.cols);
  rms_norm_backward(args, stream_of(x));
  return dx;
}

template <class Library>
void implement(Library& library) {
  library.impl("gated_activation", TORCH_BOX(&gated_activation_op));
  library.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward_op));
  library.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_op));
}

}  // namespace
}  // namespace qlora_native

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_native, library) {
  library.def("gated_activation(Tensor gate, Tensor up, int activation) -> Tensor");
  library.def(
      "gated_activation_backward(Tensor dh, Tensor gate, Tensor up, int activation) -> (Tensor dgate, Tensor dup)");
  library.def("rms_norm(Tensor x, Tensor weight, float shift, float eps) -> (Tensor y, Tensor r)");
  library.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float shift, Tensor r) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, library) { qlora_native::implement(library); }
STABLE_TORCH_LIBRARY_IMPL(qlora_native, CUDA, library) { qlora_native::implement(library); }
