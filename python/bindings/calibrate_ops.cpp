// The torch ops of calibrated quantization. Their fakes are in python/qlora_native/_core/calibrate.py.
#include "common/calibration.h"
#include "common/layout.h"
#include "qlora_native/calibrate.h"
#include "rows.h"

namespace qlora_native {
namespace {

void gram_op(const Tensor& gram_sums, const Tensor& x) {
  check(x.dim() == 2, "x", "[T, K]", [&] { return std::to_string(x.dim()) + " dimensions"; });
  const std::int64_t K = x.size(1);
  check(K >= 1, "x", "[T, K] with K >= 1", K);
  const Rows rows = rows_of(x, K, "x");
  GramArgs args;
  args.x = rows.matrix;
  args.gram = static_cast<float*>(data_of(gram_sums, ScalarType::Float, K * K, x, "gram"));
  Operands operands;
  operands.add(gram_sums, {"gram"}, true);
  operands.add(x, {"x"}, false);
  operands.check_apart();
  gram(args, stream_of(x));
}

// Sets what both ops on a weight take: the weight, its shape, and the format of its codes.
template <class Args>
void set_weight(Args& args, const Tensor& weight, const OptionalTensor& code, std::int64_t bits,
                std::int64_t blocksize) {
  check(weight.dim() == 2 && weight.numel() > 0, "weight", "[N, K] with N, K >= 1",
        [&] { return std::to_string(weight.dim()) + " dimensions, or none of its elements"; });
  check_bits(bits, "bits");
  check_blocksize(blocksize, kMinBlocksize, "blocksize");
  args.N = weight.size(0);
  args.K = weight.size(1);
  args.bits = static_cast<int>(bits);
  args.blocksize = static_cast<int>(blocksize);
  args.weight = static_cast<const float*>(data_of(weight, ScalarType::Float, weight.numel(), weight, "weight"));
  if (bits == 8) return;
  check(code.has_value(), "code", "a tensor", "None");
  args.code = static_cast<const float*>(data_of(*code, ScalarType::Float, 16, weight, "code"));
}

Tensor weighted_scales_op(const Tensor& weight, const Tensor& importance, const OptionalTensor& code, std::int64_t bits,
                          std::int64_t blocksize, double lo, double hi, std::int64_t steps) {
  WeightedScalesArgs args;
  set_weight(args, weight, code, bits, blocksize);
  args.importance = static_cast<const float*>(data_of(importance, ScalarType::Float, args.K, weight, "importance"));
  args.lo = static_cast<float>(lo);
  args.hi = static_cast<float>(hi);
  check(steps >= 1 && steps <= kMaxScaleSteps, "steps", "1 ... 1024", steps);
  args.steps = static_cast<int>(steps);
  Tensor scales = new_tensor(weight, {ceil_div(weight.numel(), blocksize)}, ScalarType::Float);
  args.scales = static_cast<float*>(scales.data_ptr());
  weighted_scales(args, stream_of(weight));
  return scales;
}

Tensor quantize_with_feedback_op(const Tensor& weight, const Tensor& order, const Tensor& factor, const Tensor& scales,
                                 const OptionalTensor& code, std::int64_t bits, std::int64_t blocksize) {
  QuantizeWithFeedbackArgs args;
  set_weight(args, weight, code, bits, blocksize);
  args.order = static_cast<const std::int64_t*>(data_of(order, ScalarType::Long, args.K, weight, "order"));
  args.factor = static_cast<const float*>(data_of(factor, ScalarType::Float, args.K * args.K, weight, "factor"));
  const std::int64_t blocks = ceil_div(weight.numel(), blocksize);
  args.scales = static_cast<const float*>(data_of(scales, ScalarType::Float, blocks, weight, "scales"));
  Tensor codes = new_tensor(weight, {bytes_of_codes(weight.numel(), args.bits)}, ScalarType::Byte);
  args.codes = static_cast<std::uint8_t*>(codes.data_ptr());
  quantize_with_feedback(args, stream_of(weight));
  return codes;
}

}  // namespace
}  // namespace qlora_native

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_native, library) {
  library.def("gram(Tensor(a!) gram, Tensor x) -> ()");
  library.def(
      "weighted_scales(Tensor weight, Tensor importance, Tensor? code, int bits, int blocksize, float lo, float hi, "
      "int steps) -> Tensor");
  library.def(
      "quantize_with_feedback(Tensor weight, Tensor order, Tensor factor, Tensor scales, Tensor? code, int bits, "
      "int blocksize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, library) {
  library.impl("gram", TORCH_BOX(&qlora_native::gram_op));
  library.impl("weighted_scales", TORCH_BOX(&qlora_native::weighted_scales_op));
  library.impl("quantize_with_feedback", TORCH_BOX(&qlora_native::quantize_with_feedback_op));
}
