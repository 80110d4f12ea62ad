// A product of two sources (sources.cuh), for every dtype and shape: sum over k of left(i, k) * right(j, k). A block of
// 256 threads computes 64x64 sums, 16 a thread. In bf16 and fp16 tensor cores do: both operands pass through shared
// memory in steps of 64 along k, of which the next is on its way while one is multiplied. In fp32 CUDA cores do, in
// steps of 16.
#pragma once

#include <type_traits>

#include "device/elements.cuh"
#include "simt/simt.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kProductThreads = 256;
constexpr int kProductTile = 64;  // rows and columns of a block
using ProductSums = float[4][4];  // a thread's
template <class T>
constexpr bool kOnTensorCores = sizeof(T) == 2;
template <class T>
constexpr int kProductStep = kOnTensorCores<T> ? 64 : 16;  // along k
// So much of k is summed for itself before it joins the total: the error of a long sum grows with the root of this and
// of how many there are, not of all of k.
constexpr int kProductOfSum = 128;

// Which of the result are the block's, and of these the thread's.
//
// On tensor cores a warp has 16 rows and 32 columns, of which each sum[a] is mma's fragment of 8; on CUDA cores a
// thread has 4x4 neighbours.
template <class T>
struct ProductPlace {
  std::int64_t rows, cols;  // of the whole result
  std::int64_t i0, j0;      // where the block's tile begins
  int row, col;             // of it, where the thread's begin
  __device__ ProductPlace(std::int64_t rows, std::int64_t cols) : ProductPlace(rows, cols, block_index()) {}
  __device__ ProductPlace(std::int64_t rows, std::int64_t cols, std::int64_t tile) : rows(rows), cols(cols) {
    const std::int64_t across = (cols + kProductTile - 1) / kProductTile;
    i0 = tile / across * kProductTile;
    j0 = tile % across * kProductTile;
    const int lane = thread_index() % kWarp;
    row = kOnTensorCores<T> ? warp_row() + lane / 4 : thread_index() / 16 * 4;
    col = kOnTensorCores<T> ? warp_col() + lane % 4 * 2 : thread_index() % 16 * 4;
  }
  __device__ static int warp_row() { return thread_index() / kWarp % 4 * kMmaRows; }
  __device__ static int warp_col() { return thread_index() / kWarp / 4 * 32; }
  // f(i, j, sum) for each of the thread's that the result has.
  template <class F>
  __device__ void each(ProductSums& sum, const F& f) const {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const std::int64_t i = i0 + row + (kOnTensorCores<T> ? b / 2 * 8 : a);
        const std::int64_t j = j0 + col + (kOnTensorCores<T> ? a * kMmaCols + b % 2 : b);
        if (i < rows && j < cols) f(i, j, sum[a][b]);
      }
    }
  }
};

// ---- on tensor cores ------------------------------------------------------------------------------------------------

// A step of an operand: 64 lines of 64 elements, each as eight 16-byte vectors. A line is a row i where the source's
// memory runs along k, and one k where it runs along i. Vector v of line l stands at v ^ (l % 8), so that the eight
// lines of an ldmatrix lie in different banks.
struct alignas(128) TensorOperand {
  static constexpr int kVectors = 8;  // of a line
  Eight at[kProductTile * kVectors];
  __device__ static int place(int line, int vector) { return line * kVectors + (vector ^ (line % kVectors)); }
};
struct TensorStage {
  TensorOperand left, right;
};
constexpr int kTensorStages = 2;

// A thread's share of an operand on its way from global to shared memory: one vector of every so many lines.
template <class Source>
class PendingEights {
 public:
  // From `begin` on; `inner`: where k ends.
  __device__ PendingEights(const Source& source, std::int64_t i0, std::int64_t rows, std::int64_t begin,
                           std::int64_t inner)
      : source_(source),
        i0_(i0),
        rows_(rows - i0 < kProductTile ? static_cast<int>(rows - i0) : kProductTile),
        vectors_(source.has_vectors() && (Source::kAlongInner ? inner : rows) % kEight == 0),
        element_(Source::kAlongInner ? (i0 + i_of(0)) * source.stride + begin + k_of(0)
                                     : (begin + k_of(0)) * source.stride + i0 + i_of(0)) {}
  // The next step, of which so many k, or more, are there.
  __device__ __forceinline__ void fetch(int inner) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) raw_[n] = {};  // becomes zeros
    if (vectors_) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        if (i_of(n) < rows_ && k_of(n) < inner) raw_[n] = source_.load(element_ + n * kLinesAtOnce * source_.stride);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const int rest = Source::kAlongInner ? inner - k_of(n) : rows_ - i_of(n);
        if (i_of(n) < rows_ && k_of(n) < inner)
          raw_[n] = source_.gather(element_ + n * kLinesAtOnce * source_.stride, rest < kEight ? rest : kEight);
      }
    }
    element_ += Source::kAlongInner ? kStep : kStep * source_.stride;
  }
  // What it has brought, which begins at k0.
  __device__ __forceinline__ void put(std::int64_t k0, TensorOperand& to) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      store_shared(SharedPlace(&to.at[TensorOperand::place(line_of(n), vector())]),
                   source_.finish(raw_[n], i0_ + i_of(n), k0 + k_of(n)));
    }
  }

 private:
  static constexpr int kStep = kProductStep<typename Source::Element>;
  static constexpr int kLinesAtOnce = kProductThreads / TensorOperand::kVectors;
  static constexpr int kCount = kProductTile / kLinesAtOnce;
  __device__ static int line_of(int n) { return thread_index() / TensorOperand::kVectors + n * kLinesAtOnce; }
  __device__ static int vector() { return thread_index() % TensorOperand::kVectors; }
  __device__ static int i_of(int n) { return Source::kAlongInner ? line_of(n) : vector() * kEight; }
  __device__ static int k_of(int n) { return Source::kAlongInner ? vector() * kEight : line_of(n); }

  const Source& source_;
  const std::int64_t i0_;
  const int rows_;  // of the tile
  const bool vectors_;
  std::int64_t element_;  // of the next step, the first of the thread's
  typename Source::Raw raw_[kCount];
};

// How a warp takes an operand from shared memory: 16 rows and 16 of k at once, which ldmatrix hands out as four
// matrices of 8x8. Of the left one mma wants the other eight rows second, of the right one the other eight of k.
template <bool kAlongInner, bool kLeft>
class TensorFragments {
 public:
  // `i0`: the warp's first row of the operand.
  __device__ TensorFragments(const TensorOperand& operand, int i0) : first_(&operand.at[first_of(i0)]) {}
  // Rows from i0 + i and k on, both multiples of 16, of the operand that lies `stage` bytes behind the first.
  __device__ __forceinline__ void load(std::uint32_t (&r)[4], std::uint32_t stage, unsigned i, unsigned k) const {
    constexpr unsigned kLineBytes = TensorOperand::kVectors * sizeof(Eight);
    const unsigned lines = kAlongInner ? i : k, vectors = (kAlongInner ? k : i) / kEight;
    // Vectors are turned over, as by place(): their bits are not those of the thread's first one.
    const SharedPlace row = first_.at(stage + lines * kLineBytes).flipped(vectors * sizeof(Eight));
    if constexpr (kAlongInner) {
      ldmatrix_x4(r, row);
    } else {
      ldmatrix_x4_transposed(r, row);
    }
  }

 private:
  __device__ static int first_of(int i0) {
    const int lane = thread_index() % kWarp, matrix = lane / 8;
    const int other_i = kLeft ? matrix % 2 : matrix / 2, other_k = kLeft ? matrix / 2 : matrix % 2;
    if constexpr (kAlongInner) return TensorOperand::place(i0 + 8 * other_i + lane % 8, other_k);
    return TensorOperand::place(8 * other_k + lane % 8, i0 / kEight + other_i);
  }
  const SharedPlace first_;
};

template <class T, class Left, class Right>
__device__ void accumulate_on_tensor_cores(ProductSums& total, const ProductPlace<T>& place, const Left& left,
                                           const Right& right, std::int64_t inner, std::int64_t begin) {
  constexpr int kStep = kProductStep<T>;
  TensorStage* const stages = dynamic_smem<TensorStage>();
  const TensorFragments<Left::kAlongInner, true> left_fragments(stages->left, place.warp_row());
  const TensorFragments<Right::kAlongInner, false> right_fragments(stages->right, place.warp_col());
  PendingEights<Left> next_left(left, place.i0, place.rows, begin, inner);
  PendingEights<Right> next_right(right, place.j0, place.cols, begin, inner);
  const auto fetch = [&](std::int64_t k0) {
    const int there = inner - k0 < kStep ? static_cast<int>(inner - k0) : kStep;
    next_left.fetch(there);
    next_right.fetch(there);
  };
  ProductSums sum = {};
  const auto multiply = [&](std::uint32_t stage) {
    const std::uint32_t bytes = stage * static_cast<std::uint32_t>(sizeof(TensorStage));
#pragma unroll
    for (unsigned k = 0; k < kStep; k += kMmaInner) {
      std::uint32_t a[4];
      left_fragments.load(a, bytes, 0, k);
#pragma unroll
      for (unsigned pair = 0; pair < 2; ++pair) {
        std::uint32_t b[4];
        right_fragments.load(b, bytes, pair * 16, k);
        mma_16x8x16<T>(sum[2 * pair], a, {b[0], b[1]});
        mma_16x8x16<T>(sum[2 * pair + 1], a, {b[2], b[3]});
      }
    }
  };
  const auto join = [&] {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        total[a][b] += sum[a][b];
        sum[a][b] = 0.0f;
      }
    }
  };

  if (begin >= inner) return;
  fetch(begin);
  sync_threads();  // what has been multiplied before has been read
  next_left.put(begin, stages->left);
  next_right.put(begin, stages->right);
  std::uint32_t stage = 0;
#pragma unroll 1
  for (std::int64_t k0 = begin; k0 < inner; k0 += kStep, stage ^= 1) {
    sync_threads();  // this step is there, and the one before has been read
    const bool is_last = k0 + kStep >= inner;
    if (!is_last) fetch(k0 + kStep);
    multiply(stage);
    if (!is_last) {
      next_left.put(k0 + kStep, stages[stage ^ 1].left);
      next_right.put(k0 + kStep, stages[stage ^ 1].right);
    }
    static_assert(kProductOfSum == kTensorStages * kStep);
    if (stage == kTensorStages - 1) join();
  }
  join();
}

// ---- on CUDA cores --------------------------------------------------------------------------------------------------

// A step of an operand, k first: [k][i]. Four more columns keep neighbouring k out of one bank.
struct ScalarOperand {
  float at[kProductStep<float>][kProductTile + 4];
};
struct ScalarStage {
  ScalarOperand left, right;
};

template <class Source>
__device__ void load_operand(ScalarOperand& to, const Source& source, std::int64_t i0, std::int64_t rows,
                             std::int64_t k0, std::int64_t inner) {
  constexpr int kStep = kProductStep<float>;
#pragma unroll
  for (int n = 0; n < kProductTile * kStep / kProductThreads; ++n) {
    const int item = thread_index() + n * kProductThreads;
    const int i = Source::kAlongInner ? item / kStep : item % kProductTile;
    const int k = Source::kAlongInner ? item % kStep : item / kProductTile;
    to.at[k][i] = i0 + i < rows && k0 + k < inner ? source(i0 + i, k0 + k) : 0.0f;
  }
}

template <class Left, class Right>
__device__ void accumulate_on_cuda_cores(ProductSums& total, const ProductPlace<float>& place, const Left& left,
                                         const Right& right, std::int64_t inner, std::int64_t begin) {
  constexpr int kStep = kProductStep<float>;
  ScalarStage& shared = *dynamic_smem<ScalarStage>();
  for (std::int64_t first = begin; first < inner; first += kProductOfSum) {
    ProductSums sum = {};
    const std::int64_t end = first + kProductOfSum < inner ? first + kProductOfSum : inner;
    for (std::int64_t k0 = first; k0 < end; k0 += kStep) {
      sync_threads();  // the step before has been read
      load_operand(shared.left, left, place.i0, place.rows, k0, inner);
      load_operand(shared.right, right, place.j0, place.cols, k0, inner);
      sync_threads();
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        const auto l = load_vector<float, 4>(&shared.left.at[k][place.row]);
        const auto r = load_vector<float, 4>(&shared.right.at[k][place.col]);
#pragma unroll
        for (int a = 0; a < 4; ++a) {
#pragma unroll
          for (int b = 0; b < 4; ++b) sum[a][b] = fma(l.at[a], r.at[b], sum[a][b]);
        }
      }
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) total[a][b] += sum[a][b];
    }
  }
}

// ---- either ---------------------------------------------------------------------------------------------------------

// total += sum over begin <= k < inner of left(i, k) * right(j, k). `begin` is a multiple of 8.
template <class T, class Left, class Right>
__device__ void accumulate(ProductSums& total, const ProductPlace<T>& place, const Left& left, const Right& right,
                           std::int64_t inner, std::int64_t begin = 0) {
  static_assert(std::is_same_v<typename Left::Element, T> && std::is_same_v<typename Right::Element, T>);
  if constexpr (kOnTensorCores<T>) {
    accumulate_on_tensor_cores(total, place, left, right, inner, begin);
  } else {
    accumulate_on_cuda_cores(total, place, left, right, inner, begin);
  }
}

template <class T>
LaunchShape product_grid(std::int64_t rows, std::int64_t cols) {
  const auto tiles = [](std::int64_t n) { return (n + kProductTile - 1) / kProductTile; };
  const std::size_t bytes = kOnTensorCores<T> ? kTensorStages * sizeof(TensorStage) : sizeof(ScalarStage);
  return {tiles(rows) * tiles(cols), kProductThreads, bytes};
}

}  // namespace qlora_native::QLN_CUDA
