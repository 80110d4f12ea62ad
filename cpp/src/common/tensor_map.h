// Describes a matrix of 16-bit elements or of bytes in global memory, and the tiles that tma_load_tile() loads of it. A
// device's CUtensorMap is made from this description; the emulator's TensorMap holds just the description.
#pragma once

#include <cstdint>

namespace qlora_native {

// How the 16-byte vectors of a tile are xor-swizzled in shared memory, inside spans of 32, 64 or 128 bytes: the bits of
// an address from bit 4 on are XORed with those from bit 7 on.
enum class Swizzle : std::uint8_t { none, bytes_32, bytes_64, bytes_128 };

// Bytes of a span; 0 for none.
constexpr int span_of(Swizzle swizzle) { return swizzle == Swizzle::none ? 0 : 16 << static_cast<int>(swizzle); }

struct TileSource {
  const char* name = "";  // the operand's name, for errors
  const void* data = nullptr;
  int element_bytes = 0;
  std::int64_t rows = 0, cols = 0, stride_bytes = 0;
  int box_rows = 0, box_cols = 0;  // the size of a tile; elements beyond the matrix become zeros
  Swizzle swizzle = Swizzle::none;

  constexpr std::int64_t box_row_bytes() const { return std::int64_t{box_cols} * element_bytes; }
  // Returns "" or the reason why a driver would refuse the map (cuTensorMapEncodeTiled): the emulator refuses it too.
  const char* fault() const {
    constexpr int kVector = 16, kMaxBox = 256;
    constexpr std::int64_t kMaxRows = std::int64_t{1} << 32, kMaxStride = std::int64_t{1} << 40;
    const std::int64_t span = span_of(swizzle) == 0 ? box_row_bytes() : span_of(swizzle);
    if (reinterpret_cast<std::uintptr_t>(data) % kVector != 0) return "its address is no multiple of 16";
    if (stride_bytes % kVector != 0 || stride_bytes >= kMaxStride) return "its stride is no multiple of 16 bytes";
    if (rows < 1 || cols < 1 || rows > kMaxRows || cols > kMaxRows) return "it has no rows or columns, or too many";
    if (box_rows < 1 || box_rows > kMaxBox || box_cols < 1 || box_cols > kMaxBox) return "a tile is 1 ... 256 long";
    if (box_row_bytes() % kVector != 0) return "a tile's row is no multiple of 16 bytes";
    if (box_row_bytes() > span) return "a tile's row is longer than the span of its swizzle";
    return "";
  }
};

}  // namespace qlora_native
