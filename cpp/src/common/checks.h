// Checks that the core and the bindings share. All of them throw Error and write nothing.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

#include "common/microscaling.h"
#include "qlora_native/error.h"

namespace qlora_native {

// Throws Error. Each part of its message is a text, a number, or a function that returns a text.
template <class Argument, class Expected, class Got>
[[noreturn]] void fail(const Argument& argument, const Expected& expected, const Got& got) {
  const auto text = [](const auto& value) -> std::string {
    using Value = std::remove_cvref_t<decltype(value)>;
    if constexpr (std::is_arithmetic_v<Value>)
      return std::to_string(value);
    else if constexpr (std::is_invocable_v<Value>)
      return value();
    else
      return value;
  };
  throw Error(text(argument), text(expected), text(got));
}

// Throws Error unless `ok`. Checks run on every call, so pass a function where the text has yet to be composed.
template <class Argument, class Expected, class Got>
void check(bool ok, const Argument& argument, const Expected& expected, const Got& got) {
  if (!ok) [[unlikely]]
    fail(argument, expected, got);
}

// These take 64 bits, because the bindings check what they are given before it becomes a field of the core's arguments.
inline void check_bits(std::int64_t bits, const char* argument) {
  check(bits == 4 || bits == 8, argument, "4 or 8", bits);
}
// NVFP4 has the smallest blocks of all weights. The blocks that `quantize` makes have at least 32 elements.
constexpr int kMinBlocksize = 16, kMinE4m3Blocksize = 32, kMinQuantizeBlocksize = 32, kMaxBlocksize = 4096;
inline void check_blocksize(std::int64_t blocksize, int min, const char* argument) {
  const bool fits = blocksize >= min && blocksize <= kMaxBlocksize;
  check(
      fits && std::has_single_bit(static_cast<std::uint64_t>(blocksize)), argument,
      [&] { return "a power of two, " + std::to_string(min) + " ... " + std::to_string(kMaxBlocksize); }, blocksize);
}
inline void check_microscaled_blocksize(std::int64_t blocksize, const char* argument) {
  check(blocksize == kMxfp4Blocksize || blocksize == kNvfp4Blocksize, argument,
        "32, which is MXFP4's, or 16, which is NVFP4's", blocksize);
}

}  // namespace qlora_native
