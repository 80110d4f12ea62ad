// The weights of the tests: a format by its name, and a weight with the memory that its quantized form needs.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/float16.h"
#include "common/layout.h"
#include "qlora_native/codebook.h"
#include "qlora_native/quantize.h"
#include "qlora_native/types.h"
#include "tensor.h"

// How a format of files stores the minima of its blocks.
enum class Minima { none, stored, nested, zero_points };

struct Format {
  const char* name;
  int bits;
  const float* code;  // 16 values; null with 8 bits
  bool microscaled = false;
  // These belong to a format of files:
  int file_blocksize = 0;  // 0 of other formats
  qlora_native::ByteFormat byte_format = qlora_native::ByteFormat::absmax_int8;
  bool nested = false;  // scales of 8 bits, with a nested scale for 256 elements, as in GGUF's K-quants; else of 16
  Minima minima = Minima::none;
};
// The levels of GGUF's and GPTQ's codes of 4 bits.
inline constexpr std::array<float, 16> kSixteen = [] {
  std::array<float, 16> levels{};
  for (int i = 0; i < 16; ++i) levels[static_cast<std::size_t>(i)] = static_cast<float>(i - 8);
  return levels;
}();
// Each way to store scales and minima, with the blocks that have it in files.
inline const Format kFileFormats[] = {
    {.name = "q4_0", .bits = 4, .code = kSixteen.data(), .file_blocksize = 32},
    {.name = "q4_1", .bits = 4, .code = kSixteen.data(), .file_blocksize = 32, .minima = Minima::stored},
    {.name = "q4_k",
     .bits = 4,
     .code = kSixteen.data(),
     .file_blocksize = 32,
     .nested = true,
     .minima = Minima::nested},
    {.name = "q2_k",
     .bits = 4,
     .code = kSixteen.data(),
     .file_blocksize = 16,
     .nested = true,
     .minima = Minima::nested},
    {.name = "gptq", .bits = 4, .code = kSixteen.data(), .file_blocksize = 128, .minima = Minima::zero_points},
    {.name = "q8_0", .bits = 8, .code = nullptr, .file_blocksize = 32, .byte_format = qlora_native::ByteFormat::int8},
    {.name = "q6_k",
     .bits = 8,
     .code = nullptr,
     .file_blocksize = 16,
     .byte_format = qlora_native::ByteFormat::int8,
     .nested = true},
    {.name = "q5_1",
     .bits = 8,
     .code = nullptr,
     .file_blocksize = 32,
     .byte_format = qlora_native::ByteFormat::int8,
     .minima = Minima::stored},
    {.name = "int8 of a channel",
     .bits = 8,
     .code = nullptr,
     .file_blocksize = 128,
     .byte_format = qlora_native::ByteFormat::int8},
    {.name = "fp8", .bits = 8, .code = nullptr, .file_blocksize = 128, .byte_format = qlora_native::ByteFormat::e4m3},
};
// A user's codebook: no level is 0, two levels are equal, and all distances differ.
constexpr float kUserCodebook[16] = {-1.0f, -0.83f, -0.61f, -0.47f, -0.36f, -0.21f, -0.13f, -0.04f,
                                     0.02f, 0.09f,  0.17f,  0.29f,  0.29f,  0.52f,  0.71f,  1.0f};
// nf4, fp4, int4, int8, codebook (the one above), mxfp4, nvfp4, or one of kFileFormats.
inline Format format_named(const char* name) {
  const std::string text = name;
  for (const Format& format : kFileFormats)
    if (text == format.name) return format;
  if (text == "codebook") return {name, 4, kUserCodebook};
  if (text == "int8") return {name, 8, nullptr};
  return {name, 4, qlora_native::codebook(text).data(), text == "mxfp4" || text == "nvfp4"};
}

class Quantized {
 public:
  // `weight` has no gaps between its rows, and consists of `count` weights of the same shape, one below the other.
  Quantized(const qlora_native::ConstMatrix& weight, Format format, int blocksize, bool double_quant,
            std::int64_t count = 1)
      : N_(weight.rows / count), K_(weight.cols), count_(count), format_(format), blocksize_(blocksize) {
    const std::int64_t elements = weight.rows * weight.cols, blocks = qlora_native::ceil_div(elements, blocksize);
    codes.resize(qlora_native::bytes_of_codes(elements, format.bits));
    if (format.file_blocksize > 0) {
      fill_as_file(elements, blocks);
      return;
    }
    absmax.resize(blocks);
    if (format.microscaled || double_quant) {
      absmax_codes.resize(absmax.size());
      nested_absmax.assign((absmax.size() + qlora_native::kNestedBlocksize - 1) / qlora_native::kNestedBlocksize, 1.0f);
      nested_code.resize(256);
    }
    if (format.microscaled) {
      qlora_native::quantize_microscaled({.weight = weight.data,
                                          .dtype = weight.dtype,
                                          .elements = elements,
                                          .blocksize = blocksize,
                                          .codes = codes.data(),
                                          .scales = absmax_codes.data(),
                                          .nested_code = nested_code.data(),
                                          .non_finite = &non_finite});
      return;
    }
    qlora_native::quantize({.weight = weight.data,
                            .dtype = weight.dtype,
                            .elements = elements,
                            .bits = format.bits,
                            .blocksize = blocksize,
                            .code = format.code,
                            .codes = codes.data(),
                            .absmax = absmax.data(),
                            .non_finite = &non_finite});
    if (!double_quant) return;
    nested_code.assign(qlora_native::dynamic_map().begin(), qlora_native::dynamic_map().end());
    qlora_native::quantize_absmax({.absmax = absmax.data(),
                                   .blocks = blocks,
                                   .nested_code = nested_code.data(),
                                   .codes = absmax_codes.data(),
                                   .nested_absmax = nested_absmax.data(),
                                   .offset = &offset});
  }

  qlora_native::QuantizedWeightView view() const {
    qlora_native::QuantizedWeightView view{.N = N_,
                                           .K = K_,
                                           .count = count_,
                                           .bits = format_.bits,
                                           .blocksize = blocksize_,
                                           .codes = codes.data(),
                                           .absmax = absmax.data(),
                                           .code = format_.code};
    if (format_.file_blocksize > 0) {
      view.byte_format = format_.byte_format;
      view.scale_dtype = qlora_native::DType::f16;
      view.nested_blocksize = nested_blocksize();
      if (!format_.nested) view.absmax = scales16.data();
      if (format_.minima == Minima::stored) view.minimum = minima16.data();
      if (format_.minima == Minima::zero_points) view.zero_point = zero_points.data();
      if (format_.minima == Minima::nested) {
        view.minimum = minimum_codes.data();
        view.nested_minimum = nested_minimum.data();
      }
    }
    if (!absmax_codes.empty()) {
      view.absmax = absmax_codes.data();
      view.nested_absmax = nested_absmax.data();
      view.nested_code = nested_code.data();
      view.offset = &offset;
    }
    return view;
  }

  std::vector<std::uint8_t> codes;
  std::vector<float> absmax;  // of microscaled formats unused
  // With double quantization, and of microscaled formats.
  std::vector<std::uint8_t> absmax_codes;
  std::vector<float> nested_absmax, nested_code;
  float offset = 0.0f;
  // Formats of files have scales and minima in fp16, or in bytes.
  std::vector<std::uint16_t> scales16, minima16;
  std::vector<std::uint8_t> minimum_codes;
  std::vector<float> nested_minimum;
  std::vector<std::int8_t> zero_points;
  qlora_native::NonFinite non_finite;

 private:
  int nested_blocksize() const { return 256 / blocksize_; }

  // Makes random codes, scales and minima, some of them subnormal or negative.
  void fill_as_file(std::int64_t elements, std::int64_t blocks) {
    Random random(static_cast<std::uint64_t>(elements + blocks));
    const auto byte = [&](int limit) {
      return static_cast<std::uint8_t>((random.uniform() + 1.0f) * 0.5f * static_cast<float>(limit));
    };
    const auto half = [&](std::int64_t i, float size) {
      return qlora_native::f16_from_f32(i % 7 == 3 ? 0x1p-20f : size * random.normal());
    };
    for (std::uint8_t& code : codes) {
      code = byte(256);
      if (format_.byte_format == qlora_native::ByteFormat::e4m3 && (code & 0x7F) == 0x7F) code = 0;  // NaN
    }
    const float size = format_.bits == 4 ? 0.02f : 0.001f;
    for (std::int64_t i = 0; i < blocks; ++i) {
      if (format_.nested)
        absmax_codes.push_back(byte(64));
      else
        scales16.push_back(half(i, size));
      if (format_.minima == Minima::stored) minima16.push_back(half(i, 0.1f));
      if (format_.minima == Minima::nested) minimum_codes.push_back(byte(64));
      if (format_.minima == Minima::zero_points) zero_points.push_back(static_cast<std::int8_t>(byte(17) - 8));
    }
    if (!format_.nested) return;
    offset = -0.0f;
    for (int i = 0; i < 256; ++i) nested_code.push_back(static_cast<float>(i - 16));
    for (std::int64_t i = 0; i < qlora_native::ceil_div(blocks, nested_blocksize()); ++i) {
      nested_absmax.push_back(qlora_native::f32_from_f16(half(i, size / 32.0f)));
      if (format_.minima == Minima::nested) nested_minimum.push_back(qlora_native::f32_from_f16(half(i, 0.003f)));
    }
  }

  std::int64_t N_, K_, count_;
  Format format_;
  int blocksize_;
};
