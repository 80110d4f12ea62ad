#include "qlora_native/elementwise.h"

#include "backend.h"
#include "check.h"

namespace qlora_native {
namespace {

void check_activation(Activation activation) {
  check(activation == Activation::silu || activation == Activation::gelu_tanh, "activation", "an Activation",
        static_cast<int>(activation));
}

// The first matrix of an operation, called `argument`, sets the shape and dtype of all the others (check_like).
void check_first(const ConstMatrix& first, const char* argument) {
  check(first.rows >= 0 && first.cols >= 1, argument, "[rows, N] with N >= 1",
        [&] { return "[" + std::to_string(first.rows) + ", " + std::to_string(first.cols) + "]"; });
  check_matrix(first, first.rows, first.cols, first.dtype, argument);
}
template <class Pointer>
void check_like(const BasicMatrix<Pointer>& matrix, const ConstMatrix& first, const char* argument) {
  check_matrix(matrix, first.rows, first.cols, first.dtype, argument);
}

}  // namespace

void gated_activation(const GatedActivationArgs& args, const Stream& stream) {
  check_activation(args.activation);
  check_first(args.gate, "gate");
  check_like(args.up, args.gate, "up");
  check_like(args.h, args.gate, "h");
  backend_for(stream).gated_activation(args, stream);
}

void gated_activation_backward(const GatedActivationBackwardArgs& args, const Stream& stream) {
  check_activation(args.activation);
  check_first(args.gate, "gate");
  check_like(args.up, args.gate, "up");
  check_like(args.dh, args.gate, "dh");
  check_like(args.dgate, args.gate, "dgate");
  check_like(args.dup, args.gate, "dup");
  backend_for(stream).gated_activation_backward(args, stream);
}

void rms_norm(const RmsNormArgs& args, const Stream& stream) {
  check_first(args.x, "x");
  check_like(args.y, args.x, "y");
  check_pointer(args.weight, true, "weight");
  check(std::isfinite(args.shift), "shift", "a finite value", args.shift);
  check(std::isfinite(args.eps) && args.eps >= 0.0f, "eps", ">= 0", args.eps);
  check_pointer(args.r, args.x.rows > 0, "r");
  backend_for(stream).rms_norm(args, stream);
}

void rms_norm_backward(const RmsNormBackwardArgs& args, const Stream& stream) {
  check_first(args.x, "x");
  check_like(args.dy, args.x, "dy");
  check_like(args.dx, args.x, "dx");
  check_pointer(args.weight, true, "weight");
  check(std::isfinite(args.shift), "shift", "a finite value", args.shift);
  check_pointer(args.r, args.x.rows > 0, "r");
  backend_for(stream).rms_norm_backward(args, stream);
}

}  // namespace qlora_native
