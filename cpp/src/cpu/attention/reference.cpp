// The scalar backend's attention, as attention.h defines it, in fp64.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/isa/scalar/reference.h"
#include "cpu/runtime/parallel.h"

namespace qlora_native::reference {
namespace {

// The element of a head at [row, column].
template <class Pointer>
std::int64_t index(const BasicHeads<Pointer>& x, std::int64_t b, std::int64_t h, std::int64_t row, std::int64_t col) {
  return b * x.batch_stride + h * x.head_stride + row * x.row_stride + col;
}

// What one query sees: keys begin ... end-1.
struct Query {
  const AttentionInputs& in;
  std::int64_t b, h, row;
  std::int64_t begin = 0, end = in.k.rows;

  Query(const AttentionInputs& inputs, std::int64_t sequence, std::int64_t head, std::int64_t query)
      : in(inputs), b(sequence), h(head), row(query) {
    if (in.key_ranges == nullptr) return;
    const std::int32_t* range = in.key_ranges + b * in.key_ranges_stride + 2 * row;
    begin = range[0];
    end = range[1];
  }
  std::int64_t key_head() const { return h / (in.q.heads / in.k.heads); }
  // The inner product of a row of `x`, which has heads as q, and a row of `y`, which has heads as k.
  double dot(const ConstHeads& x, const ConstHeads& y, std::int64_t key) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < in.head_dim; ++d)
      sum += double{load(x.data, in.dtype, index(x, b, h, row, d))} *
             double{load(y.data, in.dtype, index(y, b, key_head(), key, d))};
    return sum;
  }
  double score(std::int64_t key) const { return double{in.scale} * dot(in.q, in.k, key); }
};

// Adds factor * (a row) to `sums`.
void add_row(std::vector<double>& sums, double factor, const AttentionInputs& in, const ConstHeads& x, std::int64_t b,
             std::int64_t h, std::int64_t row) {
  for (std::int64_t d = 0; d < in.head_dim; ++d)
    sums[static_cast<std::size_t>(d)] += factor * double{load(x.data, in.dtype, index(x, b, h, row, d))};
}
void write_row(const std::vector<double>& sums, double factor, const AttentionInputs& in, const Heads& x,
               std::int64_t b, std::int64_t h, std::int64_t row) {
  for (std::int64_t d = 0; d < in.head_dim; ++d)
    store(x.data, in.dtype, index(x, b, h, row, d), static_cast<float>(factor * sums[static_cast<std::size_t>(d)]));
}

}  // namespace

void attention(const AttentionArgs& args, const Stream&) {
  const AttentionInputs& in = args.in;
  const std::int64_t heads = in.q.heads, queries = in.q.rows;
  parallel_for(in.batch * heads * queries, [&](std::int64_t task) {
    const Query query(in, task / queries / heads, task / queries % heads, task % queries);
    double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
    std::vector<double> out(static_cast<std::size_t>(in.head_dim), 0.0);
    for (std::int64_t key = query.begin; key < query.end; ++key) largest = std::max(largest, query.score(key));
    for (std::int64_t key = query.begin; key < query.end; ++key) {
      const double e = std::exp(query.score(key) - largest);
      sum += e;
      add_row(out, e, in, in.v, query.b, query.key_head(), key);
    }
    const bool sees = query.begin < query.end;
    write_row(out, sees ? 1.0 / sum : 0.0, in, args.out, query.b, query.h, query.row);
    args.lse[task] = static_cast<float>(sees ? largest + std::log(sum) : largest);
  });
}

void attention_backward(const AttentionBackwardArgs& args, const Stream&) {
  const AttentionInputs& in = args.in;
  const std::int64_t heads = in.q.heads, key_heads = in.k.heads, queries = in.q.rows, keys = in.k.rows;
  const auto row_of_zeros = [&] { return std::vector<double>(static_cast<std::size_t>(in.head_dim), 0.0); };
  const auto probability = [&](const Query& query, std::int64_t key) {
    return std::exp(query.score(key) - double{args.lse[(query.b * heads + query.h) * queries + query.row]});
  };
  // The gradient of a score, before it was multiplied by the scale.
  const auto gradient = [&](const Query& query, std::int64_t key, double p) {
    double delta = 0.0;
    for (std::int64_t d = 0; d < in.head_dim; ++d)
      delta += double{load(args.out.data, in.dtype, index(args.out, query.b, query.h, query.row, d))} *
               double{load(args.dout.data, in.dtype, index(args.dout, query.b, query.h, query.row, d))};
    return p * (query.dot(args.dout, in.v, key) - delta);
  };
  parallel_for(in.batch * heads * queries, [&](std::int64_t task) {
    const Query query(in, task / queries / heads, task / queries % heads, task % queries);
    std::vector<double> dq = row_of_zeros();
    for (std::int64_t key = query.begin; key < query.end; ++key)
      add_row(dq, gradient(query, key, probability(query, key)), in, in.k, query.b, query.key_head(), key);
    write_row(dq, double{in.scale}, in, args.dq, query.b, query.h, query.row);
  });
  parallel_for(in.batch * key_heads * keys, [&](std::int64_t task) {
    const std::int64_t b = task / keys / key_heads, key_head = task / keys % key_heads, key = task % keys;
    std::vector<double> dk = row_of_zeros(), dv = row_of_zeros();
    const std::int64_t group = heads / key_heads;
    for (std::int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
      for (std::int64_t row = 0; row < queries; ++row) {
        const Query query(in, b, h, row);
        if (key < query.begin || key >= query.end) continue;
        const double p = probability(query, key);
        add_row(dv, p, in, args.dout, b, h, row);
        add_row(dk, gradient(query, key, p), in, in.q, b, h, row);
      }
    write_row(dk, double{in.scale}, in, args.dk, b, key_head, key);
    write_row(dv, 1.0, in, args.dv, b, key_head, key);
  });
}

void rotary(const RotaryArgs& args, const Stream&) {
  const std::int64_t D = args.head_dim, half = D / 2;
  parallel_for(args.batch * args.x.rows, [&](std::int64_t token) {
    const std::int64_t b = token / args.x.rows, row = token % args.x.rows;
    const std::int64_t angles = (args.shared ? row : token) * D;
    const auto cos = [&](std::int64_t d) { return double{load(args.cos, args.dtype, angles + d)}; };
    const auto sin = [&](std::int64_t d) { return double{load(args.sin, args.dtype, angles + d)}; };
    for (std::int64_t h = 0; h < args.x.heads; ++h)
      for (std::int64_t d = 0; d < half; ++d) {
        const double x1 = double{load(args.x.data, args.dtype, index(args.x, b, h, row, d))};
        const double x2 = double{load(args.x.data, args.dtype, index(args.x, b, h, row, half + d))};
        const double sin1 = args.transposed ? -sin(half + d) : sin(d), sin2 = args.transposed ? -sin(d) : sin(half + d);
        store(args.y.data, args.dtype, index(args.y, b, h, row, d), static_cast<float>(x1 * cos(d) - x2 * sin1));
        store(args.y.data, args.dtype, index(args.y, b, h, row, half + d),
              static_cast<float>(x2 * cos(half + d) + x1 * sin2));
      }
  });
}

}  // namespace qlora_native::reference
