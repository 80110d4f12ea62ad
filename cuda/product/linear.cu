// linear_forward and linear_backward_input: first the adapter's U or V, then the product, in the way that
// product_config chooses.
#include "hooks.h"
#include "operations.h"
#include "product/low_rank.cuh"
#include "product/product.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

ProductShape shape_of(const Product& p, const Stream& stream) {
  const QuantizedWeightView& w = p.weight;
  const bool vectors = rows_are_vectors(p.left, p.inner);
  // Whether 64 codes that begin at a multiple of 64 lie in one row, and share a scale.
  const bool by_64 = w.K % kGemmStep == 0 && w.blocksize >= kGemmStep;
  return {
      .rows = p.rows,
      .cols = p.cols,
      .inner = p.inner,
      .dtype = p.left.dtype,
      .bits = w.bits,
      .backward = p.backward,
      .aligned = is_aligned(w) && vectors,
      .aligned_64 = is_aligned(w) && by_64 && vectors,
      .small_blocks = w.blocksize < kChunk,
      .rank = p.low_rank.cols,
      .groups = p.groups.count,
      .own_weights = p.own_weights,
      .masked = p.backward && p.low_rank.cols > 0 && p.dropout.threshold > 0,
      .dense_gemm = hooks().dense_gemm != nullptr,
      .hopper = hopper_use(stream),
      .tma_can_load = tma_can_load(p.left, p.inner) && tma_can_load(p.low_rank, p.low_rank.cols),
      .multiprocessors = multiprocessors(stream),
      .smem_bytes = max_smem_bytes(stream),
      .reserved_smem_bytes = reserved_smem_bytes(stream),
  };
}

void multiply(const Product& product, const GemmConfig& config, const Stream& stream) {
  if (config.thin) return multiply_thin(product, config, stream);
  product.backward ? multiply_backward(product, config, stream) : multiply_forward(product, config, stream);
}
void multiply(const Product& product, const HopperConfig& config, const Stream& stream) {
  product.backward ? multiply_backward(product, config, stream) : multiply_forward(product, config, stream);
}

void multiply(const Product& product, const Stream& stream) {
  const ProductShape shape = shape_of(product, stream);
  const ProductConfig config = product_config(shape);
  print_if_asked(shape, config);
  std::visit([&](const auto& way) { multiply(product, way, stream); }, config);
}

// The groups of the rows of U or V. Where groups share the weight, the rows before the first group have no adapter.
template <class Args>
Groups groups_of_low_rank(const Args& args) {
  if (args.weight.count > 1 && args.lora.count == 1) return {};
  Groups groups = groups_of_adapters(args.lora, args.groups);
  groups.has_leading_group = args.weight.count == 1;
  return groups;
}

template <class T>
void forward(const LinearForwardArgs& args, const Stream& stream) {
  const LoraView& lora = args.lora;
  const LowRankMatrix u(args.u, args.x.dtype, args.x.rows, lora.rank, stream);
  if (lora.rank > 0) {
    const Dropout dropout(lora);
    const DropoutRows<T> x{{{static_cast<const T*>(args.x.data), args.x.stride}}, dropout};
    const LoraRows<T> a{{lora.a, lora.dtype, args.weight.K, 1.0f}};
    low_rank_product(x, a, lora.rank * args.weight.K, args.weight.K, dropout.scale, u.matrix(),
                     groups_of_low_rank(args), stream);
  }
  multiply(product_of(args, u.read_only()), stream);
}

template <class T>
void backward(const LinearBackwardInputArgs& args, const Stream& stream) {
  const LoraView& lora = args.lora;
  const LowRankMatrix v(args.v, args.dy.dtype, args.dy.rows, lora.rank, stream);
  if (lora.rank > 0) {
    const Rows<T> dy{{static_cast<const T*>(args.dy.data), args.dy.stride}};
    const LoraColumns<T> b{{lora.b, lora.dtype, lora.rank, 1.0f}};
    low_rank_product(dy, b, args.weight.N * lora.rank, args.weight.N, lora.scaling * Dropout(lora).scale, v.matrix(),
                     groups_of_low_rank(args), stream);
  }
  if (args.dx.data != nullptr) multiply(product_of(args, v.read_only()), stream);
}

}  // namespace

void linear_forward(const LinearForwardArgs& args, const Stream& stream) {
  with_type(args.x.dtype, [&]<class T>() { forward<T>(args, stream); });
}

void linear_backward_input(const LinearBackwardInputArgs& args, const Stream& stream) {
  with_type(args.dy.dtype, [&]<class T>() { backward<T>(args, stream); });
}

}  // namespace qlora_native::QLN_CUDA
