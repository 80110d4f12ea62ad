// The shared memory of a block of the tensor-core product (gemm.cuh).
#pragma once

#include "device/weight_chunk.cuh"
#include "product/gemm/operands.cuh"
#include "product/tile.cuh"

namespace qlora_native::QLN_CUDA {

template <class T, class Weights, class Tile>
struct GemmShared {
  // Each byte's pair has 16 copies, so that lanes that are served at once read different banks.
  using Table = PairTable<16, kRowBytes / sizeof(Vector<float, 2>)>;
  struct Row {
    typename Table::Pair pairs[16];
    std::byte weights[kLineVectors * kVectorBytes];
  };
  static_assert(2 * Tile::kCols >= 256 && sizeof(Row) == kRowBytes);
  // The left operand of a step, and the codes of the next step. Only the thread that has copied codes reads them.
  struct Stage {
    LeftStage<T, Tile> left;
    std::uint8_t codes[Tile::kThreadChunks * kGemmThreads * kChunkBytes];
  };
  Row rows[2 * Tile::kCols];  // the first 256 have the table; all have decoded weights, of this step and of the next
  Stage stages[Tile::kStages];
  typename ScaleReader<Tile::kAligned>::Nested nested;
  int run;  // the block's
  // With rows in groups: the adapters that a step of the inner dimension has, -1 for none.
  static constexpr int kAdapters = kGemmStep / kMmaInner;
  int adapters[kAdapters];

  // `rows` must begin where the table must, which is not far from the beginning of shared memory: product_config has
  // asked the device. If it were further away all the same, the end would lie in another block's memory.
  static __device__ GemmShared& in_dynamic_smem() { return *dynamic_smem_for_rows<GemmShared>(); }
  static constexpr std::size_t bytes() {
    static_assert(kRowsBegin == kGemmMostReservedSmem);
    constexpr std::size_t kBytes = kRowsBegin + sizeof(GemmShared);
    static_assert(kBytes == gemm_smem_bytes(Tile::kRows, Tile::kCols));
    static_assert(Tile::kRows > kGemmMiddleRows || kBytes <= kMinSmemBytes);
    return kBytes;
  }
};

}  // namespace qlora_native::QLN_CUDA
