// The scalar backend's quantize, quantize_absmax and dequantize.
#include <algorithm>
#include <cmath>
#include <mutex>

#include "common/codebook.h"
#include "common/layout.h"
#include "cpu/isa/scalar/reference.h"
#include "cpu/runtime/parallel.h"

namespace qlora_native::reference {
namespace {

// Elements of a flat weight that one task takes: a multiple of every blocksize, so no byte has two writers.
constexpr std::int64_t kTaskElements = 4096;

// Block [begin, end) of the weight.
void quantize_block(const QuantizeArgs& args, const SortedCodebook* codebook, std::int64_t begin, std::int64_t end,
                    NonFinite& non_finite) {
  float absmax = 0.0f;
  for (std::int64_t e = begin; e < end; ++e) {
    const float w = load(args.weight, args.dtype, e);
    if (std::isfinite(w)) {
      absmax = std::max(absmax, std::fabs(w));
    } else if (non_finite.count++ == 0) {
      non_finite.first = e;
    }
  }
  args.absmax[begin / args.blocksize] = absmax;

  const float inverse = inverse_absmax(absmax);
  const auto scaled = [&](std::int64_t e) { return load(args.weight, args.dtype, e) * inverse; };
  if (codebook == nullptr) {
    for (std::int64_t e = begin; e < end; ++e) {
      const float t = scaled(e) * 127.0f;
      const float level = std::isfinite(t) ? std::clamp(std::nearbyint(t), -127.0f, 127.0f) : 0.0f;
      args.codes[e] = static_cast<std::uint8_t>(static_cast<std::int8_t>(level));
    }
    return;
  }
  for (std::int64_t e = begin; e < end; e += 2) {
    const std::uint8_t high = nearest_code(*codebook, scaled(e));
    const std::uint8_t low = nearest_code(*codebook, e + 1 < end ? scaled(e + 1) : 0.0f);
    args.codes[e / 2] = static_cast<std::uint8_t>(high << 4 | low);
  }
}

}  // namespace

void decode(const QuantizedWeightView& w, std::int64_t first, std::int64_t count, DType dtype, float* out) {
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t block = (first + i) / w.blocksize;
    const std::int64_t end = std::min(count, (block + 1) * w.blocksize - first);
    const float scale = scale_of_block(w, block), minimum = minimum_of_block(w, block, scale);
    for (; i < end; ++i) out[i] = round_to(dtype, value_of_element(w, first + i, scale, minimum));
  }
}

void quantize(const QuantizeArgs& args, const Stream&) {
  const SortedCodebook codebook = args.bits == 4 ? sort_codebook(args.code) : SortedCodebook{};
  NonFinite total;
  std::mutex mutex;
  parallel_for(ceil_div(args.elements, kTaskElements), [&](std::int64_t task) {
    const std::int64_t end = std::min(args.elements, (task + 1) * kTaskElements);
    NonFinite found;
    for (std::int64_t e = task * kTaskElements; e < end; e += args.blocksize) {
      quantize_block(args, args.bits == 4 ? &codebook : nullptr, e, std::min(end, e + args.blocksize), found);
    }
    if (found.count > 0) {
      const std::lock_guard lock(mutex);
      total.first = total.count == 0 ? found.first : std::min(total.first, found.first);
      total.count += found.count;
    }
  });
  *args.non_finite = total;
}

void quantize_absmax(const QuantizeAbsmaxArgs& args, const Stream&) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < args.blocks; ++i) sum += args.absmax[i];
  const float offset = args.blocks > 0 ? static_cast<float>(sum / static_cast<double>(args.blocks)) : 0.0f;
  *args.offset = offset;

  parallel_for(ceil_div(args.blocks, args.nested_blocksize), [&](std::int64_t nested) {
    const std::int64_t begin = nested * args.nested_blocksize;
    const std::int64_t end = std::min(args.blocks, begin + args.nested_blocksize);
    float absmax = 0.0f;
    for (std::int64_t i = begin; i < end; ++i) absmax = std::max(absmax, std::fabs(args.absmax[i] - offset));
    args.nested_absmax[nested] = absmax;

    const float inverse = inverse_absmax(absmax);
    for (std::int64_t i = begin; i < end; ++i) {
      const float t = (args.absmax[i] - offset) * inverse;
      const float* last = args.nested_code + 255;
      const float* above = std::lower_bound(args.nested_code, last, t);  // the first level >= t, else the last
      const float* below = above == args.nested_code ? above : above - 1;
      const bool take_below = double{t} - *below <= double{*above} - t;
      args.codes[i] = static_cast<std::uint8_t>((take_below ? below : above) - args.nested_code);
    }
  });
}

void dequantize(const DequantizeArgs& args, const Stream&) {
  // Without a list of rows the whole weight is one row.
  const std::int64_t rows = args.rows == nullptr ? 1 : args.row_count;
  const std::int64_t length = args.rows == nullptr ? args.weight.elements() : args.weight.K;
  const std::int64_t parts = ceil_div(length, kTaskElements);
  parallel_for(rows * parts, [&](std::int64_t task) {
    const std::int64_t row = task / parts, first = task % parts * kTaskElements;
    const std::int64_t count = std::min(kTaskElements, length - first);
    const std::int64_t source = args.rows == nullptr ? 0 : args.rows[row] * length;
    float values[kTaskElements];
    decode(args.weight, source + first, count, args.dtype, values);
    for (std::int64_t i = 0; i < count; ++i) store(args.out, args.dtype, row * length + first + i, values[i]);
  });
}

}  // namespace qlora_native::reference
