// Y = X . W^T for up to kMaxSmallM rows of X, with lanes along K. Few of them are one piece, and a weight is decoded in
// registers, where it is used. More rows are several pieces, and W is decoded to memory, once for all of them.
#pragma once

#include <bit>
#include <span>

#include "cpu/product/config.h"
#include "cpu/product/job_operands-inl.h"
#include "cpu/runtime/scratch.h"

namespace qlora_native::QLN_ISA {
namespace {

// Elements that are decoded at once.
template <class Dot>
constexpr std::int64_t kStepElements = Dot::kStepChunks * kChunk;

template <class Dot>
struct SmallM {
  static constexpr std::int64_t kStepUnits = Dot::kStepVectors * kLanes;
  // Rows of each of several pieces, or fewer where that divides them better. Four rows, with four of W, are 16
  // accumulators, and a multiply-add takes half a load.
  static constexpr int kRowsOfPiece = 4, kMaxPieces = static_cast<int>(ceil_div(cpu::kMaxSmallM, kRowsOfPiece));
  static_assert(kMaxPieces * kRowsOfPiece >= cpu::kMaxPieceRows);
  // One piece of x is read for each two or four rows of W, so it should fit the first-level cache. On an AMD EPYC (Zen
  // 5) 6 to 8 rows of 4096 elements of bfloat16, which the first-level cache does not hold, took 1.2 to 2 times as long
  // as two pieces did; 6 to 8 rows of 1536 took 0.7 to 1.1 times as long. Both give the same bits.
  static constexpr std::int64_t kPieceElements = (32 << 10) / static_cast<std::int64_t>(size_of(Dot::kActivation));

  template <class Rows>
  static std::int64_t steps(const Rows& rows) {
    return ceil_div(rows.cols(), kStepElements<Dot>);
  }

  // All vectors are decoded before one is stored: as far as the compiler knows they might lie where the scales do, and
  // the tables of blocks would be computed anew.
  template <int kVectors = Dot::kStepVectors, class Step>
  [[gnu::always_inline]] static void store_step(const Step& step, float* out) {
    F32 vector[Dot::kStepVectors];
#pragma GCC unroll 16
    for (int k = 0; k < Dot::kStepVectors; ++k) vector[k] = k < kVectors ? step.vector(k) : zero();
#pragma GCC unroll 16
    for (int k = 0; k < Dot::kStepVectors; ++k) store(out + k * kLanes, vector[k]);
  }
  // Rows of x, as a product takes them: `count` pieces [step][row][unit] of `rows` rows, with zeros after the last row.
  struct Pieces {
    const float* data;
    int count, rows;
    std::int64_t steps;

    const float* piece(int i) const { return data + i * floats(); }
    std::int64_t floats() const { return steps * rows * kStepUnits; }
  };
  template <class Rows>
  static Pieces pack(const Rows& x, int pieces, int piece_rows, float* out) {
    const Pieces packed{out, pieces, piece_rows, steps(x)};
    for (int i = 0; i < pieces; ++i) {
      const int first = i * piece_rows, count = smaller(piece_rows, static_cast<int>(x.rows()) - first);
      decode_ragged<Rows>({&x, first, count}, 0, piece_rows, {0, packed.steps}, out + i * packed.floats());
    }
    return packed;
  }

  // What one adapter adds to rows begin ... end-1 of x: U . (s*B)^T. `u` is [row][padded rank] in fp32.
  struct LowRank {
    ConstMatrix b;
    float scaling = 0.0f;
    std::int64_t begin = 0, end = 0;
    float* u = nullptr;
    std::int64_t padded_rank = 0;

    F32 row(std::int64_t n, std::int64_t r) const {
      return with_dtype(b.dtype, [&](auto dtype) {
        constexpr auto kSize = static_cast<std::int64_t>(size_of(dtype()));
        const char* p = static_cast<const char*>(b.data) + (n * b.stride + r) * kSize;
        const int count = static_cast<int>(smaller<std::int64_t>(kLanes, b.cols - r));
        return round_to<Dot::kActivation>(mul(load_as_f32<dtype()>(p, count), set1(scaling)));
      });
    }
  };

  // Rows of W that are multiplied together, so that they share what is loaded of x. Their accumulators, and what
  // decodes them, should fit the registers.
  template <int kM>
  static constexpr int kRowsOf = kM * 4 <= kRegisters / 2                          ? Dot::kStepRows
                                 : kM * Dot::kStepRowsOfMany <= kRegisters * 2 / 3 ? Dot::kStepRowsOfMany
                                                                                   : 2;
  // Accumulators for each row of x and of W. Two multiply-adds begin in a cycle and take four cycles, so eight
  // accumulators keep the processor busy.
  template <int kM>
  static constexpr int kPartsOf = smaller(larger(8 / (kRowsOf<kM> * kM), 1), Dot::kStepVectors);

  // After so many steps the accumulators are added to a total and start from zero; never, if this is 0.
  static constexpr std::int64_t kChainSteps = kOneChain<Dot> ? 0 : 256 / kStepElements<Dot>;

  template <int kM>
  struct Totals {
    F32 of[kRowsOf<kM>][kM];
  };
  // Adds U . (s*B)^T to the totals of rows n ... n+count-1 of W, and of rows of x from `first_row` on.
  template <int kM>
  [[gnu::noinline]] static void add_low_rank(std::int64_t n, int count, std::span<const LowRank> loras, int first_row,
                                             Totals<kM>& total) {
    for (const LowRank& lora : loras)
      for (std::int64_t r = 0; r < lora.b.cols; r += kLanes)
#pragma GCC unroll 8
        for (int j = 0; j < kRowsOf<kM>; ++j) {
          const F32 b = j < count ? lora.row(n + j, r) : zero();
#pragma GCC unroll 8
          for (int m = 0; m < kM; ++m)
            if (const std::int64_t row = first_row + m; row >= lora.begin && row < lora.end)
              total.of[j][m] = fma(b, load(lora.u + row * lora.padded_rank + r), total.of[j][m]);
        }
  }

  template <int kM>
  struct Accumulators {
    static constexpr int kRows = kRowsOf<kM>, kParts = kPartsOf<kM>;
    F32 part[kRows][kM][kParts];
    Totals<kM> total;

    [[gnu::always_inline]] void clear() {
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          total.of[j][m] = zero();
#pragma GCC unroll 8
          for (int i = 0; i < kParts; ++i) part[j][m][i] = zero();
        }
    }
    // Takes what the other ones hold so far. A single chain has no totals before finish().
    [[gnu::always_inline]] void assign(const Accumulators& other) {
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          if constexpr (kChainSteps != 0) total.of[j][m] = other.total.of[j][m];
#pragma GCC unroll 8
          for (int i = 0; i < kParts; ++i) part[j][m][i] = other.part[j][m][i];
        }
    }
    // Multiplies one step of x and of the rows of W, or its first kVectors vectors. A vector of W is decoded right
    // before the products that need it.
    template <int kVectors = Dot::kStepVectors, class Step>
    [[gnu::always_inline]] void multiply(std::int64_t s, const float* x, const Step (&step)[kRows]) {
      const float* units = x + s * kM * kStepUnits;
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) {
        F32 w[kRows];
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) w[j] = step[j].vector(k);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const F32 value = in_register(load(units + m * kStepUnits + k * kLanes));
#pragma GCC unroll 8
          for (int j = 0; j < kRows; ++j) part[j][m][k % kParts] = Dot::dot(part[j][m][k % kParts], value, w[j]);
        }
      }
      if constexpr (kChainSteps != 0)
        if ((s + 1) % kChainSteps == 0) end_chain();
    }
    // Adds the accumulators to their totals, and clears them.
    [[gnu::always_inline]] void end_chain() {
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          if constexpr (kChainSteps == 0) total.of[j][m] = zero();
#pragma GCC unroll 8
          for (int i = 0; i < kParts; ++i) {
            total.of[j][m] = add(total.of[j][m], part[j][m][i]);
            part[j][m][i] = zero();
          }
        }
    }
    // Adds what the adapters add to rows n ... n+count-1 of W and rows of x from `first_row` on, and writes the totals
    // to out[m][j].
    [[gnu::always_inline]] void finish(std::int64_t n, int count, std::span<const LowRank> loras, int first_row,
                                       float* out) {
      end_chain();
      if (!loras.empty()) {
        Totals<kM> copy = total;  // the original stays in registers
        add_low_rank(n, count, loras, first_row, copy);
        total = copy;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kM * kRows; i += 4) {
        F32 four[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) four[k] = i + k < kM * kRows ? total.of[(i + k) % kRows][(i + k) / kRows] : zero();
        store_sums(out + i, four);
      }
    }
  };

  static constexpr int kRowsAtOnce = 16;  // rows of W whose scales are decoded, and whose results are written, together
  // Each thread reads W in few long pieces: at the end of a piece, the rows that it prefetched are another thread's.
  static constexpr std::int64_t kTasksPerThread = 2;

  // Computes out[m][j] for kRowsOf<kM> aligned rows from n on.
  template <int kM, class Rows>
  static void whole_rows(const Rows& w, std::int64_t n, const typename Rows::Scales& scales, const float* x,
                         std::span<const LowRank> loras, float* out) {
    constexpr int kRows = kRowsOf<kM>;
    Accumulators<kM> accumulators;
    accumulators.clear();
    const std::uint8_t* codes[kRows];
    for (int j = 0; j < kRows; ++j) codes[j] = w.codes_at(n + j, 0);
    const std::int64_t row_scales = w.cols() / kChunk * Rows::kChunkScales;
    // The rows after these are next in memory, and next to be read. They are prefetched into the second-level cache:
    // into the first, they cost a third more time.
    const std::int64_t ahead = kRows * w.row_bytes();
    for (const LowRank& lora : loras) prefetch(rows_of(lora.b, n + kRows, kRows));
    const std::int64_t whole = w.cols() / kStepElements<Dot>;
    for (std::int64_t s = 0; s < whole; ++s) {
      typename Rows::QuantizedStep step[kRows];
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) {
        const std::uint8_t* p = codes[j] + s * Rows::kStepBytes;
        for (std::int64_t i = 0; i < Rows::kStepBytes; i += 64) __builtin_prefetch(p + ahead + i, 0, 2);
        step[j] = w.step(p, scales + (j * row_scales + s * Dot::kStepChunks * Rows::kChunkScales));
      }
      accumulators.multiply(s, x, step);
    }
    if constexpr (Dot::kStepChunks > 1)
      if (whole != steps(w)) {
        typename Rows::QuantizedStep step[kRows];
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j)
          step[j] = w.half_step(codes[j] + whole * Rows::kStepBytes,
                                scales + (j * row_scales + whole * Dot::kStepChunks * Rows::kChunkScales));
        accumulators.template multiply<Dot::kHalfStepVectors>(whole, x, step);
      }
    accumulators.finish(n, kRows, loras, 0, out);
  }

  // Rows n ... n+count-1 of a matrix, which are decoded to memory. Those of an aligned W come with their scales.
  struct Source {
    const void* w;
    std::int64_t n;
    int count;
    const float *scales = nullptr, *minima = nullptr;
  };
  // Writes a block of steps of rows first ... first+rows-1 of these, as [step][row][unit], with zeros from row `count`
  // on.
  using DecodeSteps = void(const Source& source, int first, int rows, Range block, float* out);
  template <class Rows>
  static void decode_ragged(const Source& source, int first, int rows, Range block, float* out) {
    const Rows& w = *static_cast<const Rows*>(source.w);
    const Range chunks{block.begin * Dot::kStepChunks,
                       smaller(ceil_div(w.cols(), kChunk), block.end * Dot::kStepChunks)};
    for (int j = 0; j < rows; ++j) {
      typename Dot::Chunk held[Dot::kStepChunks] = {};
      w.template chunks<1>(source.n + first + j, first + j < source.count, chunks,
                           [&](std::int64_t c, const typename Dot::Chunk(&chunk)[1]) {
                             const std::int64_t place = c % Dot::kStepChunks;
                             held[place] = chunk[0];
                             if (place != Dot::kStepChunks - 1 && c != chunks.end - 1) return;
                             for (std::int64_t after = place + 1; after < Dot::kStepChunks; ++after) held[after] = {};
                             const std::int64_t step = c / Dot::kStepChunks - block.begin;
                             store_step(Dot::join(held), out + (step * rows + j) * kStepUnits);
                           });
    }
  }
  // The same of aligned rows, none of which is past `count`. As in whole_rows(), those after all of them are
  // prefetched.
  template <class Rows>
  static void decode_whole(const Source& source, int first, int rows, Range block, float* out) {
    const Rows& w = *static_cast<const Rows*>(source.w);
    const std::int64_t row_scales = w.cols() / kChunk * Rows::kChunkScales, ahead = source.count * w.row_bytes();
    const std::int64_t whole = smaller(block.end, w.cols() / kStepElements<Dot>);
    for (int j = 0; j < rows; ++j) {
      const std::uint8_t* codes = w.codes_at(source.n + first + j, 0);
      const auto scales = typename Rows::Scales{source.scales, source.minima} + (first + j) * row_scales;
      for (std::int64_t s = block.begin; s < whole; ++s) {
        const std::uint8_t* p = codes + s * Rows::kStepBytes;
        for (std::int64_t i = 0; i < Rows::kStepBytes; i += 64) __builtin_prefetch(p + ahead + i, 0, 2);
        store_step(w.step(p, scales + s * Dot::kStepChunks * Rows::kChunkScales),
                   out + ((s - block.begin) * rows + j) * kStepUnits);
      }
      if constexpr (Dot::kStepChunks > 1)
        if (whole != block.end)
          store_step<Dot::kHalfStepVectors>(
              w.half_step(codes + whole * Rows::kStepBytes, scales + whole * Dot::kStepChunks * Rows::kChunkScales),
              out + ((whole - block.begin) * rows + j) * kStepUnits);
    }
  }
  struct DecodedStep {
    const float* units;
    F32 vector(int k) const { return load(units + k * kLanes); }
  };
  // The accumulators begin with the first block.
  template <int kM>
  static void multiply_decoded(Range block, const float* x, const float* decoded, Accumulators<kM>& accumulators) {
    constexpr int kRows = kRowsOf<kM>;
    // The copy stays in registers. As far as the compiler knows x might lie where the accumulators do, so that it
    // would store each of them at once.
    Accumulators<kM> copy;
    if (block.begin == 0)
      copy.clear();
    else
      copy.assign(accumulators);
    for (std::int64_t s = block.begin; s < block.end; ++s) {
      DecodedStep step[kRows];
      for (int j = 0; j < kRows; ++j) step[j].units = decoded + ((s - block.begin) * kRows + j) * kStepUnits;
      copy.multiply(s, x, step);
    }
    accumulators.assign(copy);
  }
  // Computes out[tile][piece][m][j] for kRowsAtOnce rows of W at most. A block of steps of x is multiplied by all of
  // them while it is in the second-level cache.
  static constexpr std::int64_t kBlockSteps = 16;
  template <int kM>
  static void decoded_rows(const Source& source, DecodeSteps* decode, const Pieces& x, std::span<const LowRank> loras,
                           float* out) {
    constexpr int kRows = kRowsOf<kM>;
    Accumulators<kM> accumulators[ceil_div(kRowsAtOnce, kRows)][kMaxPieces];
    alignas(64) float decoded[kBlockSteps * kRows * kStepUnits];
    for (std::int64_t s = 0; s < x.steps; s += kBlockSteps) {
      const Range block{s, smaller(s + kBlockSteps, x.steps)};
      for (int row = 0; row < source.count; row += kRows) {
        decode(source, row, kRows, block, decoded);
        for (int i = 0; i < x.count; ++i) multiply_decoded(block, x.piece(i), decoded, accumulators[row / kRows][i]);
      }
    }
    for (int row = 0; row < source.count; row += kRows)
      for (int i = 0; i < x.count; ++i, out += kM * kRows)
        accumulators[row / kRows][i].finish(source.n + row, smaller(kRows, source.count - row), loras, i * kM, out);
  }

  // The kernels of one number of rows of x in a piece. A dense W is always decoded as ragged rows are.
  template <class Rows>
  struct Kernel {
    int rows_of_x, rows_of_w;
    void (*whole_rows)(const Rows& w, std::int64_t n, const typename Rows::Scales& scales, const float* x,
                       std::span<const LowRank> loras, float* out);
    void (*decoded_rows)(const Source& source, DecodeSteps* decode, const Pieces& x, std::span<const LowRank> loras,
                         float* out);

    // Rows of W that a task takes where there are `rows` of them.
    std::int64_t task_rows(std::int64_t rows, std::int64_t threads) const {
      return ceil_div(ceil_div(rows, std::int64_t{rows_of_w}), threads * kTasksPerThread) * rows_of_w;
    }
  };
  // Where W is rare, or the Dot seldom multiplies more than two rows, there are kernels of powers of two, and zeros
  // fill a piece.
  template <class Rows>
  static constexpr bool kPowersOfTwo = Rows::kRare || Dot::kFewRows;
  // Rows of each piece of so many rows of x.
  template <class Rows>
  static int piece_rows(int rows, std::int64_t cols) {
    if (kPowersOfTwo<Rows>) rows = static_cast<int>(std::bit_ceil(static_cast<unsigned>(rows)));
    const bool direct = rows <= Dot::kMaxDirectRows || (rows <= cpu::kMaxPieceRows && rows * cols <= kPieceElements);
    return direct ? rows : ceil_div(rows, ceil_div(rows, kRowsOfPiece));
  }
  template <class Rows>
  static Kernel<Rows> kernel_of(int piece_rows) {
    Kernel<Rows> kernel{};
    with_constant<cpu::kMaxPieceRows>(piece_rows, [&](auto m) {
      if constexpr (!kPowersOfTwo<Rows> || std::has_single_bit(unsigned{m})) {
        kernel = {m, kRowsOf<m>, nullptr, decoded_rows<m>};
        if constexpr (Rows::kQuantized) kernel.whole_rows = whole_rows<m, Rows>;
      }
    });
    return kernel;
  }

  // Multiplies by some rows of W, and calls write(m, n, count, results) for kRowsAtOnce of them at most.
  template <class Rows, class Write>
  static void multiply(const Rows& w, const Kernel<Rows>& kernel, Range rows, const Pieces& x,
                       std::span<const LowRank> loras, const Write& write) {
    const int rows_of_x = x.count * x.rows, rows_of_w = kernel.rows_of_w;
    const std::int64_t row_scales = w.cols() / kChunk * Rows::kChunkScales;
    // [tile][m][row of the tile]. The last tile is written with up to three floats too many.
    float results[kMaxPieces * kRowsOfPiece * kRowsAtOnce + 3], row_results[kRowsAtOnce] = {};
    float *scales = nullptr, *minima = nullptr;
    if constexpr (Rows::kQuantized)
      if (w.aligned()) {
        constexpr bool kMinimum = Rows::Scales::kHasMinimum;
        // What decodes half a step reads the scales of a whole one.
        scales = scratch_floats(Slot::thread, (kMinimum ? 2 : 1) * kRowsAtOnce * row_scales + Rows::kChunkScales);
        if (kMinimum) minima = scales + kRowsAtOnce * row_scales;
      }
    const std::int64_t at_once = kRowsAtOnce / rows_of_w * rows_of_w;  // so that the last of them are whole tiles too
    for (std::int64_t first = rows.begin; first < rows.end; first += at_once) {
      const int count = static_cast<int>(smaller(at_once, rows.end - first));
      int whole = 0;
      if constexpr (Rows::kQuantized)
        if (scales != nullptr) {
          const Range chunks{0, w.cols() / kChunk};
          w.chunk_scales().decode({first, first + count}, chunks, scales, minima, row_scales);
          whole = count / rows_of_w * rows_of_w;
          for (int j = 0; j < whole; j += rows_of_w) {
            // Scales of the next rows, in parts: so many lines at once would keep the codes waiting.
            w.chunk_scales().prefetch({first + at_once + j, first + at_once + j + rows_of_w}, chunks);
            if (x.count == 1)
              kernel.whole_rows(w, first + j, typename Rows::Scales{scales, minima} + j * row_scales, x.data, loras,
                                results + j * rows_of_x);
          }
          if (x.count > 1 && whole > 0)
            kernel.decoded_rows({&w, first, whole, scales, minima}, decode_whole<Rows>, x, loras, results);
        }
      if (whole < count)
        kernel.decoded_rows({&w, first + whole, count - whole}, decode_ragged<Rows>, x, loras,
                            results + whole * rows_of_x);
      for (int m = 0; m < rows_of_x; ++m) {
        for (int j = 0; j < count; j += rows_of_w)
          for (int i = 0; i < rows_of_w; ++i) row_results[j + i] = results[j * rows_of_x + m * rows_of_w + i];
        write(m, first, count, row_results);
      }
    }
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
