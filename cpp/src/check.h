// Argument checks that more than one operation needs. All of them throw Error and write nothing.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "common/checks.h"
#include "common/float16.h"
#include "qlora_native/linear.h"

namespace qlora_native {

template <class Argument>
void check_pointer(const void* pointer, bool needed, const Argument& argument) {
  check(pointer != nullptr || !needed, argument, "a pointer", "null");
}

// The byte offsets of so many elements fit into 64 bits.
constexpr std::int64_t kMaxElements = std::numeric_limits<std::int64_t>::max() / 8;

// `rows` and `cols` must not be negative.
template <class Argument>
void check_elements(std::int64_t rows, std::int64_t cols, const Argument& argument) {
  check(cols == 0 || rows <= kMaxElements / cols, argument, "fewer than 2^60 elements",
        [&] { return std::to_string(rows) + " * " + std::to_string(cols); });
}

template <class Argument>
void check_dtype(DType dtype, const Argument& argument) {
  check(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16, argument, "a DType",
        static_cast<int>(dtype));
}

// The index of the first value that is NaN or infinite; -1 if there is none. In such a value all bits of the exponent
// are ones, so that adding its lowest bit carries into the sign bit. The inner loop never exits early, so that the
// compiler can vectorize it.
inline std::int64_t first_non_finite(const float* values, std::int64_t count) {
  constexpr std::int64_t kChunk = 4096;
  constexpr std::uint32_t kLowestOfExponent = 0x00800000;
  for (std::int64_t begin = 0; begin < count; begin += kChunk) {
    const std::int64_t end = std::min(begin + kChunk, count);
    std::uint32_t carries = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      carries |= (std::bit_cast<std::uint32_t>(values[i]) & kInfinityBits) + kLowestOfExponent;
    }
    if (carries >> 31 == 0) continue;
    return std::find_if_not(values + begin, values + end, [](float value) { return std::isfinite(value); }) - values;
  }
  return -1;
}

inline void check_finite(const float* values, std::int64_t count, const char* argument) {
  const std::int64_t bad = first_non_finite(values, count);
  check(bad < 0, argument, "finite values", [&] { return std::to_string(values[bad]) + " at " + std::to_string(bad); });
}

// The values are checked only on the cpu, where the host can read them.
inline void check_code(const float* code, int bits, const Stream& stream, const char* argument) {
  if (bits == 8) return;
  check_pointer(code, true, argument);
  if (stream.device != Device::cpu) return;
  for (int i = 0; i < 16; ++i) {
    check(std::isfinite(code[i]), argument, "16 finite values",
          [&] { return std::to_string(code[i]) + " at " + std::to_string(i); });
  }
}

// The ways to store a minimum exclude each other, and its bytes need the table of the scales. Beside a minimum scales
// have few enough digits that level * scale is exact in fp32.
inline void check_minimum(const QuantizedWeightView& w) {
  const bool is_exact = w.nested_absmax != nullptr || w.scale_dtype != DType::f32;
  check(is_exact || !w.has_minimum(), "weight.scale_dtype", "bfloat16 or float16 beside a minimum",
        name_of(w.scale_dtype));
  check(w.bits == 4 || w.byte_format == ByteFormat::int8 || !w.has_minimum(), "weight.byte_format",
        "int8 beside a minimum", "another");
  check(w.zero_point == nullptr || w.minimum == nullptr, "weight.zero_point", "null beside a minimum", "a pointer");
  if (w.nested_minimum == nullptr) return;
  check_pointer(w.minimum, true, "weight.minimum");
  check_pointer(w.nested_absmax, true, "weight.nested_absmax");
}

inline void check_weight(const QuantizedWeightView& w, const Stream& stream) {
  check(w.N >= 1, "weight.N", ">= 1", w.N);
  check(w.K >= 1, "weight.K", ">= 1", w.K);
  check(w.count >= 1, "weight.count", ">= 1", w.count);
  check_elements(w.N, w.K, "weight.N");
  check_elements(w.count, w.N * w.K, "weight.count");
  check_bits(w.bits, "weight.bits");
  const bool is_e4m3 = w.bits == 8 && w.byte_format == ByteFormat::e4m3;
  check_blocksize(w.blocksize, is_e4m3 ? kMinE4m3Blocksize : kMinBlocksize, "weight.blocksize");
  check_pointer(w.codes, true, "weight.codes");
  check_pointer(w.absmax, true, "weight.absmax");
  check_code(w.code, w.bits, stream, "weight.code");
  check_dtype(w.scale_dtype, "weight.scale_dtype");
  check_minimum(w);
  if (w.nested_absmax != nullptr) {
    check(w.nested_blocksize >= 1, "weight.nested_blocksize", ">= 1", w.nested_blocksize);
    check_pointer(w.nested_code, true, "weight.nested_code");
    check_pointer(w.offset, true, "weight.offset");
  }
}

template <class Pointer>
void check_matrix(const BasicMatrix<Pointer>& matrix, std::int64_t rows, std::int64_t cols, DType dtype,
                  const char* argument) {
  const auto shape = [](std::int64_t r, std::int64_t c) {
    return [=] { return "[" + std::to_string(r) + ", " + std::to_string(c) + "]"; };
  };
  const auto field = [=](const char* name) { return [=] { return std::string(argument) + name; }; };
  check(matrix.rows == rows && matrix.cols == cols, argument, shape(rows, cols), shape(matrix.rows, matrix.cols));
  check_dtype(matrix.dtype, field(".dtype"));
  check(matrix.dtype == dtype, field(".dtype"), name_of(dtype), name_of(matrix.dtype));
  check(
      rows <= 1 || matrix.stride >= cols, field(".stride"), [&] { return ">= " + std::to_string(cols); },
      matrix.stride);
  check_elements(rows, rows <= 1 ? cols : matrix.stride, argument);
  check_pointer(matrix.data, rows > 0 && cols > 0, field(".data"));
}

// N and K are those of the weight that the adapter belongs to.
inline void check_lora(const LoraView& lora, std::int64_t N, std::int64_t K) {
  check(lora.rank >= 0, "lora.rank", ">= 0", lora.rank);
  check_elements(lora.rank, std::max(N, K), "lora.rank");
  check(lora.count >= 1, "lora.count", ">= 1", lora.count);
  check_elements(lora.count, lora.rank * std::max(N, K), "lora.count");
  check_dtype(lora.dtype, "lora.dtype");
  check(std::isfinite(lora.scaling), "lora.scaling", "a finite value", lora.scaling);
  check(lora.dropout >= 0.0f && lora.dropout < 1.0f, "lora.dropout", "a probability in [0, 1)", lora.dropout);
}

// If groups have their own weights, each of the `rows` rows must be in a group. The offsets are checked only on the
// cpu, where the host can read them.
inline void check_groups(const RowGroups& groups, std::int64_t weights, std::int64_t adapters, std::int64_t rows,
                         const Stream& stream) {
  check(groups.count >= 0, "groups.count", ">= 0", groups.count);
  const auto one_or_each = [&] {
    return groups.count <= 1 ? "1" : "1 or groups.count, which is " + std::to_string(groups.count);
  };
  check(weights == 1 || weights == groups.count, "weight.count", one_or_each, weights);
  check(adapters == 1 || adapters == groups.count, "lora.count", one_or_each, adapters);
  check_pointer(groups.offsets, groups.count > 0, "groups.offsets");
  if (groups.count == 0 || stream.device != Device::cpu) return;
  const auto at = [&](std::int64_t g) { return [=] { return "groups.offsets[" + std::to_string(g) + "]"; }; };
  const std::int64_t* offsets = groups.offsets;
  if (weights > 1) check(offsets[0] == 0, at(0), "0, for every row has a weight", offsets[0]);
  check(offsets[0] >= 0, at(0), ">= 0", offsets[0]);
  for (std::int64_t g = 0; g < groups.count; ++g)
    check(
        offsets[g] <= offsets[g + 1], at(g + 1),
        [&] { return ">= " + std::to_string(offsets[g]) + ", the one before"; }, offsets[g + 1]);
  check(
      offsets[groups.count] == rows, at(groups.count), [&] { return std::to_string(rows) + ", the number of rows"; },
      offsets[groups.count]);
}

}  // namespace qlora_native
