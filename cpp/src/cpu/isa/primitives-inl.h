// What an instruction set provides: the names over which all algorithms are written. A folder's simd.h and tables
// define them, in QLN_ISA's namespace, and this file says once what they mean and checks that they are all there.
//
// Constants:
//
//   kLanes                lanes of an F32
//   kRegisters            vector registers
//   kMaxStripVectors      vectors of X in a strip, at most
//   kRowsOfStrip[w]       rows of W that a register tile takes of a strip of w vectors
//   kMaxStripRows         rows of dY in a register tile, at most
//   kColumnStep           vectors of columns of W in a register tile
//   kRowsOfDecodingStrip, kDecodingColumnStep   the same of a tile that decodes the next panel meanwhile
//   kNibbleVectors        vectors that one lookup_nibbles() fills
//   kTableVectors         vectors that one lookup in a Table256 fills
//   kLanes64              lanes of a U64
#pragma once

#include <concepts>
#include <cstdint>

#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

// The types, together: a vector is no argument of a concept.
struct Vectors {
  using Float = F32;  // kLanes floats, or units of 32 bits that a product takes apart itself
  using Int = I32;    // kLanes integers
  using Long = U64;   // kLanes64 integers of 64 bits
  // Arguments of these types let a concept name functions that only some sets have.
  using Element = float;
  using Byte = std::uint8_t;
  using Number = int;
};

template <class T, class V>
concept FloatOf = std::same_as<T, typename V::Float>;
template <class T, class V>
concept IntOf = std::same_as<T, typename V::Int>;
template <class T, class V>
concept LongOf = std::same_as<T, typename V::Long>;

// What the products of many rows need. The tiles in plain C++ (portable/) have it, and what attention needs.
template <class V>
concept ProductPrimitives =
    requires(typename V::Float x, typename V::Float y, typename V::Float z, typename V::Long n, const float* from,
             float* to, const void* elements, void* out, const std::uint8_t* bytes, typename V::Float (&square)[kLanes],
             Table16 table, LevelTable levels, typename V::Float (&looked_up)[kNibbleVectors], const Table256& table256,
             typename V::Float (&values)[kTableVectors]) {
      { zero() } -> FloatOf<V>;
      { set1(1.0f) } -> FloatOf<V>;
      { load(from) } -> FloatOf<V>;
      store(to, x);
      { add(x, y) } -> FloatOf<V>;
      { mul(x, y) } -> FloatOf<V>;
      { fma(x, y, z) } -> FloatOf<V>;  // x * y + z, rounded once

      // Elements of a dtype, as many as lanes or `count`: the lanes after them are zero, or are not stored. Rounding is
      // to nearest even, and a NaN stays one if it is quiet, as each operation leaves it.
      { round_to<DType::bf16>(x) } -> FloatOf<V>;
      // The same of a weight's value, which is rounded for each weight or each block: NaN stays one if it is canonical.
      { round_value<DType::bf16>(x) } -> FloatOf<V>;
      { canonical_nan(x) } -> FloatOf<V>;  // NaN as the quiet one without a payload, and all else as it is
      { load_as_f32<DType::bf16>(elements) } -> FloatOf<V>;
      { load_as_f32<DType::bf16>(elements, 1) } -> FloatOf<V>;
      store_from_f32<DType::bf16>(out, x);
      store_from_f32<DType::bf16>(out, x, 1);
      // 2 * kLanes adjacent elements, the even ones in x and the odd ones in y. Stored are values that the dtype has,
      // with `true` by a non-temporal store if the instruction set has one.
      load_pairs<DType::bf16>(elements, x, y);
      store_pairs<DType::bf16, true>(out, x, y);
      end_stream();            // after non-temporal stores: until then other threads may see them late
      interleave(x, y, x, y);  // the even and the odd ones -> natural order
      transpose(square);       // lane j of vector i <-> lane i of vector j

      // A table of 16 floats, looked up by the low four bits of each lane.
      { table16(from) } -> std::same_as<Table16>;
      {
        map_table(table, [](F32 level) { return level; })
      } -> std::same_as<Table16>;  // f(level) of each level
      // The same as lookup_nibbles() takes it, rounded, and the codes of consecutive bytes.
      { level_table<DType::bf16>(table) } -> std::same_as<LevelTable>;
      lookup_nibbles<DType::bf16>(levels, high_nibbles(bytes), looked_up);
      lookup_nibbles<DType::bf16>(levels, low_nibbles(bytes), looked_up);
      // The scale of every lane of an even or an odd vector (dot_f32-inl.h), whose elements lie in blocks of 16.
      { scales_of_16(from) } -> FloatOf<V>;
      load_signed_byte_pairs(bytes, x, y);  // the even and the odd ones of 2 * kLanes
      load_e4m3_pairs(bytes, x, y);         // the same of FP8 E4M3, divided by 256

      // Bit i of a mask stands for lane i. Lanes without their bit become 0; every_second_bit() takes the even bits, or
      // from bit 1 on the odd ones; blend_from() takes lane i from y where bytes[i] is at least the boundary.
      { mask_lanes(x, std::uint32_t{}) } -> FloatOf<V>;
      { every_second_bit(std::uint64_t{}, 1) } -> std::same_as<std::uint32_t>;
      { blend_from(x, y, bytes, 1) } -> FloatOf<V>;

      // A table of 256 floats. Lanes after `count` bytes have what stands at 0.
      Table256(from);
      lookup_bytes(table256, bytes, values);
      lookup_bytes(table256, bytes, values, 1);
      { bytes_as_f32(bytes) } -> FloatOf<V>;     // kLanes numbers without a sign
      { bytes_as_f32(bytes, 1) } -> FloatOf<V>;  // so many of them, and zeros
      // Lane i has from[(5 + i) >> 2], for the first lanes; the others have anything.
      { each_repeated(from, 5, 2, 1) } -> FloatOf<V>;

      // Philox's counters (dropout-inl.h). at_least_u16(): the low halves of four vectors have each counter's four
      // words, which are eight numbers of 16 bits; bit 8 * lane + i says whether number i reaches the threshold.
      { set1_u64(std::uint64_t{}) } -> LongOf<V>;
      { iota_u64() } -> LongOf<V>;
      { add_u64(n, n) } -> LongOf<V>;
      { xor_u64(n, n) } -> LongOf<V>;
      { mul_u32(n, n) } -> LongOf<V>;  // of the low halves
      { high_u32(n) } -> LongOf<V>;
      { at_least_u16(n, n, n, n, std::uint32_t{}) } -> std::same_as<std::uint64_t>;
    };

// What all else needs besides: small_m, quantize, cross_entropy and the optimizers.
template <class V>
concept Primitives =
    ProductPrimitives<V> &&
    requires(typename V::Float x, typename V::Float y, typename V::Int i, typename V::Int j,
             const typename V::Element* from, typename V::Element* to, typename V::Byte* bytes,
             typename V::Number number, const typename V::Float (&four)[4],
             const typename V::Float (&floats)[kTableVectors], const typename V::Int (&ints)[kTableVectors],
             Table16 table, const Table256& table256, typename V::Float (&looked_up)[kTableVectors]) {
      // If y is NaN, so is the larger or the smaller of x and y.
      { max(x, y) } -> FloatOf<V>;
      { min(x, y) } -> FloatOf<V>;
      { abs(x) } -> FloatOf<V>;
      { max_abs(x, y) } -> FloatOf<V>;  // the larger of |x| and |y|
      { divide(x, y) } -> FloatOf<V>;
      { square_root(x) } -> FloatOf<V>;
      { with_sign_of(x, y) } -> FloatOf<V>;  // x >= 0, with the sign of y
      { in_register(x) } -> FloatOf<V>;      // x, which the compiler does not load again for each of its uses
      { reduce_max(x) } -> std::same_as<float>;
      { reduce_add(x) } -> std::same_as<float>;  // in a fixed order
      store_sums(to, four);                      // the sum of the lanes of each of the four

      { set1_i32(number) } -> IntOf<V>;
      { add_i32(i, j) } -> IntOf<V>;
      { max_i32(i, j) } -> IntOf<V>;
      { reduce_max_i32(i) } -> std::same_as<int>;
      { shift_left<1>(i) } -> IntOf<V>;
      { shift_right<1>(i) } -> IntOf<V>;  // fills with zeros
      { as_i32(x) } -> IntOf<V>;          // the same bits
      { as_f32(i) } -> FloatOf<V>;
      { round_to_i32(x) } -> IntOf<V>;  // to nearest even
      { truncate_to_i32(x) } -> IntOf<V>;
      { min_u16(i, j) } -> IntOf<V>;                       // of 16-bit numbers
      { any_low_half_below(i, 1) } -> std::same_as<bool>;  // of the low 16 bits of the lanes, unsigned
      { add_where_above(i, x, y, 1) } -> IntOf<V>;         // i + 1 where x > y

      // Tables of 16 by the low four bits of each lane, and of 32 by the low five.
      { lookup(table, i) } -> FloatOf<V>;
      { lookup(table32(from), i) } -> FloatOf<V>;

      // Lanes as consecutive bytes; pairs of nibbles (i << 4 | j); bytes of i and of j alternately.
      store_bytes(bytes, i);
      store_nibble_pairs(bytes, i, j);
      store_byte_pairs(bytes, i, j);

      // Codes of kTableVectors vectors. Stored are: what they stand for in a table of 256; the codes,
      // plus one where floats > looked_up; the upper halves of ints; or a middle plus these halves,
      // minus where floats are negative, at least 0.
      lookup(table256, pack(ints), looked_up);
      store_codes(bytes, pack(ints), floats, looked_up);
      store_high_halves(bytes, ints);
      store_high_halves_around(bytes, 127, ints, floats);
    };

static_assert(ProductPrimitives<Vectors>);

}  // namespace
}  // namespace qlora_native::QLN_ISA
