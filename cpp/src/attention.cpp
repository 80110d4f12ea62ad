#include "qlora_native/attention.h"

#include "backend.h"
#include "check.h"

namespace qlora_native {
namespace {

constexpr const char* kInstead = "; on a GPU use those of torch or of cuDNN";

// Checks that x has so many heads of so many rows, and its strides.
template <class Pointer>
void check_heads(const BasicHeads<Pointer>& x, std::int64_t batch, std::int64_t head_dim, std::int64_t heads,
                 std::int64_t rows, const char* argument) {
  const auto shape = [](std::int64_t h, std::int64_t r) {
    return [=] { return std::to_string(h) + " heads of " + std::to_string(r) + " rows"; };
  };
  const auto field = [=](const char* name) { return [=] { return std::string(argument) + name; }; };
  check(x.heads == heads && x.rows == rows, argument, shape(heads, rows), shape(x.heads, x.rows));
  const bool some = batch > 0 && heads > 0 && rows > 0;
  check(
      rows <= 1 || x.row_stride >= head_dim, field(".row_stride"), [&] { return ">= " + std::to_string(head_dim); },
      x.row_stride);
  check(heads <= 1 || x.head_stride >= 0, field(".head_stride"), ">= 0", x.head_stride);
  check(batch <= 1 || x.batch_stride >= 0, field(".batch_stride"), ">= 0", x.batch_stride);
  check_elements(rows, rows <= 1 ? head_dim : x.row_stride, argument);
  check_elements(heads, heads <= 1 ? 1 : x.head_stride, argument);
  check_elements(batch, batch <= 1 ? 1 : x.batch_stride, argument);
  check_pointer(x.data, some, field(".data"));
}

void check_inputs(const AttentionInputs& in, const Stream& stream) {
  check_dtype(in.dtype, "dtype");
  check(in.batch >= 0, "batch", ">= 0", in.batch);
  check(in.head_dim >= 1, "head_dim", ">= 1", in.head_dim);
  check(in.q.heads >= 1, "q.heads", ">= 1", in.q.heads);
  check(in.q.rows >= 0, "q.rows", ">= 0", in.q.rows);
  check(in.k.rows >= 0, "k.rows", ">= 0", in.k.rows);
  check(
      in.k.heads >= 1 && in.q.heads % in.k.heads == 0, "k.heads",
      [&] { return "a divisor of q.heads, " + std::to_string(in.q.heads); }, in.k.heads);
  check_heads(in.q, in.batch, in.head_dim, in.q.heads, in.q.rows, "q");
  check_heads(in.k, in.batch, in.head_dim, in.k.heads, in.k.rows, "k");
  check_heads(in.v, in.batch, in.head_dim, in.k.heads, in.k.rows, "v");
  check(std::isfinite(in.scale) && in.scale > 0.0f, "scale", "a finite value > 0", in.scale);
  if (in.key_ranges == nullptr || stream.device != Device::cpu) return;
  const std::int64_t sequences = in.key_ranges_stride == 0 ? std::min<std::int64_t>(1, in.batch) : in.batch;
  for (std::int64_t b = 0; b < sequences; ++b)
    for (std::int64_t i = 0; i < in.q.rows; ++i) {
      const std::int32_t* range = in.key_ranges + b * in.key_ranges_stride + 2 * i;
      check(
          range[0] >= 0 && range[1] <= in.k.rows, "key_ranges",
          [&] { return "ranges within 0 ... " + std::to_string(in.k.rows); },
          [&] {
            return std::to_string(range[0]) + " ... " + std::to_string(range[1]) + " for query " + std::to_string(i) +
                   " of sequence " + std::to_string(b);
          });
    }
}

}  // namespace

void attention(const AttentionArgs& args, const Stream& stream) {
  const AttentionInputs& in = args.in;
  check_inputs(in, stream);
  check_heads(args.out, in.batch, in.head_dim, in.q.heads, in.q.rows, "out");
  check_pointer(args.lse, in.batch > 0 && in.q.rows > 0, "lse");
  backend_for_host(stream, "attention", kInstead).attention(args, stream);
}

void attention_backward(const AttentionBackwardArgs& args, const Stream& stream) {
  const AttentionInputs& in = args.in;
  check_inputs(in, stream);
  check_heads(args.out, in.batch, in.head_dim, in.q.heads, in.q.rows, "out");
  check_pointer(args.lse, in.batch > 0 && in.q.rows > 0, "lse");
  check_heads(args.dout, in.batch, in.head_dim, in.q.heads, in.q.rows, "dout");
  check_heads(args.dq, in.batch, in.head_dim, in.q.heads, in.q.rows, "dq");
  check_heads(args.dk, in.batch, in.head_dim, in.k.heads, in.k.rows, "dk");
  check_heads(args.dv, in.batch, in.head_dim, in.k.heads, in.k.rows, "dv");
  backend_for_host(stream, "attention_backward", kInstead).attention_backward(args, stream);
}

void rotary(const RotaryArgs& args, const Stream& stream) {
  check_dtype(args.dtype, "dtype");
  check(args.batch >= 0, "batch", ">= 0", args.batch);
  check(args.head_dim >= 2 && args.head_dim % 2 == 0, "head_dim", "an even number >= 2", args.head_dim);
  check(args.x.heads >= 0, "x.heads", ">= 0", args.x.heads);
  check(args.x.rows >= 0, "x.rows", ">= 0", args.x.rows);
  check_heads(args.x, args.batch, args.head_dim, args.x.heads, args.x.rows, "x");
  const bool some = args.batch > 0 && args.x.rows > 0;
  check_pointer(args.cos, some, "cos");
  check_pointer(args.sin, some, "sin");
  check_heads(args.y, args.batch, args.head_dim, args.x.heads, args.x.rows, "y");
  backend_for_host(stream, "rotary", kInstead).rotary(args, stream);
}

}  // namespace qlora_native
