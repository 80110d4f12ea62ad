// linear_forward and linear_backward_input: first the adapter's U or V, then the product, by the kernel that
// choose_product() chooses.
#include <optional>

#include "hooks.h"
#include "paged/weights.h"
#include "product/low_rank.cuh"
#include "product/product.cuh"
#include "product/stream_k.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

ProductShape shape_of(const Product& p, const Stream& stream) {
  const QuantizedWeightView& w = p.weight;
  const bool vectors = rows_are_vectors(p.x, p.inner);
  // Whether 64 codes that begin at a multiple of 64 lie in one row, and share a scale.
  const bool by_64 = w.K % kGemmStep == 0 && w.blocksize >= kGemmStep;
  return {
      .rows = p.rows,
      .cols = p.cols,
      .inner = p.inner,
      .dtype = p.x.dtype,
      .bits = w.bits,
      .backward = p.backward,
      .aligned = is_aligned(w) && vectors,
      .aligned_64 = is_aligned(w) && by_64 && vectors,
      .small_blocks = w.blocksize < kChunk,
      .plain_scales = has_plain_scales(w),
      .rank = p.u.cols,
      .groups = p.groups.count,
      .group_weights = p.group_weights,
      .masked = p.backward && p.u.cols > 0 && p.dropout.threshold > 0,
      .compute_capability = compute_capability(stream),
      .has_dense_gemm = hooks().dense_gemm != nullptr,
      .has_wgmma = has_wgmma(stream),
      .tma_can_load = tma_can_load(p.x, p.inner) && tma_can_load(p.u, p.u.cols),
      .disabled = disabled_cuda_kernels(stream.index),
      .num_sms = num_sms(stream),
      .smem_bytes = max_smem_bytes(stream),
      .reserved_smem_bytes = reserved_smem_bytes(stream),
  };
}

void multiply(const Product& product, const GemmConfig& config, const StreamKMemory& memory, const Stream& stream) {
  if (config.small_m) return multiply_small_m(product, config, memory, stream);
  product.backward ? multiply_backward(product, config, memory, stream)
                   : multiply_forward(product, config, memory, stream);
}
void multiply(const Product& product, const WgmmaConfig& config, const StreamKMemory& memory, const Stream& stream) {
  product.backward ? multiply_backward(product, config, memory, stream)
                   : multiply_forward(product, config, memory, stream);
}
template <class Config>
void multiply(const Product& product, const Config& config, const StreamKMemory&, const Stream& stream) {
  multiply(product, config, stream);
}

// How the blocks share tiles; those of the other kernels share none.
GemmConfig stream_k_of(const GemmConfig& config) { return config; }
GemmConfig stream_k_of(const WgmmaConfig& config) { return config.gemm; }
GemmConfig stream_k_of(const auto&) { return {}; }

// Whether the kernel of the product waits for the one that makes U or V only where it reads them.
bool overlaps_low_rank(const ProductConfig& config) {
  return !std::holds_alternative<GeneralConfig>(config) && !std::holds_alternative<PanelsConfig>(config);
}

ProductConfig config_of(const Product& product, const Stream& stream) {
  const ProductShape shape = shape_of(product, stream);
  const ProductConfig config = choose_product(shape, forced_kernel());
  log_product(shape, config);
  return config;
}

// Multiplies, without an adapter.
void multiply(const Product& product, const Stream& stream) {
  std::visit(
      [&](const auto& kernel_config) {
        const GemmConfig shared = stream_k_of(kernel_config);
        Counters counters(shared.counters(), stream);
        const StreamKWorkspace workspace(shared, counters, stream);
        counters.clear();
        multiply(product, kernel_config, workspace.memory(), stream);
      },
      config_of(product, stream));
}
// Makes U or V, and multiplies. Each kernel may begin while the one before it runs, so nothing else is put into the
// stream between them: the memory of all is allocated before the first launch, and released after the last.
template <class Left, class Right>
void multiply(const Left& left, const Right& right, const LowRankProduct& low_rank, const Product& product,
              const Stream& stream) {
  const ProductConfig config = config_of(product, stream);
  std::visit(
      [&](const auto& kernel_config) {
        const GemmConfig shared = stream_k_of(kernel_config);
        Counters counters(low_rank.counters() + shared.counters(), stream);
        const LowRankWorkspace low_rank_workspace(low_rank, counters, stream);
        const StreamKWorkspace workspace(shared, counters, stream);
        // A product that takes tickets does so as it begins, which may be before the kernel before U or V has ended.
        const bool follows_clear = counters.clear(/*next_waits=*/shared.counters() == 0);
        launch_low_rank(left, right, low_rank, low_rank_workspace.memory(), follows_clear, overlaps_low_rank(config),
                        stream);
        multiply(product, kernel_config, workspace.memory(), stream);
      },
      config);
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
  const Product product = product_of(args, u.read_only());
  if (lora.rank == 0) return multiply(product, stream);
  const std::int64_t K = args.weight.K;
  const Dropout dropout(lora);
  const DropoutRows<T> x{{{static_cast<const T*>(args.x.data), args.x.stride}}, dropout};
  const LoraRows<T> a{{lora.a, lora.dtype, K, 1.0f}};
  multiply(x, a, low_rank_product(u.matrix(), K, dropout.scale, lora.rank * K, groups_of_low_rank(args), stream),
           product, stream);
}

template <class T>
void backward(const LinearBackwardInputArgs& args, const Stream& stream) {
  const LoraView& lora = args.lora;
  const LowRankMatrix v(args.v, args.dy.dtype, args.dy.rows, lora.rank, stream);
  const Product product = product_of(args, v.read_only());
  if (lora.rank == 0) {
    if (args.dx.data != nullptr) multiply(product, stream);
    return;
  }
  const std::int64_t N = args.weight.N;
  const Rows<T> dy{{static_cast<const T*>(args.dy.data), args.dy.stride}};
  const LoraColumns<T> b{{lora.b, lora.dtype, lora.rank, 1.0f}};
  const LowRankProduct low_rank = low_rank_product(v.matrix(), N, lora.scaling * Dropout(lora).scale, N * lora.rank,
                                                   groups_of_low_rank(args), stream);
  if (args.dx.data != nullptr) return multiply(dy, b, low_rank, product, stream);
  multiply(dy, b, low_rank, stream);
}

}  // namespace

void linear_forward(const LinearForwardArgs& args, const Stream& stream) {
  LinearForwardArgs resident = args;
  const WeightUse use(resident.weight, stream);
  with_type(args.x.dtype, [&]<class T>() { forward<T>(resident, stream); });
}

void linear_backward_input(const LinearBackwardInputArgs& args, const Stream& stream) {
  LinearBackwardInputArgs resident = args;
  std::optional<WeightUse> use;
  if (args.dx.data != nullptr) use.emplace(resident.weight, stream);  // V alone is made without the weight
  with_type(args.dy.dtype, [&]<class T>() { backward<T>(resident, stream); });
}

}  // namespace qlora_native::QLN_CUDA
