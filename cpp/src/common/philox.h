// The dropout mask: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The key is the
// seed, and the counter is the position, so that forward and backward compute the same mask and nobody stores it.
//
// Eight adjacent elements along K share one Philox block with the counter (k / 8, m mod 2^32, m / 2^32, 0). Element k
// takes 16 bits of the result: the low half of word (k % 8) / 2 if k is even, else its high half.
#pragma once

#include <cmath>
#include <cstdint>

namespace qlora_native {

namespace philox {
constexpr std::uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;
}  // namespace philox

struct PhiloxBlock {
  std::uint32_t word[4];
};

constexpr PhiloxBlock philox4x32(PhiloxBlock counter, std::uint64_t seed) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{philox::kMultiplier0} * counter.word[0];
    const std::uint64_t product1 = std::uint64_t{philox::kMultiplier1} * counter.word[2];
    counter = {
        {static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<std::uint32_t>(product0)}};
    key0 += philox::kWeyl0;
    key1 += philox::kWeyl1;
  }
  return counter;
}

// The probability in units of 1/65536, rounded. At most 65535, so that at least one value in 65536 is kept.
inline std::uint32_t dropout_threshold(float p) {
  const long threshold = std::lround(static_cast<double>(p) * 65536.0);
  return static_cast<std::uint32_t>(threshold < 65535 ? threshold : 65535);
}

// The seed of a mask: `seed`, plus the number in memory if there is one.
constexpr std::uint64_t dropout_seed(std::uint64_t seed, const std::uint64_t* in_memory) {
  return in_memory != nullptr ? seed + *in_memory : seed;
}

// The random bits of element (m, k) and of the seven others of its block.
constexpr PhiloxBlock dropout_random(std::uint64_t seed, std::int64_t m, std::int64_t k) {
  return philox4x32({{static_cast<std::uint32_t>(k / 8), static_cast<std::uint32_t>(m),
                      static_cast<std::uint32_t>(static_cast<std::uint64_t>(m) >> 32), 0}},
                    seed);
}
// Whether element k is kept, given the random bits of its block.
constexpr bool dropout_keeps(const PhiloxBlock& random, std::int64_t k, std::uint32_t threshold) {
  // This avoids word[k % 8 / 2], because a GPU puts an array into memory if an index is known only at run time.
  const std::uint32_t even = k & 4 ? random.word[2] : random.word[0], odd = k & 4 ? random.word[3] : random.word[1];
  return (((k & 2 ? odd : even) >> (16 * (k & 1))) & 0xFFFF) >= threshold;
}

// Whether element (m, k) of the adapter's input is kept.
constexpr bool dropout_keeps(std::uint64_t seed, std::int64_t m, std::int64_t k, std::uint32_t threshold) {
  return dropout_keeps(dropout_random(seed, m, k), k, threshold);
}

}  // namespace qlora_native
