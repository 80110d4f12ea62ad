// linear_forward by vectors or tiles, which is a product of ProductNt.
#pragma once

#include "cpu/product/job_operands-inl.h"
#include "cpu/product/product_nt-inl.h"
#include "cpu/runtime/blocking.h"
#include "cpu/runtime/job.h"
#include "cpu/runtime/scratch.h"

namespace qlora_native::QLN_ISA {
namespace {

// Stage 0 packs X, a strip at a time, and computes its U; stage 1 multiplies. This class has all that does not depend
// on how W is stored.
template <class Dot>
class ForwardOf : public Job {
 public:
  ForwardOf(const LinearForwardArgs& args, const WeightRows& part) : args_(args) {
    const LoraView& lora = args.lora;
    units_ = Product::padded_units(DenseRows<Dot, false>(args.x));
    u_units_ = Product::padded_units(DenseRows<Dot, true>(lora_b(lora, args.weight.N)));
    rows_ = part.end - part.begin;
    rows_ = smaller(rows_, rows_per_block(rows_, (units_ + 2 * u_units_) * 4, kStripRows));
    first_row_ = part.begin;
    args_ = args_of(args, part, rows_);
    strips_ = Product::strips_of(rows_, units_);
    adapters_ = job_adapters(lora, part, rows_, args.weight);
    cut_into_pieces();
    floats_x_ = strips_.first(strips_.count()) * kLanes * units_;
    floats_u_ = piece_vectors_ * kLanes * u_units_;
    bytes_ = (floats_x_ + floats_u_) * 4;
    if (!adapters_.empty() && args.u.data == nullptr)
      bytes_ += rows_ * lora.rank * static_cast<std::int64_t>(size_of(args.x.dtype));
  }

  void cut(std::int64_t threads) override {
    const std::int64_t max_strips = scaled_to_l2(kMaxStrips, kMinStrips, caches());
    const std::int64_t panels = Product::panels(args_.weight.N, args_.weight.K);
    const bool by_strips = Product::strips_decode(strips_.vectors());  // their least tile is a block of 64 rows of W
    const std::int64_t tasks =
        by_strips ? kTasksPerThread : tasks_per_thread(panels * ceil_div(rows_, kLanes), threads);
    const std::int64_t min_tile = by_strips                 ? kMaxStripBlockRows
                                  : tasks < kTasksPerThread ? Product::kMinPanelRows
                                                            : Product::kMaxPanelRows;
    grid_ = make_grid(strips_.count(), args_.weight.N,
                      {max_strips, kMinStrips, kMaxTaskRows, min_tile, Product::kMinPanelRows}, threads, tasks);
    tasks_[0] = strips_.count();
    tasks_[1] = grid_.row_parts * grid_.column_tiles;
  }
  void prepare(std::byte* memory) override {
    x_ = reinterpret_cast<float*>(memory);
    u_ = x_ + floats_x_;
    if (!adapters_.empty() && args_.u.data == nullptr)
      args_.u = {u_ + floats_u_, Dot::kActivation, rows_, args_.lora.rank, args_.lora.rank};
  }
  void run(int stage, std::int64_t task) override { stage == 0 ? pack(task) : multiply(task); }

 protected:
  using Product = ProductNt<Dot>;

  virtual void multiply(std::int64_t task) = 0;

  template <class Rows>
  void multiply_with(const Rows& w, std::int64_t task) {
    const std::int64_t first = task % grid_.row_parts * grid_.row_part;
    const std::int64_t begin = task / grid_.row_parts * grid_.column_tile;
    const typename Product::Packed x{x_, units_, strips_, {first, smaller(first + grid_.row_part, strips_.count())}};
    constexpr std::int64_t kPanels = Product::kPanels * Product::kPanelFloats;
    const std::int64_t low_rank_floats = adapters_.empty() ? 0 : Product::kPanelFloats + kKeptFloats;
    float* panels = scratch_floats(
        Slot::thread, kPanels + low_rank_floats + Product::accumulator_floats(x.vectors(), args_.weight.K));
    LowRankPanel low_rank{.memory = panels + kPanels, .kept = panels + kPanels + Product::kPanelFloats};
    typename Product::Tiles tiles;
    Product::multiply(
        tiles, w, {begin, smaller(begin + grid_.column_tile, args_.weight.N)}, x, panels,
        panels + kPanels + low_rank_floats, [&](Range rows, std::int64_t strip) { prefetch_y(rows, strip); },
        [&](Range rows, std::int64_t strip, const typename Product::Accumulators& accumulators) {
          add_low_rank(tiles, rows, strip, low_rank, accumulators);
          Product::write(accumulators, strips_.width(strip), rows, 1.0f, args_.bias, args_.y,
                         strips_.first(strip) * kLanes);
        });
  }

 private:
  static constexpr std::int64_t kMaxTaskRows = 512;  // rows of W
  static constexpr std::int64_t kStripRows = Product::kStripVectors * kLanes;
  // The accumulators of so many rows stay in the second-level cache, with the panels. With tiles, which decode W for a
  // large part of their time, these are 1 MB together.
  static constexpr std::int64_t kMaxStrips = (kTiled<Dot> ? 704 : 528) / kStripRows;
  static constexpr std::int64_t kMinStrips = 144 / kStripRows;  // with fewer rows, decoding them again would show

  // The vectors of a strip that have rows of one adapter. Packed U has zeros in those rows of a piece that are another
  // adapter's.
  struct Piece {
    std::size_t adapter;  // of adapters_
    std::int64_t strip;
    std::int64_t vector;  // of all vectors of rows
    int width;
    std::int64_t before;  // vectors of all pieces before it
  };
  void cut_into_pieces() {
    first_piece_.assign(static_cast<std::size_t>(strips_.count() + 1), 0);
    std::size_t adapter = 0;
    for (std::int64_t s = 0; s < strips_.count(); ++s) {
      const std::int64_t begin = strips_.first(s) * kLanes, end = begin + strips_.width(s) * kLanes;
      for (std::size_t i = adapter; i < adapters_.size() && adapters_[i].begin < end; ++i) {
        const std::int64_t first = larger(adapters_[i].begin, begin) / kLanes;
        const std::int64_t last = ceil_div(smaller(adapters_[i].end, end), kLanes);
        pieces_.push_back({i, s, first, static_cast<int>(last - first), piece_vectors_});
        piece_vectors_ += last - first;
        if (adapters_[i].end <= end) adapter = i + 1;
      }
      first_piece_[static_cast<std::size_t>(s + 1)] = pieces_.size();
    }
  }
  float* packed_u(const Piece& piece) const { return u_ + piece.before * u_units_ * kLanes; }

  void pack(std::int64_t strip) {
    Product::pack_strip(DenseRows<Dot, false>(args_.x), strips_.first(strip) * kLanes, strips_.width(strip),
                        {0, ceil_div(args_.x.cols, kChunk)}, x_ + strips_.first(strip) * units_ * kLanes);
    for (std::size_t i = first_piece_[static_cast<std::size_t>(strip)];
         i < first_piece_[static_cast<std::size_t>(strip + 1)]; ++i)
      compute_u(pieces_[i]);
  }

  // Computes U = drop(X) . A^T / (1-p) for one piece, writes it to args.u and packs it as more units of x.
  void compute_u(const Piece& piece) {
    const JobAdapter& adapter = adapters_[piece.adapter];
    const LoraView& lora = adapter.lora;
    const Dropout dropout = dropout_of(lora);
    const std::int64_t chunks = ceil_div(args_.x.cols, kChunk), count = adapter.end - adapter.begin;
    const std::int64_t first = piece.vector * kLanes - adapter.begin;  // counts the adapter's rows; others are skipped
    const int width = piece.width;
    const DenseRows<Dot, false> a(lora_a(lora, args_.x.cols));
    const DenseRows<Dot, false> x(rows_of(args_.x, adapter.begin, count), 1.0f, dropout, first_row_ + adapter.begin);
    const std::int64_t strip_row = strips_.width(piece.strip) * kLanes, piece_row = width * kLanes;
    const Matrix u = rows_of(args_.u, adapter.begin, count);
    constexpr std::int64_t kPackedFloats = Product::kMaxStripWidth * kLanes * Product::kBlockUnits;
    float* panel_memory = scratch_floats(Slot::thread, Product::kPanelFloats + kPackedFloats +
                                                           Product::kMaxPanelRows * Product::kMaxStripWidth * kLanes);
    float* packed = panel_memory + Product::kPanelFloats;
    const typename Product::Accumulators accumulators{packed + kPackedFloats, piece_row};
    typename Product::Tiles tiles;
    NoDecoder none;
    for (std::int64_t r = 0; r < lora.rank; r += Product::kMaxPanelRows) {
      const Range ranks{r, smaller(r + Product::kMaxPanelRows, lora.rank)};
      for (std::int64_t c = 0; c < chunks; c += Product::kMaxChunks) {
        const typename Product::Panel panel{ranks, {c, smaller(c + Product::kMaxChunks, chunks)}, panel_memory};
        // Without dropout the piece's vectors of the packed strip are what is multiplied.
        typename Product::Strip strip{x_ + strips_.first(piece.strip) * kLanes * units_ + c * Dot::kUnits * strip_row +
                                          (piece.vector - strips_.first(piece.strip)) * kLanes,
                                      width, strip_row};
        if (dropout) {
          Product::pack_strip(x, first, width, panel.chunks, packed);
          strip = {packed, width, piece_row};
        }
        decode_panel(a, panel);
        Product::multiply_strip(tiles, strip, panel, panel.chunks.count() * Dot::kUnits, accumulators, c != 0, none);
      }
      Product::write(accumulators, width, ranks, dropout_scale(lora), nullptr, u, first);
    }
    Product::pack_strip(DenseRows<Dot, true>(readable(u)), first, width, {0, ceil_div(lora.rank, kChunk)},
                        packed_u(piece));
  }

  // A panel of s*B, which stays from strip to strip.
  struct LowRankPanel {
    float* memory;
    float* kept;  // kKeptFloats, for keep_other_rows()
    std::size_t adapter = 0;
    Range rows{0, 0}, chunks{0, 0};

    bool holds(std::size_t other, Range these, std::int64_t chunk) const {
      return adapter == other && rows.begin == these.begin && rows.end == these.end && chunks.begin == chunk;
    }
  };

  // Adds U . (s*B)^T to the accumulators of a strip and these rows of W.
  void add_low_rank(typename Product::Tiles& tiles, Range rows, std::int64_t strip, LowRankPanel& low_rank,
                    const typename Product::Accumulators& accumulators) {
    NoDecoder none;
    const std::int64_t chunks = ceil_div(args_.lora.rank, kChunk);
    for (std::size_t i = first_piece_[static_cast<std::size_t>(strip)];
         i < first_piece_[static_cast<std::size_t>(strip + 1)]; ++i) {
      const Piece& piece = pieces_[i];
      const std::int64_t u_row = piece.width * kLanes;
      typename Product::Accumulators into = accumulators;
      into.data += (piece.vector - strips_.first(strip)) * kLanes;
      for (std::int64_t c = 0; c < chunks; c += Product::kMaxChunks) {
        const typename Product::Panel panel{rows, {c, smaller(c + Product::kMaxChunks, chunks)}, low_rank.memory};
        const std::int64_t unit = c * Dot::kUnits, units = smaller(Product::kBlockUnits, u_units_ - unit);
        if (!low_rank.holds(piece.adapter, rows, c)) {
          const LoraView& lora = adapters_[piece.adapter].lora;
          decode_panel(DenseRows<Dot, true>(lora_b(lora, args_.weight.N), lora.scaling), panel);
          low_rank = {low_rank.memory, low_rank.kept, piece.adapter, rows, panel.chunks};
          // Another adapter's rows are far off, where no processor expects them.
          if (piece.adapter + 1 < adapters_.size())
            prefetch(rows_of(lora_b(adapters_[piece.adapter + 1].lora, args_.weight.N), rows.begin, rows.count()));
        }
        keep_other_rows(piece, into, rows.count(), low_rank.kept, [&] {
          Product::multiply_strip(tiles, {packed_u(piece) + unit * u_row, piece.width, u_row}, panel, units, into, true,
                                  none);
        });
      }
    }
  }

  // Calls multiply(), which adds to the accumulators of a piece, and leaves those of other adapters' rows as they were:
  // the zeros that these rows have for U would make NaN of a B that is NaN or infinite.
  static constexpr std::int64_t kKeptFloats = 2 * Product::kMaxPanelRows * kLanes;
  template <class Multiply>
  void keep_other_rows(const Piece& piece, const typename Product::Accumulators& accumulators, std::int64_t count,
                       float* kept, const Multiply& multiply) const {
    // The first and the last vector may have rows of others. fn(lanes that are the piece's own, accumulators, kept).
    const auto each_shared = [&](const auto& fn) {
      float* beside = kept;
      for (int vector = 0; vector < piece.width; ++vector) {
        const std::uint32_t own = own_lanes(adapters_[piece.adapter], piece.vector + vector);
        if (own == kAllLanes) continue;
        for (std::int64_t row = 0; row < count; ++row, beside += kLanes)
          fn(own, accumulators.data + row * accumulators.row_stride + vector * kLanes, beside);
      }
    };
    each_shared([](std::uint32_t, const float* from, float* to) { store(to, load(from)); });
    multiply();
    each_shared([](std::uint32_t own, float* to, const float* from) {
      store(to, add(mask_lanes(load(to), own), mask_lanes(load(from), own ^ kAllLanes)));
    });
  }
  // The lanes of a vector that are rows of an adapter; those after the last row of all count as its last adapter's.
  static constexpr std::uint32_t kAllLanes = (std::uint32_t{1} << kLanes) - 1;
  std::uint32_t own_lanes(const JobAdapter& adapter, std::int64_t vector) const {
    const auto lanes_before = [&](std::int64_t row) {
      const std::int64_t lanes = larger<std::int64_t>(row - vector * kLanes, 0);
      return lanes < kLanes ? (std::uint32_t{1} << lanes) - 1 : kAllLanes;
    };
    return (adapter.end == rows_ ? kAllLanes : lanes_before(adapter.end)) & ~lanes_before(adapter.begin);
  }

  // Prefetches some columns of a strip's Y, to write them.
  void prefetch_y(Range columns, std::int64_t strip) const {
    constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));
    const std::int64_t begin = strips_.first(strip) * kLanes;
    const std::int64_t end = smaller(begin + strips_.width(strip) * kLanes, args_.y.rows);
    for (std::int64_t row = begin; row < end; ++row) {
      const char* line = static_cast<const char*>(args_.y.data) + (row * args_.y.stride + columns.begin) * kSize;
      for (std::int64_t i = 0; i < columns.count() * kSize; i += 64) __builtin_prefetch(line + i, 1);
    }
  }

  LinearForwardArgs args_;  // of this job's rows
  std::int64_t first_row_;  // of the call's, as dropout counts them
  std::int64_t units_, u_units_;
  Strips strips_{0, 1, 1};
  std::vector<JobAdapter> adapters_;
  std::vector<Piece> pieces_;             // in the order of their rows
  std::vector<std::size_t> first_piece_;  // of each strip
  std::int64_t piece_vectors_ = 0;
  std::int64_t floats_x_, floats_u_;
  Grid grid_;
  float *x_ = nullptr, *u_ = nullptr;
};

template <class Dot, class Rows>
class Forward final : public ForwardOf<Dot> {
 public:
  Forward(const Rows& w, const LinearForwardArgs& args, const WeightRows& part) : ForwardOf<Dot>(args, part), w_(w) {}

 private:
  void multiply(std::int64_t task) override { this->multiply_with(w_, task); }

  Rows w_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
