// Tables of 16 values, one for each code, in a lane's registers: of the levels of a codebook, or of the values that the
// codes of one block of a weight stand for.
//
// To look into them takes no shared memory, which bounds many steps (README.md), but more instructions than a load from
// a PairTable.
#pragma once

#include "device/elements.cuh"

namespace qlora_native::QLN_CUDA {

// 16 values of kBytes bytes. Each register has one byte of four values: by byte, then by value.
template <int kBytes>
struct RegisterTable {
  std::uint32_t bytes[kBytes][4];

  // The values that four codes stand for, the lowest hex digits of `codes`. Word i has byte i of each. The three low
  // bits of a code name a byte of either half of the table, and the highest bit chooses between the halves.
  __device__ __forceinline__ void look_up(std::uint32_t codes, std::uint32_t (&words)[kBytes]) const {
    const std::uint32_t in_half = codes & 0x7777, which = (codes >> 1 & 0x4444) | 0x3210;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      const std::uint32_t (&word)[4] = bytes[i];
      words[i] = pick_bytes(pick_bytes(word[0], word[1], in_half), pick_bytes(word[2], word[3], in_half), which);
    }
  }
};

// The values of a block, rounded to T. The table belongs to one scale, so it pays only where a lane decodes several
// codes of one block.
template <class T>
class BlockTable {
 public:
  // `levels`: the values of the codes before they are scaled. The products are rounded as those of a PairTable are.
  __device__ __forceinline__ BlockTable(const float (&levels)[16], float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const four = levels + 4 * i;
      const std::uint32_t first = pack_pair<T>(four[0] * scale, four[1] * scale);
      const std::uint32_t second = pack_pair<T>(four[2] * scale, four[3] * scale);
      table_.bytes[0][i] = pick_bytes(first, second, 0x6420);
      table_.bytes[1][i] = pick_bytes(first, second, 0x7531);
    }
  }

  // The values of four codes: their low bytes and their high bytes.
  struct Values {
    std::uint32_t bytes[2];
    // Two of the values: those of codes `first` and `second`, which are numbers of digits.
    template <unsigned kFirst, unsigned kSecond>
    __device__ __forceinline__ std::uint32_t pair() const {
      constexpr unsigned kHighBytes = 4;  // these follow the low ones
      return pick_bytes(bytes[0], bytes[1],
                        kFirst | (kFirst + kHighBytes) << 4 | kSecond << 8 | (kSecond + kHighBytes) << 12);
    }
  };
  __device__ __forceinline__ Values look_up(std::uint32_t codes) const {
    Values values;
    table_.look_up(codes, values.bytes);
    return values;
  }

 private:
  RegisterTable<2> table_;
};

// The levels of a codebook, in fp32.
class LevelTable {
 public:
  __device__ __forceinline__ explicit LevelTable(const float* code) {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      std::uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = std::bit_cast<std::uint32_t>(code[4 * i + j]);
      std::uint32_t columns[4];
      transpose(words, columns);
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) table_.bytes[byte][i] = columns[byte];
    }
  }
  // The levels of four codes, the lowest hex digits of `codes`.
  __device__ __forceinline__ void look_up(std::uint32_t codes, float (&levels)[4]) const {
    std::uint32_t bytes[4], words[4];
    table_.look_up(codes, bytes);
    transpose(bytes, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) levels[i] = std::bit_cast<float>(words[i]);
  }

 private:
  // Byte j of word i becomes byte i of word j.
  __device__ __forceinline__ static void transpose(const std::uint32_t (&from)[4], std::uint32_t (&to)[4]) {
    const std::uint32_t first = pick_bytes(from[0], from[1], 0x5140), second = pick_bytes(from[2], from[3], 0x5140);
    const std::uint32_t third = pick_bytes(from[0], from[1], 0x7362), fourth = pick_bytes(from[2], from[3], 0x7362);
    to[0] = pick_bytes(first, second, 0x5410);
    to[1] = pick_bytes(first, second, 0x7632);
    to[2] = pick_bytes(third, fourth, 0x5410);
    to[3] = pick_bytes(third, fourth, 0x7632);
  }
  RegisterTable<4> table_;
};

}  // namespace qlora_native::QLN_CUDA
