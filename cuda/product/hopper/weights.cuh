// The weight as a consumer of the product by wgmma (gemm.cuh) decodes it: forward by its rows, backward by its columns.
//
// Both layouts say which codes and scales of a step come where, and which of them a lane has. Of 16 of the inner
// dimension, wgmma wants lane (g, t) to have 2t, 2t + 1, 2t + 8 and 2t + 9.
#pragma once

#include "product/hopper/tile.cuh"
#include "simt/tensor_map.h"

namespace qlora_native::QLN_CUDA {

// The elements of a step that a lane decodes, before they are rounded. They are ordered by 16 of the inner dimension,
// by half of these, and by column of the result; two neighbours in the inner dimension come last.
using HopperValues = float[kGemmStep / kWgmmaInner * 8];

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

  // Where both vectors of the lane's first row, and its scale, stand in a stage.
  struct Addresses {
    SharedAddress vectors[2], scales;
    unsigned t;
    __device__ Addresses(const HopperLane& lane, const SharedAddress& codes, const SharedAddress& scales)
        : vectors{codes.at(vector(lane, 0)).in_register(), codes.at(vector(lane, 1)).in_register()},
          scales(scales.at(lane.col() * sizeof(float)).in_register()),
          t(lane.t) {}
    __device__ static unsigned vector(const HopperLane& lane, unsigned i) {
      return lane.col() * kTileRowBytes + (i ^ lane.col() / 4 % 2) * kVectorBytes;
    }
  };
  template <class Table>
  __device__ __forceinline__ static void decode(const Addresses& addresses, std::uint32_t stage, const Table& table,
                                                HopperValues& values) {
    const auto scale = load_shared<Vector<float, 2>>(addresses.scales.at(stage));
#pragma unroll
    for (unsigned vector = 0; vector < 2; ++vector) {
#pragma unroll
      for (unsigned row = 0; row < 2; ++row) {
        const SharedAddress codes = addresses.vectors[vector].at(stage + row * kTileRowBytes);
        const auto words = load_shared<Vector<std::uint32_t, 4>>(codes);
#pragma unroll
        for (unsigned word = 0; word < 4; ++word) {
          const auto pair = table.pair_of_byte(words.at[word], addresses.t);
          float* const to = values + (vector * 4 + word) * 4 + row * 2;
          to[0] = pair.at[0] * scale.at[row];
          to[1] = pair.at[1] * scale.at[row];
        }
      }
    }
  }
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
  template <class Table>
  __device__ __forceinline__ static void decode(const Addresses& addresses, std::uint32_t stage, const Table& table,
                                                HopperValues& values) {
#pragma unroll
    for (unsigned row_pair = 0; row_pair < kGemmStep / 8; ++row_pair) {  // which are 8 rows apart
      const auto scale = load_shared<Vector<float, 2>>(addresses.scales.at(stage + row_pair * 8 * sizeof(float)));
#pragma unroll
      for (unsigned row = 0; row < 2; ++row) {
        const SharedAddress at = addresses.byte.at(stage + (row_pair * 8 + row) * kTileRowBytes);
        const auto pair = table.pair_of_byte(load_shared<std::uint8_t>(at), 0);
        float* const to = values + row_pair * 4 + row;
        to[0] = pair.at[0] * scale.at[row];
        to[2] = pair.at[1] * scale.at[row];
      }
    }
  }
};

}  // namespace qlora_native::QLN_CUDA
