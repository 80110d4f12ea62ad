// The class of tile.h in plain C++, for any machine. Its results are the same bit for bit.
//
// TDPBF16PS (Intel's manual, volume 2) multiplies pairs of bfloat16. For each element of C the first elements of the
// pairs are summed in one fp32 chain and the second ones in another, both from zero; then their sum is added to C. A
// step of a chain is a fused multiply-add. Every operation rounds to nearest even; subnormal inputs are zero and
// subnormal results become zero, whatever the control register says.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace qlora_native::QLN_ISA {
namespace {

// A subnormal number becomes a zero of its sign.
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
// The two bfloat16 of a unit.
inline float first_of(float unit) { return flush(std::bit_cast<float>(std::bit_cast<std::uint32_t>(unit) << 16)); }
inline float second_of(float unit) {
  return flush(std::bit_cast<float>(std::bit_cast<std::uint32_t>(unit) & 0xFFFF0000u));
}

class Tiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tile_[kTile], 0, sizeof(tile_[kTile]));
  }
  template <int kTile>
  void load(const float* from, std::int64_t row) {
    for (int i = 0; i < 16; ++i) std::memcpy(tile_[kTile][i], from + i * row, 64);
  }
  template <int kTile>
  void load_once(const float* from, std::int64_t row) {
    load<kTile>(from, row);
  }
  template <int kTile>
  void store(float* to, std::int64_t row) {
    for (int i = 0; i < 16; ++i) std::memcpy(to + i * row, tile_[kTile][i], 64);
  }
  template <int kC, int kA, int kB>
  void multiply() {
    for (int m = 0; m < 16; ++m) {
      float first[16] = {}, second[16] = {};
      for (int k = 0; k < 16; ++k) {
        const float a0 = first_of(tile_[kA][m][k]), a1 = second_of(tile_[kA][m][k]);
        for (int n = 0; n < 16; ++n) {
          first[n] = flush(std::fma(a0, first_of(tile_[kB][k][n]), first[n]));
          second[n] = flush(std::fma(a1, second_of(tile_[kB][k][n]), second[n]));
        }
      }
      for (int n = 0; n < 16; ++n) {
        float& c = tile_[kC][m][n];
        c = flush(flush(c) + flush(first[n] + second[n]));
      }
    }
  }

 private:
  float tile_[8][16][16];
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
