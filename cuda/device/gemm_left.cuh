// The left operand's side of the tensor-core product (gemm.cuh): how a step of it lies in shared memory, and how a
// thread brings its share.
#pragma once

#include "device/elements.cuh"
#include "device/gemm_tile.cuh"

namespace qlora_native::QLN_CUDA {

// 64 elements of each row of a tile's left operand, as eight 16-byte vectors. ldmatrix reads the same vector of eight
// rows at once: it stands at another place in each, so that all lie in different banks.
template <class T, class Tile>
struct LeftStage {
  static constexpr unsigned kVector = kVectorBytes / sizeof(T);
  static constexpr unsigned kRowBytes = kVectorsOfStep * kVectorBytes;
  alignas(kStageAlignment) T at[Tile::kRows * kGemmStep];

  // In vectors: of a row's, and which of a row's stands at a place.
  static constexpr unsigned place(unsigned row, unsigned vector) { return row * kVectorsOfStep + (vector ^ row % 8); }
  static constexpr unsigned vector_at(unsigned place) { return place % kVectorsOfStep ^ place / kVectorsOfStep % 8; }
  // In bytes, of what a lane points ldmatrix at: of 16 rows both halves of 16 of the inner dimension, as mma takes
  // them.
  __device__ static unsigned first_of(const Lane& lane) {
    return place(lane.warp_row<Tile>() + lane.lane % kMmaRows, lane.lane / kMmaRows) * kVectorBytes;
  }
  // The k-th sixteen of the inner dimension, of the i-th 16 rows.
  __device__ __forceinline__ static SharedPlace operand(const SharedPlace& first, unsigned k, unsigned i) {
    return first.flipped(2 * kVectorBytes * k).at(i * kMmaRows * kRowBytes);
  }
};

// A thread's share of a tile's rows, step after step: the same 16-byte vector of every 32nd row. `to`: its place in a
// stage, which is that of its number, so that a warp writes neighbours.
template <class T, class Tile>
class LeftRows {
  using Stage = LeftStage<T, Tile>;
  static constexpr int kVector = Stage::kVector;
  static constexpr int kRowsAtOnce = kGemmThreads / kVectorsOfStep;
  static constexpr int kRowsOfThread = (Tile::kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr std::uint32_t kBytesApart = kRowsAtOnce * kGemmStep * sizeof(T);

 public:
  // Of the thread's vector, in a step.
  __device__ int inner() const { return static_cast<int>(Stage::vector_at(thread_)) * kVector; }

  // From row `row0` of the matrix, of which `rows` are there, and from `inner0` of the inner dimension.
  __device__ __forceinline__ LeftRows(const Lane& lane, const ConstMatrix& matrix, std::int64_t row0, int rows,
                                      std::int64_t inner0)
      : thread_(lane.thread), first_(static_cast<const T*>(matrix.data) + row0 * matrix.stride + inner0 + inner()) {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      // The last row for those beyond, whose results are not stored.
      const int there = row(i) < rows ? row(i) : rows - 1;
      vectors_[i] = static_cast<std::uint32_t>(there) * static_cast<std::uint32_t>(matrix.stride / kVector);
    }
  }
  __device__ __forceinline__ void next_step() { first_ += kGemmStep; }

  // Of rows that are vectors. Zeros, if the thread's is not there.
  __device__ __forceinline__ void fetch_vectors(const SharedPlace& to, bool there) const {
    if (Tile::kRows < kRowsAtOnce && row(0) >= Tile::kRows) return;
    const auto* const first = reinterpret_cast<const std::byte*>(first_);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      cp_async_or_zeros(to.at(i * kBytesApart), first + std::uint64_t{vectors_[i]} * kVectorBytes, there);
    }
  }
  // Of others, element by element: of `rows` rows of which `inner_there` of the step are there.
  __device__ __forceinline__ void fetch_elements(const SharedPlace& to, std::int64_t stride, int rows,
                                                 int inner_there) const {
    const int rest = inner_there - inner();
    const T* from = first_ + row(0) * stride;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      if (row(i) >= Tile::kRows) break;
      Vector<T, kVector> values{};
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (j < rest && row(i) < rows) values.at[j] = from[j];
      }
      store_shared(to.at(i * kBytesApart), values);
      from += kRowsAtOnce * stride;
    }
  }

 private:
  __device__ int row(int i) const { return static_cast<int>(thread_ / kVectorsOfStep) + i * kRowsAtOnce; }

  const unsigned thread_;
  const T* first_;                        // in the tile's first row
  std::uint32_t vectors_[kRowsOfThread];  // from there to each of the thread's
};

}  // namespace qlora_native::QLN_CUDA
