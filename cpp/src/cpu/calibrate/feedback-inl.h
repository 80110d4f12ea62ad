// quantize_with_feedback. Lanes run along the rows of W, so that each is quantized by itself: a strip of rows lies
// transposed and in the given order of columns, [column][kStrip rows]. Where a column is done, its errors take its
// place, divided by the diagonal of U and negated.
//
// Columns are done in blocks. Before a block is quantized, it gets the errors of all columns before it (left-looking),
//
//   strip[:, block] += strip[:, before] . U[before, block]
//
// in register tiles of kGroup columns, which begin with what stands in the strip. So each element takes its errors one
// after another in the order of columns, as in the algorithm's own loops: the bits depend on no block, strip or lane.
#pragma once

#include "common/layout.h"
#include "cpu/calibrate/feedback.h"
#include "cpu/calibrate/levels-inl.h"
#include "cpu/isa/utility-inl.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "qlora_native/calibrate.h"
#include "qlora_native/runtime.h"

namespace qlora_native::QLN_ISA {
namespace {

// The register tile that the products were tuned to.
constexpr int kStripVectors = kColumnStep, kStrip = kStripVectors * kLanes, kGroup = kMaxStripRows;

// w[j] += the sum of e[i] * u[i][j], for kCols columns of a strip.
//
//   e   [count][kStrip rows]
//   u   [count][kGroup columns]
//   w   [kCols][kStrip rows]
template <int kCols>
[[gnu::noinline]] void add_errors(const float* e, const float* u, std::int64_t count, float* w) {
  F32 sum[kCols][kStripVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kCols; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kStripVectors; ++v) sum[j][v] = load(w + j * kStrip + v * kLanes);
  for (std::int64_t i = 0; i < count; ++i) {
    F32 error[kStripVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kStripVectors; ++v) error[v] = load(e + i * kStrip + v * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kCols; ++j) {
      const F32 factor = set1(u[i * kGroup + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kStripVectors; ++v) sum[j][v] = fma(error[v], factor, sum[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kCols; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kStripVectors; ++v) store(w + j * kStrip + v * kLanes, sum[j][v]);
}

template <class Levels>
class Feedback {
 public:
  Feedback(const QuantizeWithFeedbackArgs& args, const Levels& levels, const std::int64_t* place)
      : args_(args), levels_(levels), place_(place), K_(args.K) {}

  // All rows of a task share the packed part of U. Fewer rows are taken where threads would have too few tasks.
  static constexpr std::int64_t kMaxTaskRows = 128, kMinTaskRows = 64, kMinTasksPerThread = 2;

  // Rows [begin, end) of the weight. The flat index of the first element must be even.
  void quantize_rows(std::int64_t begin, std::int64_t end) const {
    const std::int64_t strips = ceil_div(end - begin, kStrip);
    float* const memory = scratch_floats(Slot::thread, strips * K_ * (kStrip + kStrip / 4) + kPackedFloats);
    float* const packed = memory + strips * K_ * kStrip;
    auto* const codes = reinterpret_cast<std::uint8_t*>(packed + kPackedFloats);
    const auto strip = [&](std::int64_t s) {
      return Strip{{begin + s * kStrip, smaller(begin + (s + 1) * kStrip, end)},
                   memory + s * K_ * kStrip,
                   codes + s * K_ * kStrip};
    };
    for (std::int64_t s = 0; s < strips; ++s) load_strip(strip(s));
    FactorPrefetch prefetch(*this, strips);
    for (std::int64_t first = 0; first < K_; first += kBlock) {
      const Range block{first, smaller(first + kBlock, K_)};
      for (std::int64_t i = 0; i < first; i += kDepth) {
        const Range before{i, smaller(i + kDepth, first)};
        pack_factor(before, block, packed);
        prefetch.start(before.end < first ? Range{before.end, smaller(before.end + kDepth, first)} : block, block);
        for (std::int64_t s = 0; s < strips; ++s)
          for (std::int64_t j = block.begin; j < block.end; j += kGroup) {
            add_group(strip(s), before, packed + (j - first) * before.count(), j, block.end);
            prefetch.step();
          }
      }
      pack_factor(block, block, packed);
      prefetch.start({0, smaller(kDepth, block.end)}, {block.end, smaller(block.end + kBlock, K_)});
      for (std::int64_t s = 0; s < strips; ++s) quantize_block(strip(s), block, packed, prefetch);
    }
    if constexpr (Levels::kBits == 4)  // write_codes adds half a byte at a time
      __builtin_memset(args_.codes + begin * K_ / 2, 0, (static_cast<std::size_t>((end - begin) * K_) + 1) / 2);
    for (std::int64_t s = 0; s < strips; ++s) write_codes(strip(s));
  }

 private:
  static constexpr std::int64_t kBlock = 20 * kGroup;  // columns
  static constexpr std::int64_t kDepth = 256;          // columns before a block that are packed at once
  static constexpr std::int64_t kPackedFloats = kDepth * kBlock;
  static_assert(kBlock <= kDepth && kMaxTaskRows % kStrip == 0 && kMinTaskRows % kStrip == 0 && kStrip % 2 == 0);

  struct Strip {
    Range rows;
    float* values;        // [place in the order][kStrip rows]
    std::uint8_t* codes;  // [column][kStrip rows]
    float* at(std::int64_t place) const { return values + place * kStrip; }
  };

  // Transposes rows of W. Those past the end become zero.
  void load_strip(const Strip& strip) const {
    for (std::int64_t column = 0; column < K_; column += kLanes)
      for (std::int64_t r = 0; r < kStrip; r += kLanes) {
        const auto count = static_cast<int>(smaller<std::int64_t>(kLanes, K_ - column));
        F32 square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const std::int64_t row = strip.rows.begin + r + i;
          square[i] = row < strip.rows.end ? load_as_f32<DType::f32>(args_.weight + row * K_ + column, count) : zero();
        }
        transpose(square);
        for (int i = 0; i < count; ++i) store(strip.at(place_[column + i]) + r, square[i]);
      }
  }

  // out [group of columns][row][kGroup columns]. What lies right of the last column is not written.
  void pack_factor(Range rows, Range columns, float* out) const {
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
      const float* const from = args_.factor + i * K_;
      float* to = out + (i - rows.begin) * kGroup;
      std::int64_t j = columns.begin;
      for (; j + kGroup <= columns.end; j += kGroup, to += rows.count() * kGroup)
        __builtin_memcpy(to, from + j, kGroup * sizeof(float));
      for (std::int64_t k = j; k < columns.end; ++k) to[k - j] = from[k];
    }
  }

  // Fetches the part of U that is packed next into the second-level cache, some rows at every step. Rows are so far
  // apart that the processor does not do so by itself: without, packing took a quarter of the time.
  class FactorPrefetch {
   public:
    FactorPrefetch(const Feedback& feedback, std::int64_t strips)
        : factor_(feedback.args_.factor),
          K_(feedback.K_),
          rows_per_step_(ceil_div(kDepth, strips * (kBlock / kGroup))) {}
    void start(Range rows, Range columns) {
      rows_ = rows;
      columns_ = columns;
    }
    void step() {
      constexpr std::int64_t kLine = 64 / sizeof(float);
      const std::int64_t end = smaller(rows_.begin + rows_per_step_, rows_.end);
      for (; rows_.begin < end; ++rows_.begin) {
        const float* const row = factor_ + rows_.begin * K_;
        for (std::int64_t j = columns_.begin; j < columns_.end; j += kLine) __builtin_prefetch(row + j, 0, 2);
        if (columns_.count() > 0) __builtin_prefetch(row + columns_.end - 1, 0, 2);
      }
    }

   private:
    const float* factor_;
    std::int64_t K_, rows_per_step_;
    Range rows_, columns_;
  };

  // Adds the errors of some columns to a group of columns from j on. `factor` is what pack_factor made of them.
  static void add_group(const Strip& strip, Range before, const float* factor, std::int64_t j, std::int64_t end) {
    if (before.count() == 0) return;
    with_constant<kGroup>(static_cast<int>(smaller<std::int64_t>(kGroup, end - j)), [&](auto columns) {
      add_errors<columns>(strip.at(before.begin), factor, before.count(), strip.at(j));
    });
  }

  void quantize_block(const Strip& strip, Range block, const float* packed, FactorPrefetch& prefetch) const {
    for (std::int64_t j = block.begin; j < block.end; j += kGroup) {
      const float* const factor = packed + (j - block.begin) * block.count();
      add_group(strip, {block.begin, j}, factor, j, block.end);
      quantize_group(strip, {j, smaller(j + kGroup, block.end)}, factor + (j - block.begin) * kGroup);
      prefetch.step();
    }
  }

  // Quantizes a group of columns, one after another. `factor` begins with the row of the first of them.
  void quantize_group(const Strip& strip, Range columns, const float* factor) const {
    I32 largest = set1_i32(0);
    for (std::int64_t j = columns.begin; j < columns.end; ++j, factor += kGroup) {
      const std::int64_t column = args_.order[j];
      alignas(64) float scales[kStrip], divisors[kStrip];
      load_scales(strip.rows, column, scales, divisors);
      const F32 pivot = set1(factor[j - columns.begin]);
      for (int r = 0; r < kStrip; r += kLanes) {
        const F32 w = load(strip.at(j) + r);
        const Nearest found = levels_.nearest(divide(w, load(divisors + r)));
        const F32 q = mul(found.level, levels_.step(load(scales + r)));
        const F32 error = divide(add(q, mul(w, set1(-1.0f))), pivot);
        store(strip.at(j) + r, error);
        store_bytes(strip.codes + column * kStrip + r, found.code);
        largest = max_i32(largest, as_i32(abs(error)));
        for (std::int64_t k = j + 1; k < columns.end; ++k)
          store(strip.at(k) + r, fma(error, set1(factor[k - columns.begin]), load(strip.at(k) + r)));
      }
    }
    if (reduce_max_i32(largest) >= static_cast<int>(kInfinityBits)) fail_of_overflow(strip.rows.begin);
  }

  // The scales of a column, and what its elements are divided by: infinity where the scale is 0.
  void load_scales(Range rows, std::int64_t column, float* scales, float* divisors) const {
    const int shift = __builtin_ctz(static_cast<unsigned>(args_.blocksize));
    for (int r = 0; r < kStrip; ++r) {
      const bool exists = rows.begin + r < rows.end;
      scales[r] = exists ? args_.scales[((rows.begin + r) * K_ + column) >> shift] : 0.0f;
      divisors[r] = scales[r] == 0.0f ? __builtin_inff() : scales[r];
    }
  }

  // Puts the codes of a strip into the library's layout. Blocks of columns stay in the first-level cache.
  void write_codes(const Strip& strip) const {
    for (std::int64_t first = 0; first < K_; first += 64) {
      const std::int64_t end = smaller<std::int64_t>(first + 64, K_);
      for (std::int64_t row = strip.rows.begin; row < strip.rows.end; ++row)
        for (std::int64_t column = first; column < end; ++column) {
          const std::int64_t e = row * K_ + column;
          const std::uint8_t code = strip.codes[column * kStrip + (row - strip.rows.begin)];
          if constexpr (Levels::kBits == 8)
            args_.codes[e] = code;
          else
            args_.codes[e / 2] |= static_cast<std::uint8_t>(e % 2 == 0 ? code << 4 : code);
        }
    }
  }

  const QuantizeWithFeedbackArgs& args_;
  Levels levels_;
  const std::int64_t* place_;  // of each column in the order
  std::int64_t K_;
};

inline void feedback_rows(const QuantizeWithFeedbackArgs& args, const Stream&) {
  auto* const place =
      reinterpret_cast<std::int64_t*>(scratch(Slot::call, static_cast<std::size_t>(args.K) * sizeof(std::int64_t)));
  for (std::int64_t i = 0; i < args.K; ++i) place[args.order[i]] = i;
  with_levels(args.bits, args.code, [&](const auto& levels) {
    using Work = Feedback<std::remove_cvref_t<decltype(levels)>>;
    const Work work(args, levels, place);
    const bool many = args.N >= Work::kMinTasksPerThread * Work::kMaxTaskRows * num_threads();
    const std::int64_t rows = many ? Work::kMaxTaskRows : Work::kMinTaskRows;
    parallel_for(ceil_div(args.N, rows),
                 [&](std::int64_t task) { work.quantize_rows(task * rows, smaller((task + 1) * rows, args.N)); });
    if (args.bits == 8 || args.N * args.K % 2 == 0) return;
    std::uint8_t of_zero[kLanes];  // the last byte has an element that the weight lacks, which is zero
    store_bytes(of_zero, levels.nearest(zero()).code);
    args.codes[args.N * args.K / 2] |= of_zero[0];
  });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
