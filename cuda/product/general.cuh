// Multiplies two sources (sources.cuh) of any dtype and shape: sum over k of left(i, k) * right(j, k). A block of 256
// threads computes a tile of 64x64, 16 elements a thread. Both operands pass through shared memory in steps of 128
// bytes along k, and the next step is loaded while one is multiplied. Tensor cores multiply bf16 and fp16, CUDA cores
// fp32.
#pragma once

#include <type_traits>

#include "device/elements.cuh"
#include "device/simt.cuh"
#include "runtime/launch.h"

namespace qlora_native::QLN_CUDA {

constexpr int kProductThreads = 256;
constexpr int kProductTile = 64;          // rows and columns of a block
using ProductAccumulators = float[4][4];  // a thread's
template <class T>
constexpr bool kOnTensorCores = sizeof(T) == 2;
constexpr int kProductStepBytes = 128;
template <class T>
constexpr int kProductStep = kProductStepBytes / sizeof(T);  // along k
// This much of k is summed by itself before it joins the total. So the error of a long sum grows with the root of this
// number and of the number of such sums, and not with the root of all of k.
constexpr int kProductChain = 128;

// Which elements of the result the block has, and which of these the thread has.
//
// On tensor cores a warp has 16 rows and 32 columns, and each accumulator[a] belongs to an mma fragment of 8 columns.
// On CUDA cores a thread has 4x4 adjacent elements.
template <class T>
struct ProductPosition {
  std::int64_t rows, cols;  // where the result ends
  std::int64_t i0, j0;      // where the block's tile begins
  int row, col;             // in the tile, where the thread's elements begin
  __device__ ProductPosition(std::int64_t i0, std::int64_t rows, std::int64_t j0, std::int64_t cols)
      : rows(rows), cols(cols), i0(i0), j0(j0) {
    const int lane = thread_index() % kWarp;
    row = kOnTensorCores<T> ? warp_row() + lane / 4 : thread_index() / 16 * 4;
    col = kOnTensorCores<T> ? warp_col() + lane % 4 * 2 : thread_index() % 16 * 4;
  }
  __device__ static int warp_row() { return thread_index() / kWarp % 4 * kMmaRows; }
  __device__ static int warp_col() { return thread_index() / kWarp / 4 * 32; }
  // Calls f(i, j, sum) for each of the thread's elements that the result has.
  template <class F>
  __device__ void each(ProductAccumulators& sum, const F& f) const {
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

// ---- from global to shared memory -----------------------------------------------------------------------------------

// A step of an operand: lines of vec8s, each of which is one 16-byte vector, or two in fp32. A line is a row i where
// the source's memory runs along k, and one k where it runs along i.
constexpr int kProductVectors = kProductTile * kProductStepBytes / kVectorBytes;
struct alignas(kProductStepBytes) ProductOperand {
  Vec8 at[kProductVectors];
};
struct ProductStage {
  ProductOperand left, right;
};
constexpr int kProductStages = 2;

// This is where vectors stand: vector v of a line is at v ^ swizzle, so that those that a warp reads at once lie in
// different banks.
template <class T, bool kAlongInner>
struct OperandLines {
  static constexpr int kElements = kAlongInner ? kProductStep<T> : kProductTile;  // of a line
  static constexpr int kCount = kAlongInner ? kProductTile : kProductStep<T>;
  static constexpr int kVectors = kElements * sizeof(T) / kVectorBytes;
  static_assert(kCount * kVectors == kProductVectors);
  __device__ static int place(int line, int vector) {
    // ldmatrix reads a vector of each of eight lines. CUDA cores read a vector of every fourth line where a line is a
    // row, and adjacent vectors of one line where it is a k.
    const int swizzle = kOnTensorCores<T> ? line % 8 : kAlongInner ? line / 4 % 8 : 0;
    return line * kVectors + (vector ^ swizzle);
  }
};

// A thread's slice of an operand while it is loaded from global to shared memory: eight elements of every
// kLinesAtOnce-th line.
template <class Source>
class PendingVec8s {
 public:
  // The slice begins at k = `begin`; `inner` is where k ends.
  __device__ PendingVec8s(const Source& source, std::int64_t i0, std::int64_t rows, std::int64_t begin,
                          std::int64_t inner)
      : source_(source),
        i0_(i0),
        rows_(rows - i0 < kProductTile ? static_cast<int>(rows - i0) : kProductTile),
        vectors_(source.has_vectors() && (Source::kAlongInner ? inner : rows) % kVecSize == 0),
        element_(source.first() + (Source::kAlongInner ? (i0 + i_of(0)) * source.stride + begin + k_of(0)
                                                       : (begin + k_of(0)) * source.stride + i0 + i_of(0))) {}
  // Starts to load the next step, which has `inner` of k.
  __device__ __forceinline__ void fetch(int inner) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) raw_[n] = {};  // becomes zeros, or is multiplied by zeros of the other operand
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
          raw_[n] = source_.gather(element_ + n * kLinesAtOnce * source_.stride, rest < kVecSize ? rest : kVecSize);
      }
    }
    element_ += Source::kAlongInner ? kStep : kStep * source_.stride;
  }
  // Stores the step that was fetched, which begins at k0.
  __device__ __forceinline__ void store(std::int64_t k0, ProductOperand& to) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const Vec8Of<Element> words = source_.finish(raw_[n], i0_ + i_of(n), k0 + k_of(n));
      constexpr int kVectors = sizeof(words) / sizeof(Vec8);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const Vec8 vector = {{words.at[4 * v], words.at[4 * v + 1], words.at[4 * v + 2], words.at[4 * v + 3]}};
        store_shared(SharedAddress(&to.at[Lines::place(line_of(n), eight() * kVectors + v)]), vector);
      }
    }
  }

 private:
  using Element = typename Source::Element;
  using Lines = OperandLines<Element, Source::kAlongInner>;
  static constexpr int kStep = kProductStep<Element>;
  static constexpr int kVec8s = Lines::kElements / kVecSize;  // of a line
  static constexpr int kLinesAtOnce = kProductThreads / kVec8s;
  static constexpr int kCount = Lines::kCount / kLinesAtOnce;
  __device__ static int line_of(int n) { return thread_index() / kVec8s + n * kLinesAtOnce; }
  __device__ static int eight() { return thread_index() % kVec8s; }
  __device__ static int i_of(int n) { return Source::kAlongInner ? line_of(n) : eight() * kVecSize; }
  __device__ static int k_of(int n) { return Source::kAlongInner ? eight() * kVecSize : line_of(n); }

  const Source& source_;
  const std::int64_t i0_;
  const int rows_;  // that the tile has
  const bool vectors_;
  std::int64_t element_;  // the thread's first in the next step
  typename Source::Raw raw_[kCount];
};

// ---- on tensor cores ------------------------------------------------------------------------------------------------

// How a warp loads an operand from shared memory: 16 rows and 16 of k at once, which ldmatrix loads as four matrices of
// 8x8. The second of these must have the other eight rows of the left operand, but the other eight k of the right one.
template <bool kAlongInner, bool kLeft>
class TensorFragments {
 public:
  // `i0`: the warp's first row of the operand.
  __device__ TensorFragments(const ProductOperand& operand, int i0) : first_(&operand.at[first_operand(i0)]) {}
  // Loads rows from i0 + i on, and from k on, of the operand that lies `stage` bytes behind the first. i and k are
  // multiples of 16.
  __device__ __forceinline__ void load(std::uint32_t (&r)[4], std::uint32_t stage, unsigned i, unsigned k) const {
    constexpr unsigned kLineBytes = Lines::kVectors * sizeof(Vec8);
    const unsigned lines = kAlongInner ? i : k, vectors = (kAlongInner ? k : i) / kVecSize;
    // place() swizzles a vector's number by xor. The thread's first vector shares no set bit with `vectors`, so that
    // xor adds them.
    const SharedAddress row = first_.at(stage + lines * kLineBytes).xor_swizzled(vectors * sizeof(Vec8));
    if constexpr (kAlongInner) {
      ldmatrix_x4(r, row);
    } else {
      ldmatrix_x4_transposed(r, row);
    }
  }

 private:
  using Lines = OperandLines<Bf16, kAlongInner>;  // or F16
  __device__ static int first_operand(int i0) {
    const int lane = thread_index() % kWarp, matrix = lane / 8;
    const int other_i = kLeft ? matrix % 2 : matrix / 2, other_k = kLeft ? matrix / 2 : matrix % 2;
    if constexpr (kAlongInner) return Lines::place(i0 + 8 * other_i + lane % 8, other_k);
    return Lines::place(8 * other_k + lane % 8, i0 / kVecSize + other_i);
  }
  const SharedAddress first_;
};

// Adds the products of a step to a warp's accumulators.
template <class T, class Left, class Right>
class StepProduct {
 public:
  __device__ StepProduct(const ProductPosition<T>& position, const ProductStage& stage)
      : left_(stage.left, position.warp_row()), right_(stage.right, position.warp_col()) {}
  // Multiplies the stage that lies `stage` bytes behind the first.
  __device__ __forceinline__ void add_to(ProductAccumulators& sum, std::uint32_t stage) const {
#pragma unroll
    for (unsigned k = 0; k < kProductStep<T>; k += kMmaInner) {
      std::uint32_t a[4];
      left_.load(a, stage, 0, k);
#pragma unroll
      for (unsigned pair = 0; pair < 2; ++pair) {
        std::uint32_t b[4];
        right_.load(b, stage, pair * 16, k);
        mma_16x8x16<T>(sum[2 * pair], a, {b[0], b[1]});
        mma_16x8x16<T>(sum[2 * pair + 1], a, {b[2], b[3]});
      }
    }
  }

 private:
  const TensorFragments<Left::kAlongInner, true> left_;
  const TensorFragments<Right::kAlongInner, false> right_;
};

// ---- on CUDA cores --------------------------------------------------------------------------------------------------

// How a thread loads an operand from shared memory: four rows and four of k at once.
template <bool kAlongInner>
class ScalarFragments {
 public:
  // `i0`: the thread's first row, a multiple of 4.
  __device__ ScalarFragments(const ProductOperand& operand, int i0)
      : first_(&operand.at[kAlongInner ? Lines::place(i0, 0) : Lines::place(0, i0 / 4)]) {}
  // Loads from k on, a multiple of 4, of the operand that lies `stage` bytes behind the first.
  __device__ __forceinline__ void load(float (&values)[4][4], std::uint32_t stage, unsigned k) const {
    constexpr unsigned kLineBytes = Lines::kVectors * sizeof(Vec8);
#pragma unroll
    for (unsigned line = 0; line < 4; ++line) {
      // Where lines are rows, place() swizzles a vector's number by xor, by the same bits for the four rows.
      const SharedAddress place = kAlongInner
                                      ? first_.at(stage).xor_swizzled(k / 4 * sizeof(Vec8)).at(line * kLineBytes)
                                      : first_.at(stage).at((k + line) * kLineBytes);
      const auto four = load_shared<Vector<float, 4>>(place);
#pragma unroll
      for (int i = 0; i < 4; ++i) (kAlongInner ? values[line][i] : values[i][line]) = four.at[i];
    }
  }

 private:
  using Lines = OperandLines<float, kAlongInner>;
  const SharedAddress first_;
};

template <class Left, class Right>
class StepProduct<float, Left, Right> {
 public:
  __device__ StepProduct(const ProductPosition<float>& position, const ProductStage& stage)
      : left_(stage.left, position.row), right_(stage.right, position.col) {}
  __device__ __forceinline__ void add_to(ProductAccumulators& sum, std::uint32_t stage) const {
#pragma unroll
    for (unsigned k0 = 0; k0 < kProductStep<float>; k0 += 4) {
      float l[4][4], r[4][4];
      left_.load(l, stage, k0);
      right_.load(r, stage, k0);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int a = 0; a < 4; ++a) {
#pragma unroll
          for (int b = 0; b < 4; ++b) sum[a][b] = fma(l[a][k], r[b][k], sum[a][b]);
        }
      }
    }
  }

 private:
  const ScalarFragments<Left::kAlongInner> left_;
  const ScalarFragments<Right::kAlongInner> right_;
};

// ---- either ---------------------------------------------------------------------------------------------------------

// total += sum over begin <= k < inner of left(i, k) * right(j, k). `begin` is a multiple of 8 where memory runs along
// k.
template <class T, class Left, class Right>
__device__ void accumulate(ProductAccumulators& total, const ProductPosition<T>& position, const Left& left,
                           const Right& right, std::int64_t inner, std::int64_t begin = 0) {
  static_assert(std::is_same_v<typename Left::Element, T> && std::is_same_v<typename Right::Element, T>);
  constexpr int kStep = kProductStep<T>;
  ProductStage* const stages = dynamic_smem<ProductStage>();
  const StepProduct<T, Left, Right> product(position, *stages);
  PendingVec8s<Left> next_left(left, position.i0, position.rows, begin, inner);
  PendingVec8s<Right> next_right(right, position.j0, position.cols, begin, inner);
  const auto fetch = [&](std::int64_t rest) {  // how much of k is left
    const int step_inner = rest < kStep ? static_cast<int>(rest) : kStep;
    next_left.fetch(step_inner);
    next_right.fetch(step_inner);
  };
  ProductAccumulators sum = {};
  const auto end_chain = [&] {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        total[a][b] += sum[a][b];
        sum[a][b] = 0.0f;
      }
    }
  };

  std::int64_t rest = inner - begin;  // how much of k is left, with this step
  if (rest <= 0) return;
  fetch(rest);
  sync_threads();  // all threads have read what was multiplied before
  next_left.store(begin, stages->left);
  next_right.store(begin, stages->right);
  std::uint32_t stage = 0;
  int chain_rest = kProductChain;
#pragma unroll 1
  for (; rest > 0; rest -= kStep, stage ^= 1) {
    sync_threads();  // this step is stored, and all threads have read the one before
    const bool is_last = rest <= kStep;
    if (!is_last) fetch(rest - kStep);
    product.add_to(sum, stage * static_cast<std::uint32_t>(sizeof(ProductStage)));
    if (!is_last) {
      next_left.store(inner - rest + kStep, stages[stage ^ 1].left);
      next_right.store(inner - rest + kStep, stages[stage ^ 1].right);
    }
    static_assert(kProductStages == 2 && kProductChain % kStep == 0);
    chain_rest -= kStep;
    if (chain_rest == 0) {
      end_chain();
      chain_rest = kProductChain;
    }
  }
  end_chain();
}

// The grid has a block for each tile, and tiles of the same rows are adjacent.
constexpr std::int64_t product_col_tiles(std::int64_t cols) { return ceil_div(cols, kProductTile); }
inline LaunchShape product_grid(std::int64_t row_tiles, std::int64_t cols) {
  return {row_tiles * product_col_tiles(cols), kProductThreads, kProductStages * sizeof(ProductStage)};
}

}  // namespace qlora_native::QLN_CUDA
