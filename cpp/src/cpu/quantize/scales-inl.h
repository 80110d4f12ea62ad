// The scales of a weight's blocks, and their minima. NaN among them is canonical (primitives-inl.h), and so is NaN
// among a weight's values, since the levels of codes are finite.
#pragma once

#include <optional>
#include <type_traits>

#include "cpu/isa/utility-inl.h"
#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

// Blocks of some rows: `count` blocks of each, the first row's from block `first` on, and each other row's `row_blocks`
// after those of the row before.
struct BlocksOfRows {
  std::int64_t first, count, rows, row_blocks;
};

class ScaleDecoder {
 public:
  explicit ScaleDecoder(const QuantizedWeightView& w)
      : scales_{w.absmax, w.nested_absmax, w.offset != nullptr ? *w.offset : 0.0f},
        minima_{w.minimum, w.nested_minimum, -0.0f},  // adding -0 changes no bit
        zero_point_(w.zero_point),
        dtype_(w.scale_dtype),
        unit_(w.bits == 4                                ? Unit::one
              : w.byte_format == ByteFormat::e4m3        ? Unit::times_256
              : w.byte_format == ByteFormat::absmax_int8 ? Unit::over_127
                                                         : Unit::one),
        nested_code_(w.nested_code),
        // Without nested scales their blocksize may be any number.
        nesting_{w.nested_blocksize, w.nested_absmax != nullptr && (w.nested_blocksize & (w.nested_blocksize - 1)) == 0
                                         ? __builtin_ctz(static_cast<unsigned>(w.nested_blocksize))
                                         : -1},
        counts_up_(w.nested_code != nullptr && counts_up(w.nested_code)) {
    if (nested_code_ != nullptr && !counts_up_) table_.emplace(nested_code_);
  }

  // What a level of 1 is in each block, and the block's minimum unless `minima` is null. Both results have rows
  // `stride` floats apart.
  void decode(const BlocksOfRows& blocks, float* out, float* minima, std::int64_t stride) const {
    read(scales_, blocks, out, stride);
    if (minima != nullptr && minima_.data != nullptr) read(minima_, blocks, minima, stride);
    if (minima != nullptr && zero_point_ != nullptr)
      each_part(zero_point_, 1, blocks, stride, [&](const void* data, std::int64_t at, std::int64_t count) {
        const auto* const zero_point = static_cast<const std::int8_t*>(data);
        for (std::int64_t i = 0; i < count; ++i) minima[at + i] = -(static_cast<float>(zero_point[i]) * out[at + i]);
      });
    if (unit_ == Unit::one) return;
    for (std::int64_t row = 0; row < blocks.rows; ++row)
      for (std::int64_t i = row * stride; i < row * stride + blocks.count; ++i)
        out[i] = unit_ == Unit::over_127 ? out[i] / 127.0f : out[i] * 256.0f;
  }
  void prefetch(const BlocksOfRows& blocks) const {
    for (const Source& source : {scales_, minima_})
      if (source.data != nullptr)
        prefetch(blocks, source.data, source.nested == nullptr ? static_cast<std::int64_t>(size_of(dtype_)) : 1);
    if (zero_point_ != nullptr) prefetch(blocks, zero_point_, 1);
  }

 private:
  static constexpr std::int64_t kAtOnce = kTableVectors * kLanes;
  static constexpr std::int64_t kStaged = 512;  // scales of short rows that are decoded together
  // So many scales or fewer are looked up one by one, for the lookup of a vector goes through all of the table.
  static constexpr std::int64_t kMaxOneByOne = 4;

  // Scales, or minima: numbers of a dtype, or bytes if they have nested scales.
  struct Source {
    const void* data;
    const float* nested;
    float offset;
    const std::uint8_t* bytes() const { return static_cast<const std::uint8_t*>(data); }
  };
  // Which blocks have a nested scale together.
  struct Nesting {
    std::int64_t blocksize;
    int shift;  // -1 where the blocksize is no power of two. Those of this library and of bitsandbytes are.

    std::int64_t of(std::int64_t block) const { return shift >= 0 ? block >> shift : block / blocksize; }
    // The nested scale of each of the blocks first ... first+lanes-1.
    [[gnu::always_inline]] F32 of_lanes(const float* nested, std::int64_t first, int lanes) const {
      const std::int64_t begin = of(first);
      if (begin == of(first + lanes - 1)) return set1(nested[begin]);
      if (shift >= 0) {
        const int before = static_cast<int>(first - (begin << shift));
        return each_repeated(nested + begin, before, shift, lanes);
      }
      float each[kLanes] = {};
      for (int lane = 0; lane < lanes; ++lane) each[lane] = nested[of(first + lane)];
      return load(each);
    }
  };
  // What a scale is multiplied by: levels of E4M3 are divided by 256 (block_scales-inl.h).
  enum class Unit { one, over_127, times_256 };

  static void prefetch(const BlocksOfRows& blocks, const void* data, std::int64_t size) {
    const auto [first, count, rows, row_blocks] = blocks;
    const char* from = static_cast<const char*>(data) + first * size;
    for (std::int64_t row = 0; row < rows; ++row, from += row_blocks * size)
      for (std::int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i, 0, 2);
  }

  // Whether levels are integers, one after another, as those of GGUF's K-quants. They are computed, not looked up.
  static bool counts_up(const float* levels) {
    if (!(levels[0] >= -256.0f && levels[0] <= 0.0f)) return false;
    float expected[256];
    for (int i = 0; i < 256; ++i) expected[i] = static_cast<float>(static_cast<int>(levels[0]) + i);
    return __builtin_memcmp(levels, expected, sizeof(expected)) == 0;
  }

  void read(const Source& source, const BlocksOfRows& blocks, float* out, std::int64_t stride) const {
    if (source.nested != nullptr) return read_nested(source, blocks, out, stride);
    with_dtype(dtype_, [&](auto dtype) {
      constexpr auto kSize = static_cast<std::int64_t>(size_of(dtype()));
      each_part(source.data, kSize, blocks, stride, [&](const void* data, std::int64_t at, std::int64_t count) {
        const char* const from = static_cast<const char*>(data);
        std::int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
          store(out + at + i, canonical_nan(load_as_f32<dtype()>(from + i * kSize)));
        if (const int rest = static_cast<int>(count - i); rest > 0)
          store_from_f32<DType::f32>(out + at + i, canonical_nan(load_as_f32<dtype()>(from + i * kSize, rest)), rest);
      });
    });
  }
  // Calls f(data, place in the result, count) for what these blocks have in an array of `size` bytes for each block:
  // for each row, or, where short rows lie side by side in the result, for many rows whose parts are copied together.
  template <class F>
  static void each_part(const void* array, std::int64_t size, const BlocksOfRows& blocks, std::int64_t stride, F&& f) {
    const auto [first, count, rows, row_blocks] = blocks;
    const auto* const from = static_cast<const std::uint8_t*>(array) + first * size;
    if (count > kLanes / 4 || count != stride) {
      for (std::int64_t row = 0; row < rows; ++row) f(from + row * row_blocks * size, row * stride, count);
      return;
    }
    const std::int64_t together = kStaged / count;
    for (std::int64_t row = 0; row < rows; row += together) {
      const std::int64_t end = smaller(row + together, rows);
      std::uint8_t bytes[kStaged * sizeof(float)];
      copy_parts(from, size, blocks, {row, end}, bytes);
      f(bytes, row * count, (end - row) * count);
    }
  }

  void read_nested(const Source& source, const BlocksOfRows& blocks, float* out, std::int64_t stride) const {
    const auto [first, count, rows, row_blocks] = blocks;
    if (counts_up_) return read_counted(source, blocks, out, stride);
    if (count <= kMaxOneByOne) {
      for (std::int64_t row = 0; row < rows; ++row)
        read_one_by_one(source, first + row * row_blocks, count, out + row * stride);
      return;
    }
    if (count > kAtOnce / 2) {
      for (std::int64_t row = 0; row < rows; ++row)
        read_long(source, first + row * row_blocks, count, out + row * stride);
      return;
    }
    // All rows pass three loops: their bytes are copied, looked up, and scaled. In one loop each load would wait for
    // the parts that were just stored.
    const std::int64_t together = kStaged / count;
    for (std::int64_t row = 0; row < rows; row += together) {
      const std::int64_t end = smaller(row + together, rows);
      std::uint8_t bytes[kStaged] = {};
      copy_parts(source.bytes() + first, 1, blocks, {row, end}, bytes);
      float levels[kStaged + kLanes];
      for (std::int64_t i = 0; i < (end - row) * count; i += kAtOnce) {
        F32 values[kTableVectors];
        lookup_bytes(*table_, bytes + i, values);
        for (int k = 0; k < kTableVectors; ++k) store(levels + i + k * kLanes, values[k]);
      }
      for (std::int64_t r = row; r < end; ++r)
        for (std::int64_t i = 0; i < count; i += kLanes)
          store_scaled(source, load(levels + (r - row) * count + i), first + r * row_blocks + i, count - i,
                       out + r * stride + i);
    }
  }
  // Levels that count up need no table, so each row is decoded where it lies. What the loops read are copies, because
  // as far as the compiler knows a store might change the originals.
  void read_counted(Source source, BlocksOfRows blocks, float* out, std::int64_t stride) const {
    const Nesting nesting = nesting_;
    const F32 least = set1(nested_code_[0]);
    const auto put = [&](std::int64_t block, F32 nested, float* to, auto lanes) __attribute__((always_inline)) {
      const F32 levels = add(bytes_as_f32(source.bytes() + block, lanes), least);
      store_from_f32<DType::f32>(to, scaled(levels, nested, source.offset), lanes);
    };
    const std::int64_t whole = blocks.count / kLanes * kLanes;
    const int rest = static_cast<int>(blocks.count - whole);
    const auto each_row = [&](auto nested_of_vector) __attribute__((always_inline)) {
      for (std::int64_t row = 0; row < blocks.rows; ++row, blocks.first += blocks.row_blocks, out += stride) {
        for (std::int64_t i = 0; i < whole; i += kLanes)
          put(blocks.first + i, nested_of_vector(blocks.first + i), out + i, std::integral_constant<int, kLanes>());
        if (const std::int64_t block = blocks.first + whole; rest > 0)
          put(block, nesting.of_lanes(source.nested, block, rest), out + whole, rest);
      }
    };
    // Without a branch where each vector has one nested scale, or two as in K-quants of blocks of 32.
    const bool aligned = blocks.first % kLanes == 0 && (blocks.rows == 1 || blocks.row_blocks % kLanes == 0);
    if (aligned && nesting.shift >= 0 && 1 << nesting.shift >= kLanes)
      each_row([&](std::int64_t block) { return set1(source.nested[block >> nesting.shift]); });
    else if (aligned && nesting.shift == 3)
      each_row([&](std::int64_t block) { return scales_of_16(source.nested + (block >> 3)); });
    else
      each_row([&](std::int64_t block) { return nesting.of_lanes(source.nested, block, kLanes); });
  }
  [[gnu::always_inline]] void read_one_by_one(const Source& source, std::int64_t first, std::int64_t count,
                                              float* out) const {
    for (std::int64_t i = 0; i < count; ++i) {  // as scaled()
      const float scale =
          nested_code_[source.bytes()[first + i]] * source.nested[nesting_.of(first + i)] + source.offset;
      out[i] = scale == scale ? scale : __builtin_nanf("");
    }
  }
  void read_long(const Source& source, std::int64_t first, std::int64_t count, float* out) const {
    for (std::int64_t i = 0; i < count; i += kAtOnce) {
      F32 values[kTableVectors];
      lookup_bytes(*table_, source.bytes() + first + i, values, static_cast<int>(smaller(count - i, kAtOnce)));
      if (count - i >= kAtOnce && nesting_.of(first + i) == nesting_.of(first + i + kAtOnce - 1)) {
        const F32 nested = set1(source.nested[nesting_.of(first + i)]);
        for (int k = 0; k < kTableVectors; ++k) store(out + i + k * kLanes, scaled(values[k], nested, source.offset));
        continue;
      }
      for (int k = 0; k < kTableVectors && i + k * kLanes < count; ++k)
        store_scaled(source, values[k], first + i + k * kLanes, count - i - k * kLanes, out + i + k * kLanes);
    }
  }
  // Stores the values of blocks from `first` on, as many as there are lanes or `count`.
  void store_scaled(const Source& source, F32 levels, std::int64_t first, std::int64_t count, float* out) const {
    const int lanes = lanes_of(count);
    const F32 nested = nesting_.of_lanes(source.nested, first, lanes);
    store_from_f32<DType::f32>(out, scaled(levels, nested, source.offset), lanes);
  }
  // Two roundings, as bitsandbytes': not a fused multiply-add.
  static F32 scaled(F32 level, F32 nested, float offset) {
    return canonical_nan(add(mul(level, nested), set1(offset)));
  }
  // Copies what some rows of these blocks have in an array of `size` bytes for each block, side by side. `from` is
  // where the first of all blocks is.
  static void copy_parts(const std::uint8_t* from, std::int64_t size, const BlocksOfRows& blocks, Range rows,
                         std::uint8_t* to) {
    const std::int64_t bytes = blocks.count * size;
    for (std::int64_t r = rows.begin; r < rows.end; ++r, to += bytes)
      copy_bytes(from + r * blocks.row_blocks * size, bytes, to);
  }
  // For so few bytes a call of memcpy would take longer.
  static void copy_bytes(const std::uint8_t* from, std::int64_t count, std::uint8_t* to) {
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8) __builtin_memcpy(to + i, from + i, 8);
    for (; i < count; ++i) to[i] = from[i];
  }
  static int lanes_of(std::int64_t count) { return static_cast<int>(count < kLanes ? count : kLanes); }

  Source scales_, minima_;
  const std::int8_t* zero_point_;
  DType dtype_;  // of scales and minima that are no bytes
  Unit unit_;
  const float* nested_code_;
  Nesting nesting_;
  bool counts_up_;
  std::optional<Table256> table_;  // of the levels of nested scales, unless they count up
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
