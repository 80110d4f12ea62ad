// The adapter's own products, each [M, rank], and its gradients, which are sums over M:
//
//   U = drop(X) . A^T / (1-p)      dA = V^T . drop(X)
//   V = s/(1-p) * dY . B           dB = s * dY^T . U
//
// All are long sums for few results, so several blocks share the sum of a tile, and the last of them to arrive adds
// their parts, in the order of the parts. The kernel may begin while another one clears the tickets of these blocks,
// and the kernel of the product may begin while that of U or V runs (linear.cu).
#pragma once

#include "product/config.h"
#include "product/general.cuh"
#include "product/groups.cuh"
#include "product/sources.cuh"
#include "runtime/launch.h"
#include "runtime/workspace.h"

namespace qlora_native::QLN_CUDA {

// Where rows of X are in groups, each row of U and V uses the adapter of its group, or is 0 if it has none. dA and dB
// are sums over the rows of a group, and `out` has those of one adapter after those of another.
struct LowRankProduct {
  Matrix out;
  std::int64_t rows, inner;  // rows of out for one adapter, and length of the sum
  float scale;
  Groups groups;
  std::int64_t lora_elements;  // for U and V: how many elements an adapter's A or B has
  std::int64_t row_tiles;      // of out
  LowRankSplit split;

  std::int64_t tiles() const { return row_tiles * product_col_tiles(out.cols); }
  // How many tickets its blocks need.
  std::int64_t counters() const { return split.parts == 1 ? 0 : tiles(); }
};
// What the blocks share that have a part of a tile each; null if no tile has several.
struct LowRankMemory {
  float* partial_sums;     // one `out` for each part
  std::uint32_t* arrived;  // by tile: how many parts are stored
};

// What a block computes: a tile of out, and a part of its sum.
struct LowRankPart {
  std::int64_t i0, rows;   // in the adapter's rows of out: where the tile begins, and where they end
  std::int64_t adapter;    // -1: none
  std::int64_t first_row;  // of the adapter, in out
  std::int64_t j0, part;
  RowSpan inner;
};

template <bool kGrouped, bool kSumsOverRows>
__device__ LowRankPart low_rank_part(const LowRankProduct& p) {
  const std::int64_t col_tiles = product_col_tiles(p.out.cols), tile = block_index() / p.split.parts;
  const std::int64_t row_tile = tile / col_tiles;
  LowRankPart part = {.i0 = row_tile * kProductTile,
                      .rows = p.rows,
                      .adapter = 0,
                      .first_row = 0,
                      .j0 = tile % col_tiles * kProductTile,
                      .part = block_index() % p.split.parts};
  std::int64_t length = p.split.length;
  RowSpan all = {0, p.inner};
  if constexpr (kGrouped && kSumsOverRows) {
    const std::int64_t adapter_tiles = ceil_div(p.rows, kProductTile);
    part.i0 = row_tile % adapter_tiles * kProductTile;
    part.adapter = row_tile / adapter_tiles;
    part.first_row = part.adapter * p.rows;
    all = p.groups.rows_of(part.adapter, p.inner);
    length = low_rank_length(all.is_empty() ? 0 : all.end - all.begin, p.split.parts);
  } else if constexpr (kGrouped) {
    const RowTile rows = find_row_tile<kProductTile>(p.groups, p.rows, static_cast<std::uint32_t>(row_tile)).tile;
    part.i0 = rows.begin;
    part.rows = rows.end;
    part.adapter = rows.group;
    if (rows.group < 0) all.end = 0;
  }
  const std::int64_t begin = all.begin + part.part * length;
  part.inner = {begin, all.end - begin < length ? all.end : begin + length};
  return part;
}

// Adds the parts of each sum of a tile, in their order.
__device__ inline void add_parts(const LowRankProduct& p, const float* partial_sums, const LowRankPart& tile) {
  const auto in_tile = [](std::int64_t rest) { return rest < kProductTile ? static_cast<int>(rest) : kProductTile; };
  const int cols = in_tile(p.out.cols - tile.j0), count = in_tile(tile.rows - tile.i0) * cols;
#pragma unroll 1
  for (int e = thread_index(); e < count; e += kProductThreads) {
    const std::int64_t row = tile.first_row + tile.i0 + e / cols, col = tile.j0 + e % cols;
    const float* from = partial_sums + row * p.out.cols + col;
    float sum = 0.0f;
    for (int part = 0; part < p.split.parts; ++part, from += p.out.rows * p.out.cols) {
      sum += load_vector<float, 1>(from).at[0];
    }
    store_from_f32(p.out.data, p.out.dtype, row * p.out.stride + col, sum * p.scale);
  }
}

// out(i, j) = scale * sum over k of left(i, k) * right(j, k), rounded.
template <class Left, class Right, bool kGrouped>
__global__ void __launch_bounds__(kProductThreads, 2)
    low_rank_kernel(const Left left, const Right right, const __grid_constant__ LowRankProduct p,
                    const LowRankMemory memory) {
  griddepcontrol_launch_dependents();
  constexpr bool kSumsOverRows = !Left::kAlongInner;
  const auto part_of_block = [&] { return low_rank_part<kGrouped, kSumsOverRows>(p); };
  const auto position_of = [&](const LowRankPart& part) {
    return ProductPosition<typename Left::Element>(part.i0, part.rows, part.j0, p.out.cols);
  };
  const LowRankPart part = part_of_block();
  if (kGrouped && part.i0 >= part.rows) return griddepcontrol_wait();
  const ProductPosition<typename Left::Element> position = position_of(part);
  ProductAccumulators sum = {};
  if constexpr (kGrouped && !kSumsOverRows) {
    accumulate(sum, position, with_seed(left), advanced(right, part.adapter * p.lora_elements), part.inner.end,
               part.inner.begin);
  } else {
    accumulate(sum, position, with_seed(left), with_seed(right), part.inner.end, part.inner.begin);
  }
  // The part is not saved over the sum but searched for once more, because registers would be short otherwise. In fp32
  // without groups, it is the search for a part of U or V that would make them short, so there the part is saved.
  constexpr bool kIsSaved = !kGrouped && !kSumsOverRows && !kOnTensorCores<typename Left::Element>;
  const LowRankPart stored = kIsSaved ? part : part_of_block();
  position_of(stored).each(sum, [&](std::int64_t i, std::int64_t j, float s) {
    const std::int64_t row = stored.first_row + i;
    if (p.split.parts == 1) {
      store_from_f32(p.out.data, p.out.dtype, row * p.out.stride + j, s * p.scale);
    } else {
      store_vector<float, 1>(memory.partial_sums + (stored.part * p.out.rows + row) * p.out.cols + j, {{s}});
    }
  });
  griddepcontrol_wait();  // for the kernel that clears the tickets
  if (p.split.parts > 1 && is_last_to_arrive(memory.arrived + block_index() / p.split.parts, p.split.parts)) {
    add_parts(p, memory.partial_sums, stored);
  }
}

// `inner`: the average length of a sum.
inline LowRankProduct with_split(LowRankProduct product, std::int64_t inner, const Stream& stream) {
  product.split = low_rank_split(product.tiles(), inner, num_sms(stream));
  return product;
}
// U or V, as sums over the `inner` columns of X or dY. An adapter's A or B has `lora_elements` elements.
inline LowRankProduct low_rank_product(const Matrix& out, std::int64_t inner, float scale, std::int64_t lora_elements,
                                       const Groups& groups, const Stream& stream) {
  return with_split({.out = out,
                     .rows = out.rows,
                     .inner = inner,
                     .scale = scale,
                     .groups = groups,
                     .lora_elements = lora_elements,
                     .row_tiles = max_row_tiles(out.rows, groups.total(), kProductTile)},
                    inner, stream);
}
// dA or dB of `count` adapters, [count, rows, columns of out], as sums over the `inner` rows of X.
inline LowRankProduct low_rank_gradient(const Matrix& out, std::int64_t count, std::int64_t inner, float scale,
                                        const Groups& groups, const Stream& stream) {
  const std::int64_t rows = out.rows / count;
  return with_split({.out = out,
                     .rows = rows,
                     .inner = inner,
                     .scale = scale,
                     .groups = groups,
                     .row_tiles = count * ceil_div(rows, kProductTile)},
                    ceil_div(inner, count), stream);
}

// Allocates the memory that blocks share, in a stream. `counters` has room for product.counters().
class LowRankWorkspace {
 public:
  LowRankWorkspace(const LowRankProduct& product, Counters& counters, const Stream& stream)
      : partial_sums_(
            product.counters() == 0
                ? 0
                : static_cast<std::size_t>(product.split.parts * product.out.rows * product.out.cols) * sizeof(float),
            stream),
        memory_{reinterpret_cast<float*>(partial_sums_.data()), counters.take(product.counters())} {}
  const LowRankMemory& memory() const { return memory_; }

 private:
  const Workspace partial_sums_;
  const LowRankMemory memory_;
};

template <class Left, class Right>
void launch_low_rank(const Left& left, const Right& right, const LowRankProduct& product, const LowRankMemory& memory,
                     bool programmatic_launch, bool next_programmatic_launch, const Stream& stream) {
  LaunchShape shape = product_grid(product.row_tiles, product.out.cols);
  shape.blocks *= product.split.parts;
  shape.programmatic_launch = programmatic_launch;
  shape.next_programmatic_launch = next_programmatic_launch;
  if (product.groups.count > 0) {
    launch<low_rank_kernel<Left, Right, true>>(shape, stream, left, right, product, memory);
  } else {
    launch<low_rank_kernel<Left, Right, false>>(shape, stream, left, right, product, memory);
  }
}

// One of these products alone.
template <class Left, class Right>
void multiply(const Left& left, const Right& right, const LowRankProduct& product, const Stream& stream) {
  Counters counters(product.counters(), stream);
  const LowRankWorkspace workspace(product, counters, stream);
  const bool follows_clear = counters.clear(/*next_waits=*/true);
  launch_low_rank(left, right, product, workspace.memory(), follows_clear, false, stream);
}

// The U or V of a call: the caller's matrix if the caller saves it, or one in a workspace.
class LowRankMatrix {
 public:
  LowRankMatrix(const Matrix& requested, DType dtype, std::int64_t rows, std::int64_t rank, const Stream& stream)
      : workspace_(requested.data != nullptr ? 0 : static_cast<std::size_t>(rows * rank) * size_of(dtype), stream),
        matrix_(requested.data != nullptr ? requested : Matrix{workspace_.data(), dtype, rows, rank, rank}) {}
  const Matrix& matrix() const { return matrix_; }
  ConstMatrix read_only() const { return {matrix_.data, matrix_.dtype, matrix_.rows, matrix_.cols, matrix_.stride}; }

 private:
  const Workspace workspace_;
  const Matrix matrix_;
};

}  // namespace qlora_native::QLN_CUDA
