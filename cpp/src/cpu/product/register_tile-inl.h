// The product of some rows and some vectors whose accumulators are in registers, and what is done meanwhile: a part of
// another panel is decoded, and what is multiplied next is prefetched. It is for vectors what tiles-inl.h is for tiles.
#pragma once

#include <type_traits>

#include "cpu/isa/dot_f32-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// Stands for a decoder where a panel is multiplied and no other one is decoded.
struct NoDecoder {
  void step() {}
};

// Rows that lie `stride` floats apart. A stride that is known beforehand is a FixedStride, which takes no register.
template <class Pointer, class Stride>
struct Strided {
  Pointer data;
  [[no_unique_address]] Stride stride;
};
template <class Pointer, class Stride>
Strided(Pointer, Stride) -> Strided<Pointer, Stride>;
template <std::int64_t kFloats>
using FixedStride = std::integral_constant<std::int64_t, kFloats>;
template <class Stride>
constexpr bool kIsFixed = !std::is_same_v<Stride, std::int64_t>;

// A register tile: the accumulators of kRows rows times kVectors vectors over some units, and its slice of another
// panel's decoding.
//
//   rows           [row][unit]: a unit is broadcast, times all vectors
//   vectors        [unit][vector][lane]
//   accumulators   [row][vector][lane]; with `accumulate` these are added to what is there
//
// With kChain the accumulators go on from what is there; else they are added to it in the end. A step of decoding comes
// before every kDecodingUnits units, and a step of `ahead` before each.
template <class Dot, int kRows, int kVectors, bool kChain, std::int64_t kDecodingUnits, class RowStride,
          class UnitStride, class AccumulatorStride, class Ahead, class Decoding>
[[gnu::noinline]] void multiply_register_tile(Strided<const float*, RowStride> rows,
                                              Strided<const float*, UnitStride> vectors, std::int64_t units,
                                              Strided<float*, AccumulatorStride> accumulators, bool accumulate,
                                              Ahead ahead, Decoding& decoding) {
  F32 accumulator[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      accumulator[i][j] =
          kChain && accumulate ? load(accumulators.data + i * accumulators.stride + j * kLanes) : zero();
  const auto multiply = [&](std::int64_t unit) {
    ahead.prefetch(unit);
    // A fixed stride takes its part in an address; another one would be a multiplication.
    const float* vectors_of_unit = vectors.data;
    if constexpr (kIsFixed<UnitStride>)
      vectors_of_unit += unit * vectors.stride;
    else
      vectors.data += vectors.stride;
    F32 vector[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) vector[j] = load(vectors_of_unit + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float* unit_of_row = rows.data + i * rows.stride + unit;
      if constexpr (kVectors == 1) {
        accumulator[i][0] = Dot::dot_broadcast(accumulator[i][0], vector[0], unit_of_row);
      } else {
        const auto value = Dot::broadcast(unit_of_row);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) accumulator[i][j] = Dot::dot(accumulator[i][j], vector[j], value);
      }
    }
  };
  std::int64_t unit = 0;
  if constexpr (!std::is_same_v<Decoding, NoDecoder>)
    for (; unit + kDecodingUnits <= units; unit += kDecodingUnits) {
      decoding.step();
      for (std::int64_t i = 0; i < kDecodingUnits; ++i) multiply(unit + i);
    }
  for (; unit < units; ++unit) multiply(unit);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* out = accumulators.data + i * accumulators.stride + j * kLanes;
      store(out, accumulate && !kChain ? add(load(out), accumulator[i][j]) : accumulator[i][j]);
    }
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
