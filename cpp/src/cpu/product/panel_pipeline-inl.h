// What the two products over panels of decoded W have in common: Y = X . W^T (product_nt-inl.h) and dX = dY . W
// (product_nn-inl.h). While one panel is multiplied the next one is decoded, a step of it now and then between the
// multiplications, so that decoding, multiplying and reading memory overlap:
//
//   panel 0   decode   multiply
//   panel 1            decode     multiply
//   panel 2                       decode     multiply
//
// Each product has a class `Panel` that describes the layout. A *line* of a panel holds the rows of W that are decoded
// together: one row for Y, the rows of a unit for dX.
//
//   kLineRows                     rows of W in a line
//   kLineAfterLine                whether a line is decoded to its end before the next one is begun
//   kMaxScaledChunks             chunks of all rows in the largest panel
//   lines, chunks                 the part of W that it holds
//   data                          where it lies
//   line_stride()                 floats from a line to the next
//   chunk_stride()                floats from a chunk of a line to the next
//   write<kNatural>(chunk, out)   writes one chunk of the rows of a line
//   clear_rest()                  clears what is multiplied and not decoded
#pragma once

#include <type_traits>

#include "cpu/product/register_tile-inl.h"
#include "cpu/quantize/quantized_rows-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// Decodes a whole panel.
template <class Panel, class Rows>
[[gnu::noinline]] void decode_panel(const Rows& w, const Panel& panel) {
  constexpr int kRows = Panel::kLineRows;
  panel.clear_rest();
  for (std::int64_t line = panel.lines.begin; line < panel.lines.end; ++line) {
    const std::int64_t row = line * kRows;
    const int count = static_cast<int>(smaller<std::int64_t>(kRows, w.rows() - row));
    float* out = panel.data + (line - panel.lines.begin) * panel.line_stride();
    w.template chunks<kRows>(
        row, count, panel.chunks, [&](std::int64_t c, const auto& chunk) __attribute__((always_inline)) {
          panel.template write<Rows::kNatural>(chunk, out + (c - panel.chunks.begin) * panel.chunk_stride());
        });
  }
}

// Decodes a panel of a quantized weight step by step.
template <class Panel, class Rows>
class Decoder {
 public:
  // `next` is the panel that is decoded after this one, or null. Its codes and scales are prefetched meanwhile.
  Decoder(const Rows& w, const Panel& panel, const Panel* next)
      : w_(w),
        steps_{.decoder = w.chunk_decoder(),
               .panel = panel,
               .row_bytes = w.row_bytes(),
               .width = panel.chunks.count(),
               .lines = panel.lines.count()} {
    const Range rows = rows_of(panel);
    stepwise_ = w.aligned() && rows.count() == steps_.lines * kLineRows;
    if (!stepwise_) return;
    steps_.codes = w.codes_at(rows.begin, panel.chunks.begin);
    steps_.scales = scales_;
    w.chunk_scales().decode(rows, panel.chunks, scales_, Rows::Scales::kHasMinimum ? scales_ + kMinima : nullptr,
                            steps_.width * Rows::kChunkScales);
    if (next != nullptr) {
      w.chunk_scales().prefetch(rows_of(*next), next->chunks);
      steps_.ahead = w.codes_at(rows_of(*next).begin, next->chunks.begin) - steps_.codes;
    }
    panel.clear_rest();
    steps_.start(0);
  }
  Decoder(const Decoder&) = delete;  // steps_ points into it
  Decoder& operator=(const Decoder&) = delete;

  // Decodes two chunks of one line, which is a cache line of 4-bit codes for each row. Later codes are prefetched into
  // the second-level cache: rows that are a power of two apart share so few sets of the first one that they would push
  // each other out.
  [[gnu::always_inline]] void step() { steps_.template step<false>(); }
  [[gnu::noinline]] void finish() {
    if (!stepwise_) return decode_panel(w_, steps_.panel);
    while (steps_.left > 0) step();
  }
  // Decodes all of the panel, of a Dot that decodes two chunks at once. A copy of what the steps read stays in
  // registers.
  [[gnu::noinline]] void decode() {
    if (!stepwise_) return decode_panel(w_, steps_.panel);
    Steps steps = steps_;
    while (steps.left > 0) steps.template step<true>();
  }

 private:
  static constexpr int kLineRows = Panel::kLineRows;
  static constexpr std::int64_t kLinesAhead = 32;

  Range rows_of(const Panel& panel) const {
    return {panel.lines.begin * kLineRows, smaller(panel.lines.end * kLineRows, w_.rows())};
  }

  struct Steps {
    using Chunk = typename Panel::Chunk;
    using Scales = typename Rows::Scales;

    typename Rows::ChunkDecoder decoder;
    Panel panel;
    std::int64_t row_bytes;
    // The next step decodes chunks `chunk` and chunk + 1 of a line, of `width`. So many of `lines` are left. What a
    // step changes stands between what it does not: the compiler would move neighbours through a vector.
    std::int64_t width, chunk, lines, left;
    const std::uint8_t *codes, *from;
    const float *scales, *scale;
    std::int64_t ahead;  // bytes from this panel's codes to the next one's
    float* out;

    // Lets the next step be at this chunk of the first line.
    void start(std::int64_t first) {
      chunk = first;
      left = lines;
      from = codes + first * Rows::kChunkBytes;
      scale = scales + first * Rows::kChunkScales;
      out = panel.data + first * panel.chunk_stride();
    }
    template <bool kTwo>
    [[gnu::always_inline]] void step() {
      if (left == 0) return;
      if constexpr (Panel::kLineAfterLine) {
        for (int row = 0; row < kLineRows; ++row)
          for (std::int64_t i = 0; i < 2 * Rows::kChunkBytes; i += 64)
            __builtin_prefetch(from + ahead + row * row_bytes + i, 0, 2);
        put_two<kTwo>();
        chunk += 2;
        from += 2 * Rows::kChunkBytes;
        out += 2 * panel.chunk_stride();
        scale += 2 * Rows::kChunkScales;
        if (chunk < width) return;
        from += kLineRows * row_bytes - chunk * Rows::kChunkBytes;  // the next line
        out += panel.line_stride() - chunk * panel.chunk_stride();
        scale += (kLineRows * width - chunk) * Rows::kChunkScales;
        chunk = 0;
        --left;
      } else {
#pragma GCC unroll 2
        for (int i = 0; i < kLineRows; ++i) {
          // At the end of a panel these are codes of the next one.
          const std::uint8_t* later = from + (kLinesAhead * kLineRows + i) * row_bytes;
          __builtin_prefetch(later, 0, 2);
          __builtin_prefetch(later + 2 * Rows::kChunkBytes - 1, 0, 2);
        }
        put_two<kTwo>();
        from += kLineRows * row_bytes;
        scale += kLineRows * width * Rows::kChunkScales;
        out += panel.line_stride();
        if (--left == 0 && chunk + 2 < width) start(chunk + 2);
      }
    }
    template <bool kTwo>
    [[gnu::always_inline]] void put_two() const {
      const bool both = chunk + 1 < width;
      if constexpr (kTwo && kLineRows == 1)
        if (both) {
          Chunk chunks[2];
          decoder.two({from, from + Rows::kChunkBytes}, {of(scale), of(scale + Rows::kChunkScales)}, chunks);
          for (int i = 0; i < 2; ++i) panel.template write<Rows::kNatural>({chunks[i]}, out + i * panel.chunk_stride());
          return;
        }
      put<kTwo>(from, scale, out);
      if (both) put<kTwo>(from + Rows::kChunkBytes, scale + Rows::kChunkScales, out + panel.chunk_stride());
    }
    template <bool kTwo>
    [[gnu::always_inline]] void put(const std::uint8_t* codes_of_chunk, const float* scale_of_chunk, float* to) const {
      Chunk chunks[kLineRows];
      const std::int64_t line = width * Rows::kChunkScales;
      if constexpr (kTwo && kLineRows == 2)
        decoder.two({codes_of_chunk, codes_of_chunk + row_bytes}, {of(scale_of_chunk), of(scale_of_chunk + line)},
                    chunks);
      else
#pragma GCC unroll 2
        for (int i = 0; i < kLineRows; ++i)
          chunks[i] = decoder.one(codes_of_chunk + i * row_bytes, of(scale_of_chunk + i * line));
      panel.template write<Rows::kNatural>(chunks, to);
    }
    // Scales are followed by minima, if there are some.
    static Scales of(const float* scale) { return {scale, scale + kMinima}; }
  };

  const Rows& w_;
  Steps steps_;
  bool stepwise_;  // else finish() decodes the panel as a whole
  static constexpr std::int64_t kMinima = Panel::kMaxScaledChunks * Rows::kChunkScales;  // where they begin
  float scales_[(Rows::Scales::kHasMinimum ? 2 : 1) * kMinima];
};
// Calls multiply(i, panel, decoding) for the panels panel_of(0) ... panel_of(count-1) of w. Neighbours must lie in
// different places, because one is decoded while the other is multiplied. A dense w, or a rare one, is not decoded
// ahead, nor is a panel for tiles: beside 512 rows it took as long as before them (Intel Xeon, Emerald Rapids).
template <bool kAhead, class Rows, class PanelOf, class Multiply>
void multiply_panels(const Rows& w, std::int64_t count, const PanelOf& panel_of, const Multiply& multiply) {
  using Panel = decltype(panel_of(std::int64_t{}));
  NoDecoder none;
  if constexpr (Rows::kQuantized && !Rows::kRare) {
    const auto decoder = [&](std::int64_t i) {
      const Panel next = panel_of(i + 1);
      return Decoder<Panel, Rows>(w, panel_of(i), i + 1 < count ? &next : nullptr);
    };
    if constexpr (!kAhead) {
      for (std::int64_t i = 0; i < count; ++i) {
        decoder(i).decode();
        multiply(i, panel_of(i), none);
      }
      return;
    }
    decoder(0).finish();
    for (std::int64_t i = 0; i + 1 < count; ++i) {
      auto next = decoder(i + 1);
      multiply(i, panel_of(i), next);
      next.finish();
    }
    multiply(count - 1, panel_of(count - 1), none);
  } else {
    for (std::int64_t i = 0; i < count; ++i) {
      decode_panel(w, panel_of(i));
      multiply(i, panel_of(i), none);
    }
  }
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
