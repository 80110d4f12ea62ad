// The torch ops of attention and of the rotation of positions. Their fakes and derivatives are in
// python/qlora_native/_core/attention.py.
#include <tuple>
#include <utility>

#include "qlora_native/attention.h"
#include "rows.h"

namespace qlora_native {
namespace {

// A tensor [batch, heads, rows, head_dim] as heads. It is copied if the elements of a row are not contiguous, or rows
// overlap; `storage` keeps the copy.
struct HeadsOfTensor {
  Tensor storage;
  ConstHeads heads;
};

template <class Pointer>
BasicHeads<Pointer> heads_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return {tensor.data_ptr(), sizes[1], sizes[2], strides[0], strides[1], strides[2]};
}

HeadsOfTensor heads_like(const Tensor& tensor, const Tensor& q, const char* argument) {
  check(tensor.dim() == 4, argument, "[batch, heads, rows, head_dim]",
        [&] { return std::to_string(tensor.dim()) + " dimensions"; });
  check(
      tensor.scalar_type() == q.scalar_type(), argument, [&] { return name_of_type(q.scalar_type()); },
      [&] { return name_of_type(tensor.scalar_type()); });
  check(same_device(tensor, q), argument, "the device of the other tensors", "another device");
  const auto sizes = tensor.sizes(), of_q = q.sizes(), strides = tensor.strides();
  check(sizes[0] == of_q[0], argument, [&] { return "a batch of " + std::to_string(of_q[0]); }, sizes[0]);
  check(sizes[3] == of_q[3], argument, [&] { return "a last dimension of " + std::to_string(of_q[3]); }, sizes[3]);
  check_memory(tensor, argument);
  const bool as_it_is = (sizes[3] <= 1 || strides[3] == 1) && (sizes[2] <= 1 || strides[2] >= sizes[3]);
  Tensor storage = as_it_is ? tensor : torch::stable::contiguous(tensor);
  const ConstHeads heads = heads_of<const void*>(storage);
  return {std::move(storage), heads};
}

// A new tensor [batch, heads, rows, head_dim] whose tokens lie one after another, each with all of its heads, as the
// product that follows wants them.
std::tuple<Tensor, Heads> new_heads(const Tensor& like) {
  const auto sizes = like.sizes();
  const Tensor tokens = new_tensor(like, {sizes[0], sizes[2], sizes[1], sizes[3]}, like.scalar_type());
  Tensor result = torch::stable::transpose(tokens, 1, 2);
  const Heads heads = heads_of<void*>(result);
  return {std::move(result), heads};
}

AttentionInputs inputs_of(const HeadsOfTensor& q, const HeadsOfTensor& k, const HeadsOfTensor& v, double scale,
                          const OptionalTensor& key_ranges) {
  AttentionInputs in;
  const Tensor& tensor = q.storage;
  in.dtype = dtype_of(tensor.scalar_type(), "q");
  in.batch = tensor.size(0);
  in.head_dim = tensor.size(3);
  in.q = q.heads;
  in.k = k.heads;
  in.v = v.heads;
  in.scale = static_cast<float>(scale);
  if (key_ranges) {
    const bool shared = key_ranges->dim() > 0 && key_ranges->size(0) == 1;
    const std::int64_t of_sequence = 2 * in.q.rows;
    in.key_ranges = static_cast<const std::int32_t*>(
        data_of(*key_ranges, ScalarType::Int, shared ? of_sequence : in.batch * of_sequence, tensor, "key_ranges"));
    in.key_ranges_stride = shared ? 0 : of_sequence;
  }
  return in;
}

std::tuple<Tensor, Tensor> attention_op(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                        const OptionalTensor& key_ranges) {
  const HeadsOfTensor of_q = heads_like(q, q, "q"), of_k = heads_like(k, q, "k"), of_v = heads_like(v, q, "v");
  AttentionArgs args;
  args.in = inputs_of(of_q, of_k, of_v, scale, key_ranges);
  Tensor out = q, lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  std::tie(out, args.out) = new_heads(q);
  args.lse = static_cast<float*>(lse.data_ptr());
  attention(args, stream_of(q));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_op(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, const Tensor& out, const Tensor& lse,
                                                         double scale, const OptionalTensor& key_ranges) {
  const HeadsOfTensor of_q = heads_like(q, q, "q"), of_k = heads_like(k, q, "k"), of_v = heads_like(v, q, "v");
  const HeadsOfTensor of_out = heads_like(out, q, "out"), of_dout = heads_like(dout, q, "dout");
  AttentionBackwardArgs args;
  args.in = inputs_of(of_q, of_k, of_v, scale, key_ranges);
  args.out = of_out.heads;
  args.dout = of_dout.heads;
  args.lse = static_cast<const float*>(data_of(lse, ScalarType::Float, q.size(0) * q.size(1) * q.size(2), q, "lse"));
  Tensor dq = q, dk = k, dv = v;
  std::tie(dq, args.dq) = new_heads(q);
  std::tie(dk, args.dk) = new_heads(k);
  std::tie(dv, args.dv) = new_heads(v);
  attention_backward(args, stream_of(q));
  return {dq, dk, dv};
}

Tensor rotary_op(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  const HeadsOfTensor of_x = heads_like(x, x, "x");
  RotaryArgs args;
  args.dtype = dtype_of(x.scalar_type(), "x");
  args.batch = x.size(0);
  args.head_dim = x.size(3);
  args.x = of_x.heads;
  args.shared = cos.dim() > 0 && cos.size(0) == 1;
  const std::int64_t numel = (args.shared ? 1 : args.batch) * args.x.rows * args.head_dim;
  args.cos = data_of(cos, x.scalar_type(), numel, x, "cos");
  args.sin = data_of(sin, x.scalar_type(), numel, x, "sin");
  args.transposed = transposed;
  Tensor y = x;
  std::tie(y, args.y) = new_heads(x);
  rotary(args, stream_of(x));
  return y;
}

}  // namespace
}  // namespace qlora_native

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_native, library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? key_ranges=None) -> (Tensor out, Tensor lse)");
  library.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
      "Tensor? key_ranges=None) -> (Tensor dq, Tensor dk, Tensor dv)");
  library.def("rotary(Tensor x, Tensor cos, Tensor sin, bool transposed=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, library) {
  library.impl("attention", TORCH_BOX(&qlora_native::attention_op));
  library.impl("attention_backward", TORCH_BOX(&qlora_native::attention_backward_op));
  library.impl("rotary", TORCH_BOX(&qlora_native::rotary_op));
}
