// The product of many rows: the weight is decoded a panel at a time, and the application's dense product (runtime.h)
// multiplies X or dY by each panel (README.md, "Panels").
//
//             x         a panel                              out
//   forward   [X | U]   [rows of W | rows of s*B]^T          columns of Y
//   backward  [dY | V]  columns of W, above columns of A     columns of dX
//
// The adapter's part is in the same product, so that out is rounded and written once. For this X or dY is copied beside
// U or V; without an adapter it is multiplied where it lies.
#include <algorithm>

#include "device/decode.cuh"
#include "hooks.h"
#include "product/product.cuh"
#include "runtime/side_stream.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
static_assert(kPanelAlignment == kVecSize);
// The elements of a panel, and of the copy of X, are counted in 32 bits. They have 2 bytes at least, and a
// column of out takes at most kMaxPanelBytes / kPanelCols bytes of a panel.
static_assert(kMaxConcatenatedRows * kMaxPanelBytes / kPanelCols / 2 < (std::int64_t{1} << 31));

// A matrix [all_rows, stride] that is to be written: the first `vec8s` vec8s in each of the first `rows` rows as
// vectors, and everything else element by element.
struct Extent {
  std::uint32_t rows, vec8s, all_rows, stride;
};
template <class WriteVec8, class WriteOne>
__device__ __forceinline__ void write_all(const Extent& to, const WriteVec8& write_vec8, const WriteOne& write_one) {
  const std::uint32_t first = static_cast<std::uint32_t>(block_index()) * kThreads + thread_index();
  const std::uint32_t threads = static_cast<std::uint32_t>(grid_blocks()) * kThreads;
  for (std::uint32_t i = first; i < to.rows * to.vec8s; i += threads) {
    write_vec8(i / to.vec8s, i % to.vec8s * kVecSize);
  }
  const std::uint32_t rest_of_row = to.stride - to.vec8s * kVecSize, rest_of_rows = to.rows * rest_of_row;
  const std::uint32_t all = rest_of_rows + (to.all_rows - to.rows) * to.stride;
  for (std::uint32_t i = first; i < all; i += threads) {
    if (i < rest_of_rows) {
      write_one(i / rest_of_row, to.vec8s * kVecSize + i % rest_of_row);
    } else {
      write_one(to.rows + (i - rest_of_rows) / to.stride, (i - rest_of_rows) % to.stride);
    }
  }
}

// A part of W, with the adapter's part to its right (forward) or below it (backward), and zeros elsewhere.
struct Panel {
  Extent extent;
  QuantizedWeightView weight;
  WeightScales scales;
  std::int64_t first_row, first_col;  // in W, where its part begins
  std::uint32_t rows, cols;           // of its part of W
  const void* lora;                   // B [N, rank] or A [rank, K]
  DType lora_dtype;
  float scaling;
  std::uint32_t rank;
  bool is_below;

  __device__ __forceinline__ std::int64_t element(std::uint32_t row, std::uint32_t col) const {
    return (first_row + row) * weight.K + first_col + col;
  }
  template <bool kPlain>
  __device__ __forceinline__ float value(std::uint32_t row, std::uint32_t col) const {
    if (row < rows && col < cols) {
      return value_of<kPlain>(weight, scales, element(row, col));
    }
    if (is_below ? row - rows >= rank || col >= cols : col - cols >= rank) return 0.0f;
    const std::int64_t at =
        is_below ? (row - rows) * weight.K + first_col + col : (first_row + row) * rank + col - cols;
    return scaling * load_as_f32(lora, lora_dtype, at);
  }
};

template <class T, int kBits, bool kPlain>
__global__ void __launch_bounds__(kThreads) panel_kernel(const __grid_constant__ Panel panel, T* to) {
  const Vec8Decoder<kBits, kPlain> decoder(panel.weight, panel.scales);
  const auto place = [&](std::uint32_t row, std::uint32_t col) { return to + row * panel.extent.stride + col; };
  write_all(
      panel.extent,
      [&](std::uint32_t row, std::uint32_t col) {
        float values[kVecSize];
        decoder.decode(panel.element(row, col), values);
        store_vec8_aligned_from_f32(place(row, col), values);
      },
      [&](std::uint32_t row, std::uint32_t col) {
        *place(row, col) = from_f32<T>(panel.template value<kPlain>(row, col));
      });
}

// [x | u | zeros]
template <class T>
struct Concatenation {
  Extent extent;
  const T *x, *u;
  std::int64_t x_stride, u_stride;
  std::uint32_t cols, rank;
};

template <class T>
__global__ void __launch_bounds__(kThreads) concatenate_kernel(const __grid_constant__ Concatenation<T> from, T* to) {
  const auto place = [&](std::uint32_t row, std::uint32_t col) { return to + row * from.extent.stride + col; };
  write_all(
      from.extent,
      [&](std::uint32_t row, std::uint32_t col) {
        T values[kVecSize];
        load_vec8_aligned(from.x + row * from.x_stride + col, values);
        store_aligned(place(row, col), values);
      },
      [&](std::uint32_t row, std::uint32_t col) {
        const std::uint32_t r = col - from.cols;
        *place(row, col) = col < from.cols ? from.x[row * from.x_stride + col]
                           : r < from.rank ? from.u[row * from.u_stride + r]
                                           : from_f32<T>(0.0f);
      });
}

// ---- on the host ----

template <class T>
const T* row_of(const ConstMatrix& matrix, std::int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}
template <class T>
T* row_of(const Matrix& matrix, std::int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}
std::uint32_t in_32_bits(std::int64_t n) { return static_cast<std::uint32_t>(n); }

// Runs one product after another: every panel for the first rows of out, then every panel for the next rows.
template <class T>
class PanelProducts {
 public:
  PanelProducts(const Product& product, const PanelsConfig& config, const Stream& stream)
      : product_(product),
        config_(config),
        stream_(stream),
        rank_(product.u.cols),
        column_elements_(panel_column_elements(product.inner, rank_)),
        inner_(rank_ > 0 ? column_elements_ : product.inner),
        panels_(ceil_div(product.cols, config.cols)),
        products_(panels_ * ceil_div(product.rows, config.rows)),
        panel_elements_(config.cols * column_elements_),
        workspace_(bytes(), stream) {}

  void run() {
    SideStream::of(stream_).overlap(
        products_, stream_.handle, [this](std::int64_t i, void* stream) { decode(i, stream); },
        [this](std::int64_t i) { multiply(i); });
  }

 private:
  struct Range {
    std::int64_t first, count;
  };
  Range cols_of(std::int64_t i) const { return range_of(i % panels_, config_.cols, product_.cols); }
  Range rows_of(std::int64_t i) const { return range_of(i / panels_, config_.rows, product_.rows); }
  static Range range_of(std::int64_t i, std::int64_t size, std::int64_t all) {
    return {i * size, std::min(size, all - i * size)};
  }

  // Two panels and, with an adapter, a copy of some rows of X or dY.
  std::size_t bytes() const {
    const std::int64_t copied = rank_ > 0 ? rows_of(0).count * column_elements_ : 0;
    return static_cast<std::size_t>(panels_in_memory() * panel_elements_ + copied) * sizeof(T);
  }
  std::int64_t panels_in_memory() const { return std::min<std::int64_t>(products_, 2); }
  T* panel_memory(std::int64_t i) const { return reinterpret_cast<T*>(workspace_.data()) + i % 2 * panel_elements_; }
  T* x_copy() const { return reinterpret_cast<T*>(workspace_.data()) + panels_in_memory() * panel_elements_; }
  std::int64_t panel_stride() const { return product_.backward ? config_.cols : column_elements_; }

  void decode(std::int64_t i, void* stream) const {
    const QuantizedWeightView& w = product_.weight;
    const Range cols = cols_of(i);
    const std::uint32_t rows = in_32_bits(product_.backward ? product_.inner : cols.count);
    const std::uint32_t weight_cols = in_32_bits(product_.backward ? cols.count : product_.inner);
    const bool in_vectors = supports_vec8(w) && w.K % kVecSize == 0;
    const Panel panel{.extent = {.rows = rows,
                                 .vec8s = in_vectors ? weight_cols / kVecSize : 0,
                                 .all_rows = in_32_bits(product_.backward ? inner_ : cols.count),
                                 .stride = in_32_bits(panel_stride())},
                      .weight = w,
                      .scales = scales_of(w),
                      .first_row = product_.backward ? 0 : cols.first,
                      .first_col = product_.backward ? cols.first : 0,
                      .rows = rows,
                      .cols = weight_cols,
                      .lora = product_.lora,
                      .lora_dtype = product_.lora_dtype,
                      .scaling = product_.scaling,
                      .rank = in_32_bits(rank_),
                      .is_below = product_.backward};
    LaunchShape shape = shape_for(panel.extent);
    const Stream panel_stream{.device = stream_.device, .index = stream_.index, .handle = stream};
    with_vec8_decoder(w, [&]<int kBits, bool kPlain>() {
      shape.smem_bytes = Vec8Decoder<kBits, kPlain>::kSmemBytes;
      launch<panel_kernel<T, kBits, kPlain>>(shape, panel_stream, panel, panel_memory(i));
    });
  }

  void multiply(std::int64_t i) const {
    const Range rows = rows_of(i), cols = cols_of(i);
    if (rank_ > 0 && cols.first == 0) concatenate(rows);
    const DType dtype = product_.x.dtype;
    const T* const x = rank_ > 0 ? x_copy() : row_of<T>(product_.x, rows.first);
    const std::int64_t x_stride = rank_ > 0 ? column_elements_ : product_.x.stride;
    const T* const bias = static_cast<const T*>(product_.bias);
    const DenseGemmArgs product{
        .x = {x, dtype, rows.count, inner_, x_stride},
        .w = {panel_memory(i), dtype, product_.backward ? inner_ : cols.count, product_.backward ? cols.count : inner_,
              panel_stride()},
        .transpose_w = !product_.backward,
        .bias = bias == nullptr ? nullptr : bias + cols.first,
        .out = {row_of<T>(product_.out, rows.first) + cols.first, dtype, rows.count, cols.count, product_.out.stride}};
    const DeviceWork work;
    hooks().dense_gemm(product, stream_);
  }

  void concatenate(const Range& rows) const {
    const ConstMatrix &x = product_.x, &u = product_.u;
    const bool in_vectors = is_aligned(x.data, kVectorBytes) && x.stride % kVecSize == 0;
    const std::uint32_t count = in_32_bits(rows.count), cols = in_32_bits(product_.inner);
    const Concatenation<T> from{.extent = {.rows = count,
                                           .vec8s = in_vectors ? cols / kVecSize : 0,
                                           .all_rows = count,
                                           .stride = in_32_bits(column_elements_)},
                                .x = row_of<T>(x, rows.first),
                                .u = row_of<T>(u, rows.first),
                                .x_stride = x.stride,
                                .u_stride = u.stride,
                                .cols = cols,
                                .rank = in_32_bits(rank_)};
    launch<concatenate_kernel<T>>(shape_for(from.extent), stream_, from, x_copy());
  }

  LaunchShape shape_for(const Extent& extent) const {
    return looping_grid(std::int64_t{extent.all_rows} * (extent.stride / kVecSize), kThreads, stream_);
  }

  const Product& product_;
  const PanelsConfig& config_;
  const Stream& stream_;
  const std::int64_t rank_;
  const std::int64_t column_elements_;  // elements of a panel for each column of out
  const std::int64_t inner_;            // inner dimension of the product
  const std::int64_t panels_, products_, panel_elements_;
  const Workspace workspace_;
};

}  // namespace

void multiply(const Product& product, const PanelsConfig& config, const Stream& stream) {
  with_type(product.x.dtype, [&]<class T>() { PanelProducts<T>(product, config, stream).run(); });
}

}  // namespace qlora_native::QLN_CUDA
