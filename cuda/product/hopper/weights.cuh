// The weight as a consumer of the product by wgmma (gemm.cuh) decodes it: forward by its rows, backward by its columns.
//
// Both layouts say which codes and scales of a step come where, and which of them a lane has. Of 16 of the inner
// dimension, wgmma wants lane (g, t) to have 2t, 2t + 1, 2t + 8 and 2t + 9.
#pragma once

#include "product/hopper/register_table.cuh"
#include "product/hopper/tile.cuh"
#include "simt/tensor_map.h"

namespace qlora_native::QLN_CUDA {

// The elements of a step that a lane has, rounded, as wgmma's operand a: by 16 of the inner dimension, then by half of
// these and by column of the result. A register has two neighbours in the inner dimension.
using HopperFragments = std::uint32_t[kGemmStep / kWgmmaInner][4];

// Each layout has a Decoder of what a lane has of a step. It decodes a step while the products of the one before run,
// and rounds it when they are done, because the compiler lets nothing define an operand of wgmma while products run.

// Whether a forward tile of so many rows decodes half of its codes by a table in registers. By
// bench/results/cuda-account.md this takes 128 cycles a step from shared memory, and 100 more of the issue slots.
// Shared memory bounds the steps of tiles of 32 ... 128 rows. With 16 rows it has little more to do than the issue
// slots would then have, and with 256 rows the tensor cores take longer.
constexpr bool decodes_in_registers(int tile_rows) { return tile_rows > kGemmFewRows && tile_rows < kGemmTallRows; }

// Forward: a column of the result is a row of W, and 32 bytes of it are a step. The lane takes byte t of each word:
//
//   element of a step   0 1  2 3  4 5  6 7   8 ... 15   16 ... 23   24 ... 31   ...
//   byte                0    1    2    3     4 ... 7    8 ... 11    12 ... 15
//   taken by t =        0    1    2    3     0 ... 3    0 ... 3     0 ... 3
//
// TMA's swizzle exchanges the two vectors of a row in every second group of four rows, so that eight g read different
// banks.
struct HopperRows {
  static constexpr bool kForward = true;
  static constexpr int kTileRows = kGemmCols, kTileRowBytes = kGemmStep / 2;  // of codes
  static constexpr Swizzle kSwizzle = Swizzle::bytes_32;

  static constexpr int tile_row(int, int col0) { return col0; }
  static constexpr int tile_byte(int inner0, int) { return inner0 / 2; }
  // The element of a step, and the column of a tile, that the i-th scale is for.
  static constexpr int scale_inner(int) { return 0; }
  static constexpr int scale_col(int i) { return i; }
  static QLN_HOST_DEVICE std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return col * w.K + inner;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView&) { return kGemmStep; }

  // Where both vectors of the lane's first row, and the scales of both rows, stand in the first stage.
  struct Addresses {
    SharedAddress vectors[2], scales;
    __device__ Addresses(const HopperLane& lane, const SharedAddress& codes, const SharedAddress& scales)
        : vectors{codes.at(vector(lane, 0)).in_register(), codes.at(vector(lane, 1)).in_register()},
          scales(scales.at(lane.col() * sizeof(float)).in_register()) {}
    __device__ static unsigned vector(const HopperLane& lane, unsigned i) {
      return lane.col() * kTileRowBytes + (i ^ lane.col() / 4 % 2) * kVectorBytes;
    }
  };
  // The first of the lane's two rows is decoded by the table of pairs, and the second one by a table in registers, if
  // kInRegisters.
  template <class T, bool kInRegisters>
  class Decoder {
   public:
    __device__ Decoder(const HopperLane& lane, const Addresses& addresses, const float* code)
        : addresses_(addresses), t_(lane.t), bytes_t_(lane.t | (lane.t + 4) << 4) {
      if constexpr (kInRegisters) {
#pragma unroll
        for (int i = 0; i < kLevels; ++i) levels_[i] = code[i];
      }
    }
    // Decodes the step in the stage that begins `stage` bytes behind the first.
    template <class Table>
    __device__ __forceinline__ void decode(std::uint32_t stage, const Table& table) {
      const auto scale = load_shared<Vector<float, 2>>(addresses_.scales.at(stage));
#pragma unroll
      for (unsigned vector = 0; vector < 2; ++vector) {
#pragma unroll
        for (unsigned row = 0; row < kRowsByPairs; ++row) {
          const Words words = load(stage, vector, row);
#pragma unroll
          for (unsigned word = 0; word < 4; ++word) {
            const auto pair = table.pair_of_byte(words.at[word], t_);
            float* const to = values_ + (row * kWords + vector * 4 + word) * 2;
            to[0] = pair.at[0] * scale.at[row];
            to[1] = pair.at[1] * scale.at[row];
          }
        }
      }
      if constexpr (kInRegisters) {
        const RegisterTable<T> second(levels_, scale.at[1]);
#pragma unroll
        for (unsigned i = 0; i < kFours; ++i) {
          const Words words = load(stage, i / 2, 1);
          fours_[i] = second.look_up(pick_bytes(words.at[i % 2 * 2], words.at[i % 2 * 2 + 1], bytes_t_));
        }
      }
    }
    __device__ __forceinline__ void round(HopperFragments& fragments) const {
#pragma unroll
      for (unsigned word = 0; word < kWords; ++word) {
        std::uint32_t* const to = fragments[word / 2] + word % 2 * 2;
#pragma unroll
        for (unsigned row = 0; row < kRowsByPairs; ++row) {
          const float* const pair = values_ + (row * kWords + word) * 2;
          to[row] = pack_pair<T>(pair[0], pair[1]);
        }
        // The first code of a byte is its high digit.
        if constexpr (kInRegisters) {
          const auto& four = fours_[word / 2];
          to[1] = in_register(word % 2 == 0 ? four.template pair<1, 0>() : four.template pair<3, 2>());
        }
      }
    }
    __device__ __forceinline__ void wait_for_products() {
      wgmma_wait_for(values_);
      if constexpr (kInRegisters) {
#pragma unroll
        for (auto& four : fours_) four = {in_register(four.low), in_register(four.high)};
      }
    }

   private:
    using Words = Vector<std::uint32_t, 4>;
    static constexpr unsigned kRowsByPairs = kInRegisters ? 1 : 2, kWords = 8, kFours = 4;
    static constexpr int kLevels = 16;

    __device__ __forceinline__ Words load(std::uint32_t stage, unsigned vector, unsigned row) const {
      return load_shared<Words>(addresses_.vectors[vector].at(stage + row * kTileRowBytes));
    }
    const Addresses addresses_;
    const std::uint32_t t_, bytes_t_;  // the byte that the lane takes of a word, and those that it takes of two
    float levels_[kLevels];
    float values_[kRowsByPairs * kWords * 2];        // by row and word
    typename RegisterTable<T>::Four fours_[kFours];  // of the second row: each of two words
  };
};

// Backward: a column of the result is a column of W, whose rows are the inner dimension. A step has 64 rows of 64
// bytes. A byte has both columns of the lane, and the lane has four rows of each 16.
//
// TMA's swizzle of 64 bytes puts the vectors of rows 2t, which lanes read at once, into different banks.
struct HopperColumns {
  static constexpr bool kForward = false;
  static constexpr int kTileRows = kGemmStep, kTileRowBytes = kGemmCols / 2;
  static constexpr Swizzle kSwizzle = Swizzle::bytes_64;

  static constexpr int tile_row(int inner0, int) { return inner0; }
  static constexpr int tile_byte(int, int col0) { return col0 / 2; }
  static constexpr int scale_inner(int i) { return i % kGemmStep; }
  static constexpr int scale_col(int i) { return i / kGemmStep * kGemmStep; }
  static QLN_HOST_DEVICE std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return inner * w.K + col;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView& w) { return kGemmStep * w.K; }

  // Where the lane's byte of row 2t, and the row's scale, stand in a stage. Rows that are multiples of 8 further on
  // have the same swizzle.
  struct Addresses {
    SharedAddress byte, scales;
    __device__ Addresses(const HopperLane& lane, const SharedAddress& codes, const SharedAddress& scales)
        : byte(codes.at(byte_of(lane)).in_register()),
          scales(scales.at((lane.col() / kGemmStep * kGemmStep + 2 * lane.t) * sizeof(float)).in_register()) {}
    __device__ static unsigned byte_of(const HopperLane& lane) {
      const unsigned byte = lane.col() / 2;
      return 2 * lane.t * kTileRowBytes + (byte / kVectorBytes ^ lane.t) * kVectorBytes + byte % kVectorBytes;
    }
  };
  // A row's scale is for two codes of a lane alone, so that no table in registers is worth its making.
  template <class T, bool>
  class Decoder {
   public:
    __device__ Decoder(const HopperLane&, const Addresses& addresses, const float*) : addresses_(addresses) {}
    template <class Table>
    __device__ __forceinline__ void decode(std::uint32_t stage, const Table& table) {
#pragma unroll
      for (unsigned row_pair = 0; row_pair < kRowPairs; ++row_pair) {
        const auto scale = load_shared<Vector<float, 2>>(addresses_.scales.at(stage + row_pair * 8 * sizeof(float)));
#pragma unroll
        for (unsigned row = 0; row < 2; ++row) {
          const SharedAddress at = addresses_.byte.at(stage + (row_pair * 8 + row) * kTileRowBytes);
          const auto pair = table.pair_of_byte(load_shared<std::uint8_t>(at), 0);
          float* const to = values_ + row_pair * 4 + row;
          to[0] = pair.at[0] * scale.at[row];
          to[2] = pair.at[1] * scale.at[row];
        }
      }
    }
    __device__ __forceinline__ void round(HopperFragments& fragments) const {
#pragma unroll
      for (unsigned i = 0; i < kRowPairs * 2; ++i) {
        fragments[i / 4][i % 4] = pack_pair<T>(values_[2 * i], values_[2 * i + 1]);
      }
    }
    __device__ __forceinline__ void wait_for_products() { wgmma_wait_for(values_); }

   private:
    static constexpr unsigned kRowPairs = kGemmStep / 8;  // 2t and 2t + 1 of each 8
    const Addresses addresses_;
    float values_[kRowPairs * 4];  // by pair of rows, column, and row
  };
};

}  // namespace qlora_native::QLN_CUDA
