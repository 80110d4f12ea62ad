// A table of the 16 values that the codes of one block of a weight stand for, rounded to T, in a lane's registers.
//
// To look into it takes no shared memory, which bounds many steps (README.md), but more instructions than a load from a
// PairTable. It belongs to one scale, and a lane must have several codes of a block for it to be worth its making.
#pragma once

#include "device/elements.cuh"

namespace qlora_native::QLN_CUDA {

template <class T>
class RegisterTable {
 public:
  // `levels`: the values of the codes before they are scaled. The products are rounded as those of a PairTable are.
  __device__ __forceinline__ RegisterTable(const float (&levels)[16], float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const four = levels + 4 * i;
      const std::uint32_t first = pack_pair<T>(four[0] * scale, four[1] * scale);
      const std::uint32_t second = pack_pair<T>(four[2] * scale, four[3] * scale);
      low_[i] = pick_bytes(first, second, 0x6420);
      high_[i] = pick_bytes(first, second, 0x7531);
    }
  }

  // The values of four codes: their low bytes and their high bytes.
  struct Four {
    std::uint32_t low, high;
    // Two of the values: those of codes `first` and `second`, which are numbers of digits.
    template <unsigned kFirst, unsigned kSecond>
    __device__ __forceinline__ std::uint32_t pair() const {
      constexpr unsigned kHighBytes = 4;  // these follow the low ones
      return pick_bytes(low, high, kFirst | (kFirst + kHighBytes) << 4 | kSecond << 8 | (kSecond + kHighBytes) << 12);
    }
  };
  // Looks up the four lowest hex digits of `codes`. Their three low bits name a byte of either half of the table, and
  // the highest bit chooses between the halves.
  __device__ __forceinline__ Four look_up(std::uint32_t codes) const {
    const std::uint32_t in_half = codes & 0x7777, which = (codes >> 1 & 0x4444) | 0x3210;
    const auto bytes_of = [&](const std::uint32_t (&bytes)[4]) {
      return pick_bytes(pick_bytes(bytes[0], bytes[1], in_half), pick_bytes(bytes[2], bytes[3], in_half), which);
    };
    return {bytes_of(low_), bytes_of(high_)};
  }

 private:
  std::uint32_t low_[4], high_[4];  // bytes of the 16 values, four in a register
};

}  // namespace qlora_native::QLN_CUDA
