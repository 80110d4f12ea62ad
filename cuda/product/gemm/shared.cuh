// What a block of the tensor-core product (gemm.cuh) has in shared memory.
#pragma once

#include "device/weight_chunk.cuh"
#include "product/gemm/operands.cuh"
#include "product/gemm/tile.cuh"

namespace qlora_native::QLN_CUDA {

template <class T, class Weights, class Tile>
struct GemmShared {
  // 16 copies of each byte's pair: lanes that are served at once ask 16 of a bank each.
  using Table = PairTable<16, kRowBytes / sizeof(Vector<float, 2>)>;
  struct Row {
    typename Table::Pair pairs[16];
    std::byte weights[kLineVectors * kVectorBytes];
  };
  static_assert(2 * Tile::kCols >= 256 && sizeof(Row) == kRowBytes);
  // The left operand of a step and the next one's codes, which only the thread reads that has brought them.
  struct Stage {
    LeftStage<T, Tile> left;
    std::uint8_t codes[Tile::kPieces * kGemmThreads * kChunkBytes];
  };
  Row rows[2 * Tile::kCols];  // the table, in the first 256, and the decoded weights of this step and of the next
  Stage stages[Tile::kStages];
  typename ScaleReader<Tile::kAligned>::Nested nested;
  int run;  // the block's
  // Of rows in groups, that a step of the inner dimension has: -1 for none.
  static constexpr int kAdapters = kGemmStep / kMmaInner;
  int adapters[kAdapters];

  // `rows` begin where the table must, which is not far from the beginning: product_config has asked the device. Where
  // it is further all the same, the rest would be another block's memory.
  static __device__ GemmShared& of_block() {
    std::byte* const smem = dynamic_smem<std::byte>();
    const std::uint32_t before = SharedPlace(smem).to_rows();
    if (before > kGemmMostReservedSmem) trap();
    return *reinterpret_cast<GemmShared*>(smem + before);
  }
  static constexpr std::size_t bytes() {
    static_assert(kRowsBegin == kGemmMostReservedSmem);
    constexpr std::size_t kBytes = kRowsBegin + sizeof(GemmShared);
    static_assert(kBytes == gemm_smem_bytes(Tile::kRows, Tile::kCols));
    static_assert(Tile::kRows > kGemmMiddleRows || kBytes <= kLeastSmemBytes);
    return kBytes;
  }
};

}  // namespace qlora_native::QLN_CUDA
