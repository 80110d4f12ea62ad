// The tables of the formats: the 16 levels of nf4, fp4 and int4, the 8-bit dynamic maps, and the sorted forms that a
// quantizer searches. Each table is defined only here.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>

namespace qlora_native {

// Quantiles of a normal distribution (QLoRA, appendix E); level 7 is 0.
inline constexpr std::array<float, 16> kNf4 = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// bitsandbytes' 4-bit float in bit-pattern order: bit 3 is the sign, so code 8 is a second zero.
inline constexpr std::array<float, 16> kFp4 = [] {
  constexpr float magnitude[8] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f};
  std::array<float, 16> code{};
  for (int i = 0; i < 8; ++i) {
    code[i] = magnitude[i] / 12.0f;
    code[8 + i] = -code[i];
  }
  code[8] = 0.0f;  // bitsandbytes' table has no negative zero
  return code;
}();

// Sixteen equally spaced levels that include 0 and 1, like the symmetric formats of GGML and GPTQ.
inline constexpr std::array<float, 16> kInt4 = [] {
  std::array<float, 16> code{};
  for (int i = 0; i < 16; ++i) code[i] = static_cast<float>(i - 8) / 7.0f;
  return code;
}();

// bitsandbytes' create_dynamic_map(), bit for bit. The decade that ends at 10^(i-6) is divided into equal intervals,
// whose midpoints are the levels. A signed map has 2^i intervals for each sign, an unsigned one 2^(i+1). The values 0
// and 1 complete the 256.
inline constexpr int kDecades = 7;
constexpr std::array<float, 256> make_dynamic_map(bool is_signed) {
  constexpr float decade[kDecades] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  std::array<float, 256> map{};
  int size = 0;
  for (int i = 0; i < kDecades; ++i) {
    const int intervals = is_signed ? 1 << i : 2 << i;
    const float step = (1.0f - 0.1f) / static_cast<float>(intervals);
    // torch.linspace(0.1, 1, intervals + 1) computes each element from the nearer end by one fused multiply-add. Here
    // the sum in double is exact, so its conversion to float is the only rounding, as in the fma.
    const auto boundary = [&](int j) {
      return j < (intervals + 1) / 2 ? static_cast<float>(double{0.1f} + double{step} * j)
                                     : static_cast<float>(1.0 - double{step} * (intervals - j));
    };
    for (int j = 0; j < intervals; ++j) {
      const float level = decade[i] * ((boundary(j) + boundary(j + 1)) / 2.0f);
      map[size++] = level;
      if (is_signed) map[size++] = -level;
    }
  }
  map[size++] = 0.0f;
  map[size++] = 1.0f;
  std::sort(map.begin(), map.end());
  return map;
}
inline constexpr std::array<float, 256> kDynamicMap = make_dynamic_map(true);
inline constexpr std::array<float, 256> kUnsignedDynamicMap = make_dynamic_map(false);

// The midpoints of adjacent levels of an ascending map, each rounded down. So for any float t, t > midpoints[i]
// says exactly whether level i + 1 is nearer than level i; if both are equally near, the lower level wins. The last
// midpoint is infinite. The function is static because files that are compiled for wider instructions call it: the
// linker must not share their copies.
static constexpr std::array<float, 256> midpoints_of(const float* map) {
  std::array<float, 256> midpoints{};
  for (int i = 0; i < 255; ++i) {
    const double exact = (double{map[i]} + double{map[i + 1]}) / 2.0;
    midpoints[i] = static_cast<float>(exact);
    if (double{midpoints[i]} > exact) {  // take the next float below
      const auto bits = std::bit_cast<std::uint32_t>(midpoints[i]);
      midpoints[i] = std::bit_cast<float>(midpoints[i] > 0.0f ? bits - 1 : (bits | 0x80000000u) + 1);
    }
  }
  midpoints[255] = std::numeric_limits<float>::infinity();
  return midpoints;
}
inline constexpr std::array<float, 256> kDynamicMidpoints = midpoints_of(kDynamicMap.data());
inline constexpr std::array<float, 256> kUnsignedDynamicMidpoints = midpoints_of(kUnsignedDynamicMap.data());

// A 16-value codebook in ascending order, for a quantizer. The index of the level nearest to t is the number of
// midpoints strictly below t (so a tie takes the lower level), and order[index] is the code of that level.
struct SortedCodebook {
  float value[16];
  float midpoint[15];  // (value[i] + value[i+1]) / 2 in fp32
  std::uint8_t order[16];
};

// The place of code[c] among the 16 values in ascending order; `code` may be in any order. Equal values stay in the
// order of their codes. So the two zeros of fp4, whose midpoint is 0, divide values near 0 by their sign, as
// bitsandbytes' CPU quantizer does: t <= 0 becomes code 0, and t > 0 becomes code 8.
constexpr int place_of_code(const float* code, int c) {
  int place = 0;
  for (int i = 0; i < 16; ++i) place += code[i] < code[c] || (code[i] == code[c] && i < c);
  return place;
}
constexpr float midpoint_of(float level, float next) { return (level + next) / 2.0f; }
constexpr SortedCodebook sort_codebook(const float* code) {
  SortedCodebook sorted{};
  for (int c = 0; c < 16; ++c) {
    const int place = place_of_code(code, c);
    sorted.value[place] = code[c];
    sorted.order[place] = static_cast<std::uint8_t>(c);
  }
  for (int i = 0; i < 15; ++i) sorted.midpoint[i] = midpoint_of(sorted.value[i], sorted.value[i + 1]);
  return sorted;
}

// The code of t. Four comparisons would be enough, but fifteen are easier to read.
constexpr std::uint8_t nearest_code(const SortedCodebook& codebook, float t) {
  int index = 0;
  for (float midpoint : codebook.midpoint) index += midpoint < t;
  return codebook.order[index];
}

// Divides [-1, 1] into 31 equal buckets, so that a quantizer knows where to begin its search. The bucket of t is in the
// lowest bits of fma(t, kPerUnit, kOrigin). It never falls as t grows, even with rounding. So a midpoint in a lower
// bucket than that of t lies below t, a midpoint in a higher bucket does not, and only midpoints in the same bucket
// have to be compared with t. In nf4 and int4 no two midpoints share a bucket.
struct CodebookBuckets {
  static constexpr int kCount = 32;
  // The sum of a float and this has the float, rounded to an integer, in its lowest bits.
  static constexpr float kInteger = 0x1.8p23f;
  static constexpr float kPerUnit = 15.0f, kOrigin = kInteger + 16.0f;
};

// The elements of a block are multiplied by this before the search. The lower bound of absmax keeps the result finite
// for an all-zero block, whose elements become the level of 0.
constexpr float inverse_absmax(float absmax) { return 1.0f / std::max(absmax, 1e-38f); }

}  // namespace qlora_native
