// The tile product of AMX-BF16. product/tiles-inl.h says what a tile is, and tile_emulated.h computes in plain C++ what
// the instruction does.
//
// The functions are assembler, because the numbers of registers are template arguments here and the compiler's
// intrinsics take literals alone. A register has a fixed place, so the compiler never spills one.
#pragma once

#include <cstdint>

namespace qlora_native::QLN_ISA {
namespace {

// While an object lives, this thread has eight tiles of 16 rows of 64 bytes. Afterwards it has the configuration from
// before again, which may be of a library that keeps one between calls, such as oneDNN. Where there was none, the tiles
// are released, so that the system need not save them when it switches threads.
class Tiles {
 public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration ours{};
    ours.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      ours.row_bytes[tile] = 64;
      ours.rows[tile] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(ours));
  }
  ~Tiles() {
    if (before_.palette != 0)
      asm volatile("ldtilecfg %0" : : "m"(before_));
    else
      asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Rows lie `row` floats apart.
  template <int kTile>
  void load(const float* from, std::int64_t row) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row * 4), "i"(kTile) : "memory");
  }
  // The same, of memory that is not read again soon: it takes little of the first-level cache from what is.
  template <int kTile>
  void load_once(const float* from, std::int64_t row) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row * 4), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(float* to, std::int64_t row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row * 4), "i"(kTile) : "memory");
  }
  template <int kC, int kA, int kB>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }

 private:
  // Palette 1 (Intel's manual, LDTILECFG).
  struct Configuration {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);
  Configuration before_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
