// The torch ops, over torch's stable ABI: schemas, and implementations that turn tensors into views and call the core.
// They check what memory safety needs; the messages for users come from python/qlora_native/_core/.
// Fake kernels and autograd formulas are in python/qlora_native/_core/ops.py.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/layout.h"
#include "qlora_native/linear.h"
#include "qlora_native/quantize.h"
#include "rows.h"
#include "tensors.h"

namespace qlora_native {

void install_torch_hooks();  // hooks.cpp

namespace {

// ---- tensors to views ----------------------------------------------------------------------------------------------

// The arguments that describe a quantized weight, in the order of the schemas (QLN_WEIGHT). Each op spells them again,
// because TORCH_BOX unpacks torch's stack by the types of a function's parameters.
struct WeightTensors {
  Tensor codes, absmax;
  OptionalTensor nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point;
  std::int64_t N, K, bits, blocksize, nested_blocksize, byte_format;
  std::int64_t count = 1;
};

QuantizedWeightView view_of(const WeightTensors& w, const Tensor& like) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 31;
  check_bits(w.bits, "bits");
  check_blocksize(w.blocksize, kMinBlocksize, "blocksize");
  check(w.N >= 1 && w.N < kLimit, "N", "1 ... 2^31", w.N);
  check(w.K >= 1 && w.K < kLimit / 4, "K", "1 ... 2^29", w.K);
  check(w.count >= 1 && w.count < kLimit / w.N, "weights", "at least 1, and N * weights below 2^31", w.count);

  QuantizedWeightView view;
  view.N = w.N;
  view.K = w.K;
  view.count = w.count;
  view.bits = static_cast<int>(w.bits);
  view.blocksize = static_cast<int>(w.blocksize);
  check(w.nested_blocksize >= 1 && w.nested_blocksize < kLimit, "nested_blocksize", "1 ... 2^31", w.nested_blocksize);
  view.nested_blocksize = static_cast<int>(w.nested_blocksize);
  check(w.byte_format >= 0 && w.byte_format <= static_cast<int>(ByteFormat::e4m3), "byte_format", "a ByteFormat",
        w.byte_format);
  view.byte_format = static_cast<ByteFormat>(w.byte_format);
  const std::int64_t bytes = bytes_of_codes(view.elements(), view.bits);
  const auto f32 = [&](const OptionalTensor& tensor, std::int64_t numel, const char* argument) {
    check(tensor.has_value(), argument, "a tensor", "None");
    return static_cast<const float*>(data_of(*tensor, ScalarType::Float, numel, like, argument));
  };
  view.codes = static_cast<const std::uint8_t*>(data_of(w.codes, ScalarType::Byte, bytes, like, "codes"));
  const ScalarType absmax_type = w.nested_absmax ? ScalarType::Byte : w.absmax.scalar_type();
  view.absmax = data_of(w.absmax, absmax_type, view.blocks(), like, "absmax");
  if (!w.nested_absmax) view.scale_dtype = dtype_of(absmax_type, "absmax");
  if (w.minimum) {
    const ScalarType type = w.nested_minimum ? ScalarType::Byte : w.minimum->scalar_type();
    view.minimum = data_of(*w.minimum, type, view.blocks(), like, "minimum");
    if (!w.nested_minimum) view.scale_dtype = dtype_of(type, "minimum");
    check(w.nested_absmax.has_value() || type == absmax_type, "minimum", "the dtype of absmax",
          [&] { return name_of_type(type); });
  }
  if (w.nested_minimum)
    view.nested_minimum = f32(w.nested_minimum, ceil_div(view.blocks(), view.nested_blocksize), "nested_minimum");
  if (w.zero_point)
    view.zero_point =
        static_cast<const std::int8_t*>(data_of(*w.zero_point, ScalarType::Char, view.blocks(), like, "zero_point"));
  if (w.nested_absmax) {
    view.nested_absmax = f32(w.nested_absmax, ceil_div(view.blocks(), view.nested_blocksize), "nested_absmax");
    view.nested_code = f32(w.nested_code, 256, "nested_code");
    view.offset = f32(w.offset, 1, "offset");
  }
  if (w.bits == 4) view.code = f32(w.code, 16, "code");
  return view;
}

struct LoraTensors {
  OptionalTensor a, b;
  double scaling, dropout;
  OptionalTensor seed;
};

// Sets the dropout of an adapter. A seed on the CPU is read here; the kernels read one that is on the device of `like`.
void set_dropout(LoraView& view, double dropout, const OptionalTensor& seed, const Tensor& like) {
  view.dropout = static_cast<float>(dropout);
  if (dropout == 0.0) return;
  check(seed.has_value(), "seed", "a tensor where dropout is above 0", "None");
  check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed", "one int64",
        [&] { return name_of_type(seed->scalar_type()); });
  check_memory(*seed, "seed");
  if (seed->is_cpu()) {
    view.seed = static_cast<std::uint64_t>(*static_cast<const std::int64_t*>(seed->data_ptr()));
  } else {
    check(same_device(*seed, like), "seed", "the CPU, or the device of the other tensors", "another device");
    view.device_seed = static_cast<const std::uint64_t*>(seed->data_ptr());
  }
}

// The view of an adapter; its pointers are null if there is none.
LoraView view_of(const LoraTensors& lora, const QuantizedWeightView& w, const Tensor& like) {
  LoraView view;
  view.scaling = static_cast<float>(lora.scaling);
  if (!lora.a && !lora.b) return view;
  check(lora.a.has_value(), "lora_a", "a tensor beside lora_b", "None");
  check(lora.b.has_value(), "lora_b", "a tensor beside lora_a", "None");
  const std::int64_t dim = lora.a->dim();
  check(dim == 2 || dim == 3, "lora_a", "[rank, K] or [count, rank, K]",
        [&] { return std::to_string(dim) + " dimensions"; });
  const ScalarType type = lora.a->scalar_type();
  if (dim == 3) view.count = lora.a->size(0);
  view.rank = lora.a->size(dim - 2);
  view.dtype = dtype_of(type, "lora_a");
  view.a = data_of(*lora.a, type, view.count * view.rank * w.K, like, "lora_a");
  view.b = data_of(*lora.b, type, view.count * w.N * view.rank, like, "lora_b");
  set_dropout(view, lora.dropout, lora.seed, like);
  return view;
}

RowGroups groups_of(const OptionalTensor& offsets, const Tensor& like) {
  if (!offsets) return {};
  check(offsets->numel() >= 2, "offsets", "one element more than there are groups", offsets->numel());
  return {.count = offsets->numel() - 1,
          .offsets =
              static_cast<const std::int64_t*>(data_of(*offsets, ScalarType::Long, offsets->numel(), like, "offsets"))};
}

// A new [M, rank] tensor and its matrix; an empty tensor and no matrix where rank is 0.
std::tuple<Tensor, Matrix> new_low_rank(const Tensor& like, const ConstMatrix& rows, std::int64_t rank) {
  if (rank == 0) return {new_tensor(like, {0}, like.scalar_type()), Matrix{}};
  Tensor tensor = new_tensor(like, {rows.rows, rank}, like.scalar_type());
  return {tensor, {tensor.data_ptr(), rows.dtype, rows.rows, rank, rank}};
}

// ---- ops -----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> quantize_absmax_op(const Tensor& absmax, const Tensor& nested_code) {
  const std::int64_t blocks = absmax.numel();
  Tensor codes = new_tensor(absmax, {blocks}, ScalarType::Byte);
  Tensor nested_absmax = new_tensor(absmax, {ceil_div(blocks, kNestedBlocksize)}, ScalarType::Float);
  Tensor offset = torch::stable::new_zeros(absmax, {}, ScalarType::Float);
  QuantizeAbsmaxArgs args;
  args.absmax = static_cast<const float*>(data_of(absmax, ScalarType::Float, blocks, absmax, "absmax"));
  args.blocks = blocks;
  args.nested_code = static_cast<const float*>(data_of(nested_code, ScalarType::Float, 256, absmax, "nested_code"));
  args.codes = static_cast<std::uint8_t*>(codes.data_ptr());
  args.nested_absmax = static_cast<float*>(nested_absmax.data_ptr());
  args.offset = static_cast<float*>(offset.data_ptr());
  quantize_absmax(args, stream_of(absmax));
  return {codes, nested_absmax, offset};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_op(const Tensor& weight, const OptionalTensor& code,
                                                               const OptionalTensor& nested_code, std::int64_t bits,
                                                               std::int64_t blocksize) {
  check_bits(bits, "bits");
  check_blocksize(blocksize, kMinQuantizeBlocksize, "blocksize");
  check_memory(weight, "weight");
  const Tensor source = torch::stable::contiguous(weight);
  const Stream stream = stream_of(weight);
  const std::int64_t elements = source.numel();
  Tensor codes = new_tensor(weight, {bytes_of_codes(elements, static_cast<int>(bits))}, ScalarType::Byte);
  Tensor absmax = new_tensor(weight, {ceil_div(elements, blocksize)}, ScalarType::Float);
  Tensor non_finite = new_tensor(weight, {2}, ScalarType::Long);
  static_assert(sizeof(NonFinite) == 2 * sizeof(std::int64_t));
  QuantizeArgs args;
  args.weight = source.data_ptr();
  args.dtype = dtype_of(weight.scalar_type(), "weight");
  args.elements = elements;
  args.bits = static_cast<int>(bits);
  args.blocksize = static_cast<int>(blocksize);
  if (bits == 4) {
    check(code.has_value(), "code", "a tensor", "None");
    args.code = static_cast<const float*>(data_of(*code, ScalarType::Float, 16, weight, "code"));
  }
  args.codes = static_cast<std::uint8_t*>(codes.data_ptr());
  args.absmax = static_cast<float*>(absmax.data_ptr());
  args.non_finite = static_cast<NonFinite*>(non_finite.data_ptr());
  quantize(args, stream);

  if (!nested_code) {
    Tensor offset = torch::stable::new_zeros(weight, {}, ScalarType::Float);
    return {codes, absmax, new_tensor(weight, {0}, ScalarType::Float), offset, non_finite};
  }
  auto [nested_codes, nested_absmax, offset] = quantize_absmax_op(absmax, *nested_code);
  return {codes, nested_codes, nested_absmax, offset, non_finite};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_microscaled_op(const Tensor& weight, std::int64_t blocksize) {
  check_microscaled_blocksize(blocksize, "blocksize");
  check_memory(weight, "weight");
  const Tensor source = torch::stable::contiguous(weight);
  const std::int64_t elements = source.numel();
  Tensor codes = new_tensor(weight, {bytes_of_codes(elements, 4)}, ScalarType::Byte);
  Tensor scales = new_tensor(weight, {ceil_div(elements, blocksize)}, ScalarType::Byte);
  Tensor nested_code = new_tensor(weight, {256}, ScalarType::Float);
  Tensor non_finite = new_tensor(weight, {2}, ScalarType::Long);
  QuantizeMicroscaledArgs args;
  args.weight = source.data_ptr();
  args.dtype = dtype_of(weight.scalar_type(), "weight");
  args.elements = elements;
  args.blocksize = static_cast<int>(blocksize);
  args.codes = static_cast<std::uint8_t*>(codes.data_ptr());
  args.scales = static_cast<std::uint8_t*>(scales.data_ptr());
  args.nested_code = static_cast<float*>(nested_code.data_ptr());
  args.non_finite = static_cast<NonFinite*>(non_finite.data_ptr());
  quantize_microscaled(args, stream_of(weight));
  return {codes, scales, nested_code, non_finite};
}

Tensor dequantize_op(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                     const OptionalTensor& nested_code, const OptionalTensor& offset, const OptionalTensor& code,
                     const OptionalTensor& minimum, const OptionalTensor& nested_minimum,
                     const OptionalTensor& zero_point, std::int64_t N, std::int64_t K, std::int64_t bits,
                     std::int64_t blocksize, std::int64_t nested_blocksize, std::int64_t byte_format,
                     ScalarType dtype) {
  DequantizeArgs args;
  args.weight = view_of({codes, absmax, nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point,
                         N, K, bits, blocksize, nested_blocksize, byte_format},
                        codes);
  args.dtype = dtype_of(dtype, "dtype");
  Tensor out = new_tensor(codes, {N, K}, dtype);
  args.out = out.data_ptr();
  dequantize(args, stream_of(codes));
  return out;
}

Tensor dequantize_rows_op(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                          const OptionalTensor& nested_code, const OptionalTensor& offset, const OptionalTensor& code,
                          const OptionalTensor& minimum, const OptionalTensor& nested_minimum,
                          const OptionalTensor& zero_point, std::int64_t N, std::int64_t K, std::int64_t bits,
                          std::int64_t blocksize, std::int64_t nested_blocksize, std::int64_t byte_format,
                          ScalarType dtype, const Tensor& rows) {
  DequantizeArgs args;
  args.weight = view_of({codes, absmax, nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point,
                         N, K, bits, blocksize, nested_blocksize, byte_format},
                        codes);
  args.dtype = dtype_of(dtype, "dtype");
  args.row_count = rows.numel();
  args.rows = static_cast<const std::int64_t*>(data_of(rows, ScalarType::Long, args.row_count, codes, "rows"));
  Tensor out = new_tensor(codes, {args.row_count, K}, dtype);
  args.out = out.data_ptr();
  // An empty tensor has a null pointer, which would mean all rows.
  if (args.row_count > 0) dequantize(args, stream_of(codes));
  return out;
}

std::tuple<Tensor, Tensor> linear_forward_op(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                             const OptionalTensor& offset, const OptionalTensor& code,
                                             const OptionalTensor& minimum, const OptionalTensor& nested_minimum,
                                             const OptionalTensor& zero_point, std::int64_t N, std::int64_t K,
                                             std::int64_t bits, std::int64_t blocksize, std::int64_t nested_blocksize,
                                             std::int64_t byte_format, const OptionalTensor& bias,
                                             const OptionalTensor& lora_a, const OptionalTensor& lora_b,
                                             double lora_scaling, double lora_dropout, const OptionalTensor& seed,
                                             const OptionalTensor& offsets, std::int64_t weights) {
  LinearForwardArgs args;
  args.weight = view_of({codes, absmax, nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point,
                         N, K, bits, blocksize, nested_blocksize, byte_format, weights},
                        x);
  args.groups = groups_of(offsets, x);
  args.lora = view_of({lora_a, lora_b, lora_scaling, lora_dropout, seed}, args.weight, x);
  const Rows rows = rows_of(x, K, "x");
  args.x = rows.matrix;
  if (bias) args.bias = data_of(*bias, x.scalar_type(), weights * N, x, "bias");
  Tensor y, u;
  std::tie(y, args.y) = new_rows(x, args.x, N);
  std::tie(u, args.u) = new_low_rank(x, args.x, args.lora.rank);
  linear_forward(args, stream_of(x));
  return {y, u};
}

std::tuple<Tensor, Tensor> linear_backward_input_op(
    const Tensor& dy, const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
    const OptionalTensor& nested_code, const OptionalTensor& offset, const OptionalTensor& code,
    const OptionalTensor& minimum, const OptionalTensor& nested_minimum, const OptionalTensor& zero_point,
    std::int64_t N, std::int64_t K, std::int64_t bits, std::int64_t blocksize, std::int64_t nested_blocksize,
    std::int64_t byte_format, const OptionalTensor& lora_a, const OptionalTensor& lora_b, double lora_scaling,
    double lora_dropout, const OptionalTensor& seed, bool need_dx, const OptionalTensor& offsets,
    std::int64_t weights) {
  LinearBackwardInputArgs args;
  args.weight = view_of({codes, absmax, nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point,
                         N, K, bits, blocksize, nested_blocksize, byte_format, weights},
                        dy);
  args.groups = groups_of(offsets, dy);
  args.lora = view_of({lora_a, lora_b, lora_scaling, lora_dropout, seed}, args.weight, dy);
  const Rows rows = rows_of(dy, N, "dy");
  args.dy = rows.matrix;
  Tensor dx, v;
  if (need_dx) {
    std::tie(dx, args.dx) = new_rows(dy, args.dy, K);
  } else {
    dx = new_tensor(dy, {0}, dy.scalar_type());
  }
  std::tie(v, args.v) = new_low_rank(dy, args.dy, args.lora.rank);
  linear_backward_input(args, stream_of(dy));
  return {dx, v};
}

std::tuple<Tensor, Tensor> lora_gradients_op(const Tensor& x, const Tensor& dy, const Tensor& u, const Tensor& v,
                                             double lora_scaling, double lora_dropout, const OptionalTensor& seed,
                                             ScalarType dtype, const OptionalTensor& offsets, std::int64_t adapters) {
  check(x.dim() >= 1, "x", "[..., K]", "no dimension");
  check(dy.dim() >= 1, "dy", "[..., N]", "no dimension");
  check(u.dim() == 2, "u", "[M, rank]", [&] { return std::to_string(u.dim()) + " dimensions"; });
  const std::int64_t N = dy.size(dy.dim() - 1), K = x.size(x.dim() - 1), rank = u.size(1);
  for (const Tensor* tensor : {&dy, &u, &v}) {
    check(same_device(*tensor, x), "dy, u and v", "the device of x", "another device");
  }
  const Rows x_rows = rows_of(x, K, "x"), dy_rows = rows_of(dy, N, "dy");
  const Rows u_rows = rows_of(u, rank, "u"), v_rows = rows_of(v, rank, "v");
  LoraGradientsArgs args;
  check(adapters >= 0, "adapters", ">= 0", adapters);
  args.lora.rank = rank;
  args.lora.count = adapters == 0 ? 1 : adapters;
  args.groups = groups_of(offsets, x);
  args.lora.dtype = dtype_of(dtype, "dtype");
  args.lora.scaling = static_cast<float>(lora_scaling);
  set_dropout(args.lora, lora_dropout, seed, x);
  args.x = x_rows.matrix;
  args.dy = dy_rows.matrix;
  args.u = u_rows.matrix;
  args.v = v_rows.matrix;
  const auto new_gradient = [&](std::int64_t rows, std::int64_t cols) {
    return adapters == 0 ? new_tensor(x, {rows, cols}, dtype) : new_tensor(x, {adapters, rows, cols}, dtype);
  };
  Tensor da = new_gradient(rank, K), db = new_gradient(N, rank);
  args.da = da.data_ptr();
  args.db = db.data_ptr();
  lora_gradients(args, stream_of(x));
  return {da, db};
}

template <class Library>
void implement(Library& library) {
  library.impl("quantize", TORCH_BOX(&quantize_op));
  library.impl("quantize_absmax", TORCH_BOX(&quantize_absmax_op));
  library.impl("quantize_microscaled", TORCH_BOX(&quantize_microscaled_op));
  library.impl("dequantize", TORCH_BOX(&dequantize_op));
  library.impl("dequantize_rows", TORCH_BOX(&dequantize_rows_op));
  library.impl("linear_forward", TORCH_BOX(&linear_forward_op));
  library.impl("linear_backward_input", TORCH_BOX(&linear_backward_input_op));
  library.impl("lora_gradients", TORCH_BOX(&lora_gradients_op));
}

}  // namespace
}  // namespace qlora_native

#define QLN_WEIGHT                                                                                          \
  "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, Tensor? code, " \
  "Tensor? minimum, Tensor? nested_minimum, Tensor? zero_point, "                                           \
  "int N, int K, int bits, int blocksize, int nested_blocksize, int byte_format"
#define QLN_LORA "Tensor? lora_a, Tensor? lora_b, float lora_scaling, float lora_dropout, Tensor? seed"
// Rows in groups (linear.h): offsets [groups + 1], and the number of weights in the codes.
#define QLN_GROUPS "Tensor? offsets=None, int weights=1"

// Run when this library is loaded.
STABLE_TORCH_LIBRARY(qlora_native, library) {
  qlora_native::install_torch_hooks();
  library.def(
      "quantize(Tensor weight, Tensor? code, Tensor? nested_code, int bits, int blocksize) -> "
      "(Tensor codes, Tensor absmax, Tensor nested_absmax, Tensor offset, Tensor non_finite)");
  library.def(
      "quantize_absmax(Tensor absmax, Tensor nested_code) -> (Tensor codes, Tensor nested_absmax, Tensor offset)");
  library.def(
      "quantize_microscaled(Tensor weight, int blocksize) -> "
      "(Tensor codes, Tensor scales, Tensor nested_code, Tensor non_finite)");
  library.def("dequantize(" QLN_WEIGHT ", ScalarType dtype) -> Tensor");
  library.def("dequantize_rows(" QLN_WEIGHT ", ScalarType dtype, Tensor rows) -> Tensor");
  library.def("linear_forward(Tensor x, " QLN_WEIGHT ", Tensor? bias, " QLN_LORA ", " QLN_GROUPS
              ") -> (Tensor y, Tensor u)");
  library.def("linear_backward_input(Tensor dy, " QLN_WEIGHT ", " QLN_LORA ", bool need_dx, " QLN_GROUPS
              ") -> (Tensor dx, Tensor v)");
  library.def(
      "lora_gradients(Tensor x, Tensor dy, Tensor u, Tensor v, float lora_scaling, float lora_dropout, Tensor? seed, "
      "ScalarType dtype, Tensor? offsets=None, int adapters=0) -> (Tensor da, Tensor db)");
}

// Both devices share the implementations: the core chooses the backend by the device of the stream.
STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, library) { qlora_native::implement(library); }
STABLE_TORCH_LIBRARY_IMPL(qlora_native, CUDA, library) { qlora_native::implement(library); }
