// Computes the dropout mask of common/philox.h, 64 elements of a row at a time.
#pragma once

#include "common/philox.h"

namespace qlora_native::QLN_ISA {
namespace {

struct Dropout {
  std::uint32_t threshold = 0;  // 0: nothing is dropped
  std::uint64_t seed = 0;

  explicit operator bool() const { return threshold != 0; }

  // Bit i says whether element (m, 64 * chunk + i) is kept.
  std::uint64_t keep_mask(std::int64_t m, std::int64_t chunk) const {
    std::uint64_t bits = 0;
    for (int part = 0; part < 8; part += kLanes64) {
      U64 w0 = add_u64(set1_u64(static_cast<std::uint64_t>(chunk * 8 + part)), iota_u64());
      U64 w1 = set1_u64(static_cast<std::uint32_t>(m));
      U64 w2 = set1_u64(static_cast<std::uint64_t>(m) >> 32);
      U64 w3 = set1_u64(0);
      std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
      for (int round = 0; round < philox::kRounds; ++round) {
        // The upper halves of the lanes are anything: multiplication and at_least_u16() ignore them.
        const U64 product0 = mul_u32(w0, set1_u64(philox::kMultiplier0));
        const U64 product1 = mul_u32(w2, set1_u64(philox::kMultiplier1));
        w0 = xor_u64(xor_u64(high_u32(product1), w1), set1_u64(key0));
        w2 = xor_u64(xor_u64(high_u32(product0), w3), set1_u64(key1));
        w1 = product1;
        w3 = product0;
        key0 += philox::kWeyl0;
        key1 += philox::kWeyl1;
      }
      bits |= at_least_u16(w0, w1, w2, w3, threshold) << (8 * part);
    }
    return bits;
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
