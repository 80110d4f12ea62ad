#include "qlora_native/quantize.h"

#include <algorithm>
#include <cmath>

#include "backend.h"
#include "check.h"
#include "common/layout.h"
#include "common/microscaling.h"

namespace qlora_native {
namespace {

// Only levels that some scale uses must be finite: some bytes are not a scale of MXFP4 or NVFP4, and their levels are
// NaN.
void check_levels(const QuantizedWeightView& w) {
  if (first_non_finite(w.nested_code, 256) < 0) return;
  const auto* absmax = static_cast<const std::uint8_t*>(w.absmax);
  for (std::int64_t block = 0; block < w.blocks(); ++block) {
    const float level = w.nested_code[absmax[block]];
    check(std::isfinite(level), "weight.nested_code", "finite levels of the scales",
          [&] { return std::to_string(level) + " of the one at " + std::to_string(block); });
  }
}

// The product of finite factors may be infinite. For all scales that share one nested_absmax, a bound is computed
// first, which is usually enough. Only if the bound is infinite is each scale decoded.
void check_decoded_scales(const QuantizedWeightView& w) {
  float largest_level = 0.0f;
  for (int i = 0; i < 256; ++i) largest_level = std::max(largest_level, std::fabs(w.nested_code[i]));
  for (std::int64_t begin = 0; begin < w.blocks(); begin += w.nested_blocksize) {
    const float nested_absmax = std::fabs(w.nested_absmax[begin / w.nested_blocksize]);
    if (std::isfinite(nested_scale(largest_level, nested_absmax, std::fabs(*w.offset)))) continue;
    const std::int64_t end = std::min(begin + w.nested_blocksize, w.blocks());
    for (std::int64_t block = begin; block < end; ++block) {
      const float scale = scale_of_block(w, block);
      check(std::isfinite(scale), "weight.absmax", "codes of finite scales",
            [&] { return "one of " + std::to_string(scale) + " at " + std::to_string(block); });
    }
  }
}

void check_minima(const QuantizedWeightView& w) {
  for (std::int64_t block = 0; block < w.blocks() && w.has_minimum(); ++block) {
    const float minimum = minimum_of_block(w, block, scale_of_block(w, block));
    check(std::isfinite(minimum), w.zero_point != nullptr ? "weight.zero_point" : "weight.minimum",
          "those of finite minima", [&] { return std::to_string(minimum) + " at " + std::to_string(block); });
  }
}

// E4M3 has codes that are no numbers.
void check_bytes(const QuantizedWeightView& w) {
  if (w.bits != 8 || w.byte_format != ByteFormat::e4m3) return;
  const std::uint8_t* const end = w.codes + w.elements();
  const std::uint8_t* const bad = std::find_if(w.codes, end, [](std::uint8_t code) { return (code & 0x7F) == 0x7F; });
  check(bad == end, "weight.codes", "numbers of E4M3", [&] { return "NaN at " + std::to_string(bad - w.codes); });
  for (std::int64_t block = 0; block < w.blocks(); ++block) {
    const float scale = scale_of_block(w, block);
    check(std::fabs(scale) < 0x1p120f, "weight.absmax", "scales of E4M3 below 2^120",
          [&] { return std::to_string(scale) + " at " + std::to_string(block); });
  }
}

// The rows are checked only on the cpu, where the host can read them.
void check_rows(const DequantizeArgs& args, const Stream& stream) {
  check(args.row_count >= 0, "row_count", ">= 0", args.row_count);
  check_elements(args.row_count, args.weight.K, "row_count");
  if (stream.device != Device::cpu) return;
  const std::int64_t all = args.weight.count * args.weight.N;
  for (std::int64_t i = 0; i < args.row_count; ++i) {
    check(
        args.rows[i] >= 0 && args.rows[i] < all, "rows", [&] { return "0 ... " + std::to_string(all - 1); },
        [&] { return std::to_string(args.rows[i]) + " at " + std::to_string(i); });
  }
}

}  // namespace

void quantize(const QuantizeArgs& args, const Stream& stream) {
  check(args.elements >= 0, "elements", ">= 0", args.elements);
  check_elements(args.elements, 1, "elements");
  check_dtype(args.dtype, "dtype");
  check_bits(args.bits, "bits");
  check_blocksize(args.blocksize, kMinQuantizeBlocksize, "blocksize");
  check_pointer(args.weight, args.elements > 0, "weight");
  check_pointer(args.codes, args.elements > 0, "codes");
  check_pointer(args.absmax, args.elements > 0, "absmax");
  check_pointer(args.non_finite, true, "non_finite");
  check_code(args.code, args.bits, stream, "code");
  backend_for(stream).quantize(args, stream);
}

void quantize_absmax(const QuantizeAbsmaxArgs& args, const Stream& stream) {
  check(args.blocks >= 0, "blocks", ">= 0", args.blocks);
  check_elements(args.blocks, 1, "blocks");
  check(args.nested_blocksize >= 1, "nested_blocksize", ">= 1", args.nested_blocksize);
  check_pointer(args.absmax, args.blocks > 0, "absmax");
  check_pointer(args.nested_code, true, "nested_code");
  check_pointer(args.codes, args.blocks > 0, "codes");
  check_pointer(args.nested_absmax, args.blocks > 0, "nested_absmax");
  check_pointer(args.offset, true, "offset");
  backend_for(stream).quantize_absmax(args, stream);
}

void quantize_microscaled(const QuantizeMicroscaledArgs& args, const Stream& stream) {
  check(args.elements >= 0, "elements", ">= 0", args.elements);
  check_elements(args.elements, 1, "elements");
  check_dtype(args.dtype, "dtype");
  check_microscaled_blocksize(args.blocksize, "blocksize");
  check_pointer(args.weight, args.elements > 0, "weight");
  check_pointer(args.codes, args.elements > 0, "codes");
  check_pointer(args.scales, args.elements > 0, "scales");
  check_pointer(args.nested_code, true, "nested_code");
  check_pointer(args.non_finite, true, "non_finite");
  backend_for(stream).quantize_microscaled(args, stream);
}

void dequantize(const DequantizeArgs& args, const Stream& stream) {
  check_weight(args.weight, stream);
  check_dtype(args.dtype, "dtype");
  if (args.rows != nullptr) check_rows(args, stream);
  check_pointer(args.out, args.elements() > 0, "out");
  backend_for(stream).dequantize(args, stream);
}

void check_quantized_weight(const QuantizedWeightView& weight, const Stream& stream) {
  check_weight(weight, stream);
  if (stream.device != Device::cpu) return;
  check_bytes(weight);
  check_minima(weight);
  if (weight.nested_absmax == nullptr) {
    if (weight.scale_dtype == DType::f32)
      return check_finite(static_cast<const float*>(weight.absmax), weight.blocks(), "weight.absmax");
    for (std::int64_t block = 0; block < weight.blocks(); ++block) {
      const float scale = scale_of_block(weight, block);
      check(std::isfinite(scale), "weight.absmax", "finite values",
            [&] { return std::to_string(scale) + " at " + std::to_string(block); });
    }
    return;
  }
  check_levels(weight);
  check_finite(weight.nested_absmax, ceil_div(weight.blocks(), weight.nested_blocksize), "weight.nested_absmax");
  check_finite(weight.offset, 1, "weight.offset");
  check_decoded_scales(weight);
}

}  // namespace qlora_native
