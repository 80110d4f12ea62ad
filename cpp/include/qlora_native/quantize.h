// Blockwise quantization of a weight, and its inverse. The layout of the result is documented on
// QuantizedWeightView (types.h). Every pointer is to memory of the stream's device, also code, nested_code and
// non_finite: so on cuda the caller first copies a table of codebook.h to the device.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {

// How many elements of the input were NaN or infinite, and the flat index of the first (-1 if there is none).
struct NonFinite {
  std::int64_t count = 0;
  std::int64_t first = -1;
};

// weight -> codes, absmax (and the double-quantized form of absmax).
//
// The absmax of a block is the largest |w| in it. Each element becomes the nearest level of w * (1 / absmax), the lower
// one if two are equally near; an all-zero block becomes the level of 0. The codes differ from those of bitsandbytes'
// CPU quantizer on exact ties only.
struct QuantizeArgs {
  const void* weight = nullptr;  // [elements], contiguous
  DType dtype = DType::f32;
  std::int64_t elements = 0;
  int bits = 4;                     // 4: the nearest of code[16]; 8: round(127 * w / absmax), half to even
  int blocksize = 64;               // a power of two, 32 ... 4096
  const float* code = nullptr;      // [16], ascending, or the codebook "fp4"; not used with 8 bits
  std::uint8_t* codes = nullptr;    // out, [ceil(elements * bits / 8)]
  float* absmax = nullptr;          // out, [ceil(elements / blocksize)]
  NonFinite* non_finite = nullptr;  // out; if it reports any, codes and absmax must not be used
};
QLN_API void quantize(const QuantizeArgs& args, const Stream& stream = {});

// absmax -> its double-quantized form (QLoRA, section 3). offset is the mean of absmax. absmax - offset is divided into
// blocks of nested_blocksize; each element becomes the nearest of nested_code[256] after division by the block's
// absmax.
struct QuantizeAbsmaxArgs {
  const float* absmax = nullptr;  // [blocks]
  std::int64_t blocks = 0;
  int nested_blocksize = kNestedBlocksize;
  const float* nested_code = nullptr;  // [256], ascending
  std::uint8_t* codes = nullptr;       // out, [blocks]
  float* nested_absmax = nullptr;      // out, [ceil(blocks / nested_blocksize)]
  float* offset = nullptr;             // out, [1]
};
QLN_API void quantize_absmax(const QuantizeAbsmaxArgs& args, const Stream& stream = {});

// weight -> MXFP4 or NVFP4: codes of E2M1, codebook("mxfp4"), in blocks of 32 or 16 elements with scales of 8 bits.
//
//   MXFP4   a scale is a power of two (E8M0) with the exponent floor(log2(absmax)) - 2
//           (OCP Microscaling Formats v1.0, sections 5.3 and 6.3)
//   NVFP4   a scale is E4M3(absmax / (6 g)), with g = absmax of the whole weight / (6 * 448)
//           (the rule of NVIDIA's ModelOpt)
//
// Codes are the nearest of w / scale, ties to even, and saturate at 6. The result is a double-quantized weight
// (types.h) with `scales` as its absmax, nested_absmax all 1, and offset 0.
struct QuantizeMicroscaledArgs {
  const void* weight = nullptr;  // [elements], contiguous
  DType dtype = DType::f32;
  std::int64_t elements = 0;
  int blocksize = 32;               // 32: MXFP4; 16: NVFP4
  std::uint8_t* codes = nullptr;    // out, [ceil(elements / 2)]
  std::uint8_t* scales = nullptr;   // out, [ceil(elements / blocksize)]
  float* nested_code = nullptr;     // out, [256]: the value of each scale byte (NVFP4: times g); NaN if it is no scale
  NonFinite* non_finite = nullptr;  // out; if it reports any, the other results must not be used
};
QLN_API void quantize_microscaled(const QuantizeMicroscaledArgs& args, const Stream& stream = {});

// codes -> w. Each element is level * scale in fp32, rounded once to `dtype`. The result is bit-identical to
// bitsandbytes'.
//
// With `rows` only these rows are decoded, in this order, as the lookup of an embedding does. An index out of range is
// an Error on the cpu; on cuda, where the host does not see it, its row of the result is NaN.
struct DequantizeArgs {
  QuantizedWeightView weight;
  DType dtype = DType::f32;
  const std::int64_t* rows = nullptr;  // [row_count], each in 0 ... count * N - 1 of the weight; null for all, in order
  std::int64_t row_count = 0;          // not used without `rows`
  void* out = nullptr;                 // [count, N, K] or [row_count, K], contiguous

  std::int64_t elements() const { return rows == nullptr ? weight.elements() : row_count * weight.K; }  // in `out`
};
QLN_API void dequantize(const DequantizeArgs& args, const Stream& stream = {});

// Checks the contents of a weight. To be called once, when the weight comes from a file, a state dict or another
// program. Every operation checks shape, settings and pointers of its weight, and the values of `code`; this function
// also reads the scales. It throws Error if a scale is NaN or infinite, or decodes to NaN or infinity, because that
// would reach every result. Negative scales are allowed, because double quantization may round to them.
//
// The cost is that of reading the scales: about 1/30 of the bytes of a double-quantized 4-bit weight in blocks of 64.
// On cuda the host does not see the values, so there the caller answers for them.
QLN_API void check_quantized_weight(const QuantizedWeightView& weight, const Stream& stream = {});

}  // namespace qlora_native
