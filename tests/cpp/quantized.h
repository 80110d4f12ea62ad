// The weights of the tests: a format by its name, and a weight with the memory that its quantized form needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/layout.h"
#include "qlora_native/codebook.h"
#include "qlora_native/quantize.h"
#include "qlora_native/types.h"

struct Format {
  const char* name;
  int bits;
  const float* code;  // 16 values; null for int8
  bool microscaled = false;
};
// A user's codebook: no level is 0, two levels are equal, and all distances differ.
constexpr float kUserCodebook[16] = {-1.0f, -0.83f, -0.61f, -0.47f, -0.36f, -0.21f, -0.13f, -0.04f,
                                     0.02f, 0.09f,  0.17f,  0.29f,  0.29f,  0.52f,  0.71f,  1.0f};
// nf4, fp4, int4, int8, codebook (the one above), mxfp4 or nvfp4.
inline Format format_named(const char* name) {
  const std::string text = name;
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
  qlora_native::NonFinite non_finite;

 private:
  std::int64_t N_, K_, count_;
  Format format_;
  int blocksize_;
};
