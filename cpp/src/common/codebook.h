// The tables behind every format, each defined once: the 16 levels of nf4, fp4 and int4, the 8-bit dynamic maps, and
// the forms in which a quantizer searches them.
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

// Sixteen equal steps that include 0 and 1, as GGML's and GPTQ's symmetric formats have them.
inline constexpr std::array<float, 16> kInt4 = [] {
  std::array<float, 16> code{};
  for (int i = 0; i < 16; ++i) code[i] = static_cast<float>(i - 8) / 7.0f;
  return code;
}();

// bitsandbytes' create_dynamic_map(), bit for bit. The decade that ends at 10^(i-6) is split into equal intervals whose
// midpoints are the levels: 2^i of each sign, or 2^(i+1) without a sign; 0 and 1 complete the 256.
inline constexpr int kDecades = 7;
constexpr std::array<float, 256> make_dynamic_map(bool is_signed) {
  constexpr float decade[kDecades] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  std::array<float, 256> map{};
  int size = 0;
  for (int i = 0; i < kDecades; ++i) {
    const int intervals = is_signed ? 1 << i : 2 << i;
    const float step = (1.0f - 0.1f) / static_cast<float>(intervals);
    // torch.linspace(0.1, 1, intervals + 1): from the nearer end, a fused multiply-add an element. The double sum is
    // exact, so its conversion to float is the one rounding of the fma.
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

// The midpoints of neighbouring levels of an ascending map, each rounded down: for a float t, t > midpoints[i] then
// says exactly whether level i + 1 is nearer than level i (a tie: the lower). The last is infinite. Internal linkage:
// it is called where wider instructions are allowed.
static constexpr std::array<float, 256> midpoints_of(const float* map) {
  std::array<float, 256> midpoints{};
  for (int i = 0; i < 255; ++i) {
    const double exact = (double{map[i]} + double{map[i + 1]}) / 2.0;
    midpoints[i] = static_cast<float>(exact);
    if (double{midpoints[i]} > exact) {  // the next float below
      const auto bits = std::bit_cast<std::uint32_t>(midpoints[i]);
      midpoints[i] = std::bit_cast<float>(midpoints[i] > 0.0f ? bits - 1 : (bits | 0x80000000u) + 1);
    }
  }
  midpoints[255] = std::numeric_limits<float>::infinity();
  return midpoints;
}
inline constexpr std::array<float, 256> kDynamicMidpoints = midpoints_of(kDynamicMap.data());
inline constexpr std::array<float, 256> kUnsignedDynamicMidpoints = midpoints_of(kUnsignedDynamicMap.data());

// A 16-value codebook in ascending order, for a quantizer: the nearest level of t is the one whose index is the number
// of midpoints strictly below t (a tie takes the lower level), and order[index] is its code.
struct SortedCodebook {
  float value[16];
  float midpoint[15];  // (value[i] + value[i+1]) / 2 in fp32
  std::uint8_t order[16];
};

// Where code[c] comes among the 16, which may be in any order. Equal values stay in the order of their codes. So fp4's
// two zeros, whose midpoint is 0, split what is near 0 by sign as bitsandbytes' CPU quantizer does: t <= 0 becomes code
// 0, t > 0 code 8.
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

// The code of t: four comparisons would do, fifteen say what is meant.
constexpr std::uint8_t nearest_code(const SortedCodebook& codebook, float t) {
  int index = 0;
  for (float midpoint : codebook.midpoint) index += midpoint < t;
  return codebook.order[index];
}

// Where a quantizer begins to search: [-1, 1] in 31 equal buckets. A float's is in the lowest bits of
// fma(t, kPerUnit, kOrigin), and grows with t, rounding included: so a midpoint of a lower bucket than t's lies below
// t, one of a higher bucket does not, and those of t's own are compared. Of nf4 and int4 no two share one.
struct CodebookBuckets {
  static constexpr int kCount = 32;
  // Added to a float, it leaves the sum rounded to an integer in the lowest bits.
  static constexpr float kInteger = 0x1.8p23f;
  static constexpr float kPerUnit = 15.0f, kOrigin = kInteger + 16.0f;
};

// What a block's elements are multiplied by before the search. The floor keeps an all-zero block finite: it becomes
// the level of 0.
constexpr float inverse_absmax(float absmax) { return 1.0f / std::max(absmax, 1e-38f); }

}  // namespace qlora_native
