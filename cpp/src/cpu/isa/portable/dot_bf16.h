// Pairs of bfloat16 for tile products in plain C++. Chunks have the layout of avx512/dot_bf16.h, and the same bits.
#pragma once

#include "cpu/isa/portable/simd.h"

#include "cpu/isa/dot_f32-inl.h"

#include "cpu/isa/amx/tile_emulated.h"

namespace qlora_native::QLN_ISA {
namespace {

struct DotBf16 {
  static constexpr DType kActivation = DType::bf16;
  static constexpr int kElementsPerUnit = 2;
  static constexpr int kUnits = kChunk / kElementsPerUnit;
  static constexpr int kVectors = kUnits / kLanes;
  static constexpr std::int64_t kRestart = 1024;
  static constexpr std::int64_t kBlock = 1024;

  struct Chunk {
    F32 v[kVectors];
  };
  using Table = Table16;

  template <class Scales>
  static Table table(Table16 code, const Scales& scales) {
    return map_table(values_of(code, scales, 0), round_to<DType::bf16>);
  }

  template <bool kOdd>
  static Chunk decode4(const std::uint8_t* bytes, Table table) {
    return make_chunk([&](int e) {
      const int nibble = kOdd ? e + 1 : e;
      return table.level[nibble % 2 == 0 ? bytes[nibble / 2] >> 4 : bytes[nibble / 2] & 15];
    });
  }
  template <class Scales>
  static void decode4_two(const std::uint8_t* const (&bytes)[2], Table16 code, const Scales (&scales)[2],
                          Chunk (&chunk)[2]) {
    for (int i = 0; i < 2; ++i) chunk[i] = decode4<false>(bytes[i], table(code, scales[i]));
  }
  template <int kScales, class Scales>
  static Chunk decode4_blocks(const std::uint8_t* bytes, Table16 code, const Scales& scales) {
    return make_chunk([&](int e) {
      const int nibble = e % 2 == 0 ? bytes[e / 2] >> 4 : bytes[e / 2] & 15;
      return scales.of_level(code.level[nibble], e * kScales / kChunk);
    });
  }
  template <CodeKind kCodes, int kScales, class Scales>
  static Chunk decode8(const std::uint8_t* bytes, const Scales& scales) {
    return make_chunk([&](int e) {
      const float level =
          kCodes == CodeKind::e4m3 ? e4m3_over_256(bytes[e]) : static_cast<float>(static_cast<std::int8_t>(bytes[e]));
      return scales.of_level(level, e * kScales / kChunk);
    });
  }

  // There are no steps, because tiles multiply any number of rows.
  static constexpr int kStepChunks = 1;
  struct Step {};
  template <int, class>
  using Step4 = Step;
  template <CodeKind, int, class>
  using Step8 = Step;

  template <DType kFrom>
  static Chunk dense(const void* p, float scale) {
    return make_chunk([&](int e) { return load_lane<kFrom>(p, e) * scale; });
  }
  // A natural chunk has its elements in order, and vector 0 has the first half of them.
  template <DType kFrom>
  static Chunk dense_natural(const void* p, float scale, int count) {
    return make_natural([&](int e) { return e < count ? load_lane<kFrom>(p, e) * scale : 0.0f; });
  }
  static Chunk natural(const F32 (&values)[kChunk / kLanes]) {
    return make_natural([&](int e) { return values[e / kLanes].lane[e % kLanes]; });
  }

  static Chunk blend(const Chunk& a, const Chunk& b, int boundary) {
    return select([&](int e) { return element(e < boundary ? a : b, e); });
  }
  static void mask(Chunk& chunk, std::uint64_t bits) {
    const Chunk all = chunk;
    chunk = select([&](int e) { return bits >> e & 1 ? element(all, e) : std::uint16_t{0}; });
  }

  // For dX columns are in their natural order.
  static constexpr int kColumnVectors = 4;
  struct Columns {
    F32 v[kColumnVectors];
  };
  static Columns columns(const Chunk& n0, const Chunk& n1) {
    return make_columns([&](int e) { return unit(element(n0, e), element(n1, e)); });
  }
  static Columns columns_natural(const Chunk& n0, const Chunk& n1) {
    return make_columns([&](int e) { return unit(element_natural(n0, e), element_natural(n1, e)); });
  }
  static void to_natural(F32 (&)[kColumnVectors]) {}
  static F32 mask_columns(F32 accumulators, int vector, std::uint64_t bits) {
    return mask_lanes(accumulators, static_cast<std::uint32_t>(bits >> (vector * kLanes)));
  }

 private:
  static float unit(std::uint16_t first, std::uint16_t second) {
    return std::bit_cast<float>(std::uint32_t{second} << 16 | first);
  }
  // This rounds as AVX512_BF16 does: to nearest even, and subnormal numbers to zero.
  static std::uint16_t rounded(float x) { return bf16_from_f32(flush(x)); }

  // Element e of a chunk, whose vectors hold the even and the odd ones.
  static std::uint16_t element(const Chunk& chunk, int e) { return half(chunk.v[e % 2].lane[e / 4], e / 2 % 2); }
  static std::uint16_t element_natural(const Chunk& chunk, int e) {
    return half(chunk.v[e / (2 * kLanes)].lane[e % (2 * kLanes) / 2], e % 2);
  }
  static std::uint16_t half(float unit, int upper) {
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(unit) >> (16 * upper));
  }
  // The chunk whose element e is bits(e), or value(e) rounded.
  template <class F>
  static Chunk select(F&& bits) {
    Chunk chunk;
    for (int odd = 0; odd < 2; ++odd)
      chunk.v[odd] = each_lane([&](int lane) { return unit(bits(4 * lane + odd), bits(4 * lane + 2 + odd)); });
    return chunk;
  }
  template <class F>
  static Chunk make_chunk(F&& value) {
    return select([&](int e) { return rounded(value(e)); });
  }
  template <class F>
  static Chunk make_natural(F&& value) {
    Chunk chunk;
    for (int i = 0; i < kVectors; ++i)
      chunk.v[i] = each_lane([&](int lane) {
        const int e = 2 * (i * kLanes + lane);
        return unit(rounded(value(e)), rounded(value(e + 1)));
      });
    return chunk;
  }
  template <class F>
  static Columns make_columns(F&& units) {
    Columns result;
    for (int i = 0; i < kColumnVectors; ++i)
      result.v[i] = each_lane([&](int lane) { return units(i * kLanes + lane); });
    return result;
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
