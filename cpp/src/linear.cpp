#include "qlora_native/linear.h"

#include "backend.h"
#include "check.h"

namespace qlora_native {

void linear_forward(const LinearForwardArgs& args, const Stream& stream) {
  check_weight(args.weight, stream);
  check_lora(args.lora, args.weight.N, args.weight.K);
  check(args.x.rows >= 0, "x.rows", ">= 0", args.x.rows);
  check_groups(args.groups, args.weight.count, args.lora.count, args.x.rows, stream);
  check_matrix(args.x, args.x.rows, args.weight.K, args.x.dtype, "x");
  check_matrix(args.y, args.x.rows, args.weight.N, args.x.dtype, "y");
  check_pointer(args.lora.a, args.lora.rank > 0, "lora.a");
  check_pointer(args.lora.b, args.lora.rank > 0, "lora.b");
  if (args.u.data != nullptr) check_matrix(args.u, args.x.rows, args.lora.rank, args.x.dtype, "u");
  backend_for(stream).linear_forward(args, stream);
}

void linear_backward_input(const LinearBackwardInputArgs& args, const Stream& stream) {
  check_weight(args.weight, stream);
  check_lora(args.lora, args.weight.N, args.weight.K);
  check(args.dy.rows >= 0, "dy.rows", ">= 0", args.dy.rows);
  check_groups(args.groups, args.weight.count, args.lora.count, args.dy.rows, stream);
  check_matrix(args.dy, args.dy.rows, args.weight.N, args.dy.dtype, "dy");
  check_pointer(args.lora.a, args.lora.rank > 0, "lora.a");
  check_pointer(args.lora.b, args.lora.rank > 0, "lora.b");
  if (args.dx.data != nullptr) check_matrix(args.dx, args.dy.rows, args.weight.K, args.dy.dtype, "dx");
  if (args.v.data != nullptr) check_matrix(args.v, args.dy.rows, args.lora.rank, args.dy.dtype, "v");
  backend_for(stream).linear_backward_input(args, stream);
}

void lora_gradients(const LoraGradientsArgs& args, const Stream& stream) {
  check(args.x.rows >= 0, "x.rows", ">= 0", args.x.rows);
  check(args.x.cols >= 1, "x.cols", ">= 1", args.x.cols);
  check(args.dy.cols >= 1, "dy.cols", ">= 1", args.dy.cols);
  check_lora(args.lora, args.dy.cols, args.x.cols);
  check_groups(args.groups, 1, args.lora.count, args.x.rows, stream);
  check_matrix(args.x, args.x.rows, args.x.cols, args.x.dtype, "x");
  check_matrix(args.dy, args.x.rows, args.dy.cols, args.x.dtype, "dy");
  check_matrix(args.u, args.x.rows, args.lora.rank, args.x.dtype, "u");
  check_matrix(args.v, args.x.rows, args.lora.rank, args.x.dtype, "v");
  backend_for(stream).lora_gradients(args, stream);
}

}  // namespace qlora_native
