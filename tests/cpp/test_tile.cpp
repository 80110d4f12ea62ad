// Guards the tile product of AMX-BF16, for the tiles of QLN_TILE_HEADER. The tiles in plain C++, and the processor's if
// it has any, follow the definition (Intel's manual, TDPBF16PS) bit for bit.
#include QLN_TILE_HEADER

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "common/float16.h"
#include "expect.h"
#include "qlora_native/runtime.h"

namespace qn = qlora_native;

namespace {

float unit(float first, float second) {
  return std::bit_cast<float>(std::uint32_t{qn::bf16_from_f32(second)} << 16 | qn::bf16_from_f32(first));
}

struct Operands {
  static constexpr int kRow = 24;  // floats from one row to the next, more than a tile has
  std::vector<float> a = std::vector<float>(16 * kRow, 0.0f), b = a, c = a;
  void set_a(int m, int k, float first, float second) { a[m * kRow + k] = unit(first, second); }
  void set_b(int k, int n, float first, float second) { b[k * kRow + n] = unit(first, second); }

  float at(int m, int n) const { return c[m * kRow + n]; }
  void multiply() {
    qn::QLN_ISA::Tiles tiles;
    tiles.load<3>(c.data(), kRow);
    tiles.load_once<4>(a.data(), kRow);
    tiles.load<7>(b.data(), kRow);
    tiles.multiply<3, 4, 7>();
    tiles.store<3>(c.data(), kRow);
  }
};

TEST(every_element_is_a_row_times_a_column) {
  Operands o;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      o.set_a(i, j, static_cast<float>(i - j), static_cast<float>(i + 2 * j));
      o.set_b(i, j, static_cast<float>(i * j % 7), static_cast<float>(3 - i));
      o.c[i * Operands::kRow + j] = static_cast<float>(100 * i + j);
    }
  const std::vector<float> before = o.c;
  o.multiply();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum = before[m * Operands::kRow + n];  // all numbers are integers, which fp32 adds exactly
      for (int k = 0; k < 16; ++k) sum += static_cast<float>((m - k) * (k * n % 7) + (m + 2 * k) * (3 - k));
      EXPECT(o.at(m, n) == sum);
    }
  for (int m = 0; m < 16; ++m)  // memory between rows is not touched
    for (int n = 16; n < Operands::kRow; ++n) EXPECT(o.c[m * Operands::kRow + n] == before[m * Operands::kRow + n]);
}

// The first elements of pairs are summed in one chain, which begins with zero, and the second elements in another. Then
// the two chains are added, and only then C. A step of a chain rounds once.
TEST(chains_are_summed_apart_and_then_added_to_c) {
  const float large = 0x1p24f, x = 1.0078125f;  // 1 + 2^-7, whose square has 15 bits
  Operands o;
  o.set_a(0, 0, large, -large);  // in a single chain these would cancel, and all of the later sum would be kept
  o.set_a(0, 1, 1.0f, 1.0f);
  o.set_a(1, 2, 1.0f, 1.0f);
  o.set_a(2, 3, 0x1p10f, 0.0f);  // 2^10 + x^2 ends below fp32's last bit
  o.set_a(2, 4, x, 0.0f);
  o.set_b(0, 0, 1.0f, 1.0f);
  o.set_b(1, 0, 1.0f, 1.0f);
  o.set_b(2, 1, 1.0f, 1.0f);
  o.set_b(3, 2, 1.0f, 0.0f);
  o.set_b(4, 2, x, 0.0f);
  o.c[Operands::kRow + 1] = large;
  o.multiply();
  EXPECT(o.at(0, 0) == 1.0f);          // 2^24 + 1 is a tie that goes to 2^24; -2^24 + 1 is exact
  EXPECT(o.at(1, 1) == large + 2.0f);  // adding 1 to C twice would be a tie each time
  EXPECT(o.at(2, 2) == std::fma(x, x, 0x1p10f) && o.at(2, 2) == static_cast<float>(0x1p10 + double{x} * x));
}

TEST(subnormal_numbers_count_as_zero) {
  const float subnormal = 0x1p-127f, smallest = FLT_MIN;
  Operands o;
  o.set_a(0, 0, subnormal, 0.0f);  // an input is subnormal
  o.set_b(0, 0, 0x1p100f, 0.0f);
  o.set_a(1, 0, smallest, 0.0f);  // a product is subnormal
  o.set_b(0, 1, 0.5f, 0.0f);
  o.set_a(2, 0, smallest, smallest);  // the sum of two chains is subnormal
  o.set_b(0, 2, 2.0f, -1.5f);
  o.c[3 * Operands::kRow + 3] = subnormal;  // C is subnormal
  o.multiply();
  EXPECT(o.at(0, 0) == 0.0f && o.at(1, 1) == 0.0f && o.at(2, 2) == 0.0f && o.at(3, 3) == 0.0f);
}

TEST(infinities_and_nan_pass) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Operands o;
  o.set_a(0, 0, kInfinity, 0.0f);
  o.set_b(0, 0, 1.0f, 0.0f);
  o.set_a(1, 0, kInfinity, kInfinity);
  o.set_b(0, 1, 1.0f, -1.0f);
  o.set_a(2, 5, NAN, 0.0f);
  o.set_a(3, 0, FLT_MAX, 0.0f);
  o.set_b(0, 3, 2.0f, 0.0f);
  o.multiply();
  EXPECT(o.at(0, 0) == kInfinity && std::isnan(o.at(1, 1)) && std::isnan(o.at(2, 9)) && o.at(3, 3) == kInfinity);
}

TEST(zeroed_tiles_are_zero) {
  Operands o;
  o.c.assign(o.c.size(), 5.0f);
  qn::QLN_ISA::Tiles tiles;
  tiles.load<0>(o.c.data(), Operands::kRow);
  tiles.zero<0>();
  tiles.store<0>(o.c.data(), Operands::kRow);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) EXPECT(o.at(m, n) == 0.0f);
}

// Products of random bits, including subnormal numbers, have one expected hash, for the tiles in plain C++ and for
// those of the processor.
TEST(random_products_have_the_expected_bits) {
  std::uint64_t state = 1, hash = 0xcbf29ce484222325;  // FNV-1a
  const auto random = [&] { return static_cast<std::uint32_t>((state = state * 6364136223846793005u + 1) >> 32); };
  for (int repeat = 0; repeat < 50; ++repeat) {
    Operands o;
    for (auto* matrix : {&o.a, &o.b})
      for (float& value : *matrix) {
        std::uint32_t bits = random();
        if (repeat % 2 == 0) bits = (bits & 0x87FF87FFu) | 0x38003800u;                          // similar exponents
        if (((bits >> 23) & 0xFF) == 0xFF || ((bits >> 7) & 0xFF) == 0xFF) bits &= 0xBFFFBFFFu;  // no NaN
        value = std::bit_cast<float>(bits);
      }
    o.multiply();
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        const float value = o.at(m, n);
        const std::uint32_t bits = std::isnan(value) ? 0x7FC00000u : std::bit_cast<std::uint32_t>(value);
        hash = (hash ^ bits) * 0x100000001b3;
      }
  }
  EXPECT(hash == QLN_TILE_HASH);
  if (hash != QLN_TILE_HASH) std::printf("  hash 0x%016llx\n", static_cast<unsigned long long>(hash));
}

}  // namespace

int main(int count, char** arguments) {
  // The processor's own tiles are tested only if the library has found and enabled them.
  if (count > 1) {
    bool found = false;
    for (const std::string& isa : qn::available_isas()) found |= isa == arguments[1];
    if (!found) {
      std::printf("skipped: %s is not on this machine\n", arguments[1]);
      return kSkipped;
    }
  }
  return run_tests();
}
