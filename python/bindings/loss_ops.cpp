// The torch op of the loss: schema and implementation. Its fake kernel is in python/qlora_native/_core/loss.py.
#include <tuple>

#include "qlora_native/cross_entropy.h"
#include "tensors.h"

namespace qlora_native {
namespace {

std::tuple<Tensor, Tensor> cross_entropy_op(const Tensor& logits, const Tensor& labels, std::int64_t ignore_index,
                                            double scale, double softcap, double label_smoothing, double z_loss,
                                            bool gradient, const OptionalTensor& row_gradients) {
  check(logits.dim() == 2, "logits", "[rows, V]", [&] { return std::to_string(logits.dim()) + " dimensions"; });
  const std::int64_t rows = logits.size(0), V = logits.size(1);
  const ScalarType type = logits.scalar_type();
  CrossEntropyArgs args;
  args.logits = {data_of(logits, type, rows * V, logits, "logits"), dtype_of(type, "logits"), rows, V, V};
  args.labels = static_cast<const std::int64_t*>(data_of(labels, ScalarType::Long, rows, logits, "labels"));
  args.ignore_index = ignore_index;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.z_loss = static_cast<float>(z_loss);
  args.gradient = gradient;
  if (row_gradients)
    args.row_gradients =
        static_cast<const float*>(data_of(*row_gradients, ScalarType::Float, rows, logits, "row_gradients"));
  if (gradient) {
    Operands operands;
    operands.add(logits, {"logits"}, true);
    operands.add(labels, {"labels"}, false);
    if (row_gradients) operands.add(*row_gradients, {"row_gradients"}, false);
    operands.check_apart();
  }
  Tensor loss = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor log_probability = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  args.loss = static_cast<float*>(loss.data_ptr());
  args.log_probability = static_cast<float*>(log_probability.data_ptr());
  cross_entropy(args, stream_of(logits));
  return {loss, log_probability};
}

}  // namespace
}  // namespace qlora_native

// If `gradient` is true, the op overwrites the logits with their gradient (cross_entropy.h).
STABLE_TORCH_LIBRARY_FRAGMENT(qlora_native, library) {
  library.def(
      "cross_entropy_(Tensor(a!) logits, Tensor labels, int ignore_index, float scale, float softcap, "
      "float label_smoothing, float z_loss, bool gradient, Tensor? row_gradients=None) -> (Tensor loss, Tensor "
      "log_probability)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, library) {
  library.impl("cross_entropy_", TORCH_BOX(&qlora_native::cross_entropy_op));
}
STABLE_TORCH_LIBRARY_IMPL(qlora_native, CUDA, library) {
  library.impl("cross_entropy_", TORCH_BOX(&qlora_native::cross_entropy_op));
}
