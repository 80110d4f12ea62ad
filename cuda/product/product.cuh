// A product with a quantized weight, as every kernel (config.h) takes it.
//
//   out[rows, cols] = x[rows, inner] . W'[inner, cols]  +  u[rows, rank] . lora'[rank, cols]  +  bias
//
//             x    u    W'     lora'                the columns of out are
//   forward   X    U    W^T    (s*B)^T              rows of W and of B
//   backward  dY   V    W      A, after dropout     columns of W and of A
//
// Where rows are in groups, each row is multiplied with the W', lora' and bias of its group, or with the lora' of its
// group and the W' and bias that all groups share.
#pragma once

#include "device/weight_chunk.cuh"
#include "product/config.h"
#include "product/dropout.cuh"
#include "product/groups.cuh"
#include "runtime/launch.h"
#include "runtime/workspace.h"

namespace qlora_native::QLN_CUDA {

struct Product {
  QuantizedWeightView weight;
  bool backward;
  std::int64_t rows, cols, inner;
  ConstMatrix x;     // [rows, inner]
  ConstMatrix u;     // [rows, rank]
  const void* lora;  // B [cols, rank] or A [rank, cols]
  DType lora_dtype;
  float scaling;     // s, or 1
  Dropout dropout;   // backward: its mask falls on u . lora'
  const void* bias;  // forward: [cols] in x's dtype, or null
  Matrix out;
  Groups groups;        // of the rows; none where all rows share W' and lora'
  bool group_weights;   // each group has its own weight, so a tile of out has rows of one group
  bool group_adapters;  // each group has its own adapter

  // Whether the kernel of the product is launched right after the one that makes u, and so may overlap it.
  bool follows_low_rank() const { return u.cols > 0; }

  // The number of a group's weight, and of its adapter.
  __device__ int weight_index(int group) const { return group_weights ? group : 0; }
  __device__ int adapter_index(int group) const { return group_adapters && group > 0 ? group : 0; }
  __device__ std::int64_t weight_elements() const { return weight.N * weight.K; }
  __device__ std::int64_t lora_elements() const { return u.cols * cols; }
};

// Where the groups share weight and adapter, the product needs no groups: U and V are 0 in rows without the adapter.
template <class Args>
Groups groups_of_product(const Args& args) {
  if (args.weight.count == 1 && (args.lora.count == 1 || args.lora.rank == 0)) return {};
  return {.count = static_cast<int>(args.groups.count),
          .offsets = args.groups.offsets,
          .has_leading_group = args.weight.count == 1};
}

inline Product product_of(const LinearForwardArgs& args, const ConstMatrix& u) {
  return {.weight = args.weight,
          .backward = false,
          .rows = args.x.rows,
          .cols = args.weight.N,
          .inner = args.weight.K,
          .x = args.x,
          .u = u,
          .lora = args.lora.b,
          .lora_dtype = args.lora.dtype,
          .scaling = args.lora.scaling,
          .dropout = Dropout(args.lora),
          .bias = args.bias,
          .out = args.y,
          .groups = groups_of_product(args),
          .group_weights = args.weight.count > 1,
          .group_adapters = args.lora.count > 1};
}
inline Product product_of(const LinearBackwardInputArgs& args, const ConstMatrix& v) {
  return {.weight = args.weight,
          .backward = true,
          .rows = args.dy.rows,
          .cols = args.weight.K,
          .inner = args.weight.N,
          .x = args.dy,
          .u = v,
          .lora = args.lora.a,
          .lora_dtype = args.lora.dtype,
          .scaling = 1.0f,
          .dropout = Dropout(args.lora),
          .bias = nullptr,
          .out = args.dx,
          .groups = groups_of_product(args),
          .group_weights = args.weight.count > 1,
          .group_adapters = args.lora.count > 1};
}

// Whether the first `cols` elements of each row are whole 16-byte vectors, and 32 bits can count the vectors of a tile.
inline bool rows_are_vectors(const ConstMatrix& matrix, std::int64_t cols) {
  const std::int64_t vector = kVectorBytes / static_cast<std::int64_t>(size_of(matrix.dtype));
  return is_aligned(matrix.data, kVectorBytes) && cols % vector == 0 &&
         (matrix.rows <= 1 || (matrix.stride % vector == 0 && matrix.stride / vector * 256 <= 0xFFFFFFFF));
}

// Whether TMA can load tiles of the matrix too (wgmma/).
inline bool tma_can_load(const ConstMatrix& matrix, std::int64_t cols) {
  return rows_are_vectors(matrix, cols) && (matrix.rows <= 1 || matrix.stride >= cols);
}

// The index in lora of the element that lora' has in row r and column col.
template <bool kForward>
__device__ __forceinline__ std::int64_t lora_index(const Product& product, std::int64_t r, std::int64_t col) {
  return kForward ? col * product.u.cols + r : r * product.cols + col;
}
// An element of lora', in fp32; 0 beyond the rank and beyond the columns.
template <bool kForward>
__device__ __forceinline__ float lora_at(const Product& product, std::int64_t r, std::int64_t col, int adapter = 0) {
  if (r >= product.u.cols || col >= product.cols) return 0.0f;
  return product.scaling * load_as_f32(product.lora, product.lora_dtype,
                                       adapter * product.lora_elements() + lora_index<kForward>(product, r, col));
}

// Goes through the adapters that a tile has rows of; a tile has kRows rows at most. It has rows of several adapters
// where groups share the weight. U and V are 0 in rows without an adapter.
template <int kRows>
class TileAdapters {
 public:
  __device__ TileAdapters(const Product& product, const RowTile& tile) : product_(product), tile_(tile) {
    const bool many_adapters = product.group_adapters && !product.group_weights;
    const int first =
        many_adapters ? product.groups.group_of(tile.begin, product.rows) : product.adapter_index(tile.group);
    end_ = product.u.cols == 0 ? 0 : many_adapters ? product.groups.count : first + 1;
    adapter_ = first - 1;
  }
  // Goes on to the next adapter; false where there is none.
  __device__ bool next() {
    while (++adapter_ < end_) {
      rows_ = rows_of(product_, tile_, adapter_);
      if (rows_.begin >= tile_.begin + kRows) break;
      if (!rows_.is_empty()) return true;
    }
    return false;
  }
  __device__ int adapter() const { return adapter_; }
  // The rows that this adapter is for. Some of them may lie in other tiles.
  __device__ const RowSpan& rows() const { return rows_; }
  __device__ static RowSpan rows_of(const Product& product, const RowTile& tile, int adapter) {
    const bool many_adapters = product.group_adapters && !product.group_weights;
    return many_adapters ? product.groups.rows_of(adapter, product.rows) : RowSpan{tile.begin, tile.end};
  }

 private:
  const Product& product_;
  const RowTile& tile_;
  int adapter_, end_;
  RowSpan rows_{};
};

// One function for each kernel: general.cu, gemv.cu and panels.cu; gemm/small_m.cu, forward.cu and backward.cu for
// GemmConfig; wgmma/forward.cu and backward.cu for WgmmaConfig. Those that share tiles take the memory for it.
struct StreamKMemory;  // stream_k.cuh
void multiply(const Product& product, const GeneralConfig& config, const Stream& stream);
void multiply(const Product& product, const GemvConfig& config, const Stream& stream);
void multiply(const Product& product, const PanelsConfig& config, const Stream& stream);
void multiply_forward(const Product& product, const WgmmaConfig& config, const StreamKMemory& memory,
                      const Stream& stream);
void multiply_backward(const Product& product, const WgmmaConfig& config, const StreamKMemory& memory,
                       const Stream& stream);
bool has_wgmma(const Stream& stream);
void multiply_small_m(const Product& product, const GemmConfig& config, const StreamKMemory& memory,
                      const Stream& stream);
void multiply_forward(const Product& product, const GemmConfig& config, const StreamKMemory& memory,
                      const Stream& stream);
void multiply_backward(const Product& product, const GemmConfig& config, const StreamKMemory& memory,
                       const Stream& stream);

}  // namespace qlora_native::QLN_CUDA
