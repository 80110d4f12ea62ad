// The forward product of up to 64 rows of X on tensor cores: Y^T = [W | s*B] . [X | U]^T.
//
// A tile has all rows of X and 128 columns of the result, which are rows of W. With so few rows, shared memory bounds
// it, not the tensor cores, so decoded weights do not pass through it: a lane decodes what it multiplies. The weight is
// mma's operand of 16 rows, as in gemv.cu, and X is the operand of 8. A step is 128 of the inner dimension. Four groups
// of warps share the rows of W, and the two warps of a group have a half of each step each, so that X is read four
// times, not eight. At the end of a tile the two warps that have the same rows of W add up their accumulators.
//
//   inner dimension of a half    0 ... 7  8 ... 15  16 ... 23  24 ... 31  then 32 ... 63 likewise
//   rows 2g, 2g + 1 of 16        t = 0    t = 1     t = 2      t = 3      lane (g, t), 4 bytes of codes of each row
//
// The inner dimension may be summed in any order, so a lane takes its four of mma's 16 from its own 8. In each row of W
// a half has one scale.
#pragma once

#include "product/gemm/operands.cuh"
#include "product/gemm/small_m_accumulators.cuh"
#include "product/gemm/tile_rows.cuh"
#include "product/product.cuh"
#include "product/stream_k.cuh"

namespace qlora_native::QLN_CUDA {

template <class T, class Tile>
struct SmallMShared {
  using Table = PairTable<16>;
  using Levels = typename ScaleReader<true>::Levels;
  struct Stage {
    XStage<T, Tile> x;
    SmallMCodes<Tile> codes;
  };
  typename Table::Pair pairs[Table::kPairs];
  Stage stages[Tile::kStages];
  Levels levels;
  static constexpr std::size_t bytes() {
    static_assert(sizeof(SmallMShared) == small_m_smem_bytes(Tile::kRows));
    return sizeof(SmallMShared);
  }
};

template <class T, class Tile, bool kGrouped>
class SmallMGemm {
  using Shared = SmallMShared<T, Tile>;
  using Stage = typename Shared::Stage;
  using X = XStage<T, Tile>;
  using Codes = SmallMCodes<Tile>;
  using Accumulators = SmallMAccumulators<T, Tile>;
  static constexpr int kStages = Tile::kStages, kFragments = Tile::kColFragments;
  static constexpr unsigned kCodesOffset = offsetof(Stage, codes);

 public:
  __device__ SmallMGemm(const GemmArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        tile_rows_(args),
        stream_k_(tile_rows_.config(), args.stream_k),
        scales_(args.weight, args.scales, shared.levels),
        table_(shared.pairs) {
    auto& first_step =
        *reinterpret_cast<std::uint32_t*>(shared.stages);  // in the stages, because there is no room beside them
    tile_rows_.prepare();
    if (thread_index() == 0) {
      const int run = stream_k_.take_run();
      first_step = kGrouped && run < 0 ? kNoStep : static_cast<std::uint32_t>(tile_rows_.config().first_step(run));
    }
    Shared::Table::fill(shared.pairs, args.weight.code);
    shared.levels.fill(args.weight);
    sync_threads();
    first_step_ = first_step;
    sync_threads();
  }

  // Between parts only the number of a step is live, in 32 bits, which can count the steps of an aligned weight.
  // Everything else is computed anew where it is needed, so that it fills no registers in between.
  __device__ void run() {
    if (kGrouped && first_step_ == kNoStep) return griddepcontrol_wait();
    for (std::uint32_t step = first_step_;;) {
      tile_rows_.go_to(part_at(step).tile);
      accumulators_.clear();
      add_lora(part_at(step));
      multiply(part_at(step));
      accumulators_.combine_halves(address_in_stages(0), SmallMLane<Tile>().half());
      const TilePart part = part_at(step);
      if (stream_k_.complete_tile<Tile::kRows * Tile::kCols>(part, accumulators_)) store(col0_of(part));
      if (part.is_last) return;
      step += static_cast<std::uint32_t>(part.count);
    }
  }

 private:
  static constexpr std::uint32_t kNoStep = 0xFFFFFFFF;
  __device__ TilePart part_at(std::uint32_t step) const { return stream_k_.part_at(in_register(step)); }
  // Without groups there is only one tile of rows.
  __device__ __forceinline__ std::int64_t col0_of(const TilePart& part) const {
    if constexpr (kGrouped) return part.tile / tile_rows_.config().row_tiles * Tile::kCols;
    return part.tile * Tile::kCols;
  }
  __device__ __forceinline__ int rows() const {
    if constexpr (kGrouped) return tile_rows_.rows();
    return static_cast<int>(args_.rows);
  }
  // The tile's first row.
  __device__ __forceinline__ const T* row0_of(const ConstMatrix& matrix) const {
    const T* const data = static_cast<const T*>(matrix.data);
    return kGrouped ? data + tile_rows_.tile().begin * matrix.stride : data;
  }
  __device__ SharedAddress address_in_stages(unsigned bytes) const {
    return SharedAddress(shared_.stages).at(bytes).in_register();
  }
  // A lane begins to read here: at eight adjacent elements of X, and at the codes of its first row of W.
  __device__ SharedAddress address_of_operand(const SmallMLane<Tile>& lane) const {
    const unsigned vector = lane.half() * (Tile::kHalf / X::kVector) + lane.t;
    return address_in_stages(X::place(lane.loaded_row(), vector) * kVectorBytes);
  }
  __device__ SharedAddress address_of_codes(const SmallMLane<Tile>& lane) const {
    const unsigned chunk = Codes::place(lane.col(0), lane.half() * (Tile::kHalf / kChunk));
    return address_in_stages(kCodesOffset + chunk * kVectorBytes + lane.t * 4);
  }
  // Where a thread copies to, both X and the codes.
  __device__ SharedAddress address_of_slice(const Lane& lane) const {
    return address_in_stages(lane.thread * kVectorBytes);
  }

  // A lane has two rows of each fragment in a step of the weight.
  template <class Value>
  using PerRow = Value[kFragments][2];
  template <class F>
  __device__ __forceinline__ static void for_each_row(const F& f) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) f(i, row);
    }
  }
  // Chunks beyond the product are multiplied by zeros of X, or belong to columns that are not stored. So any chunk will
  // do there, and a chunk beyond the weight becomes its last.
  __device__ __forceinline__ std::uint32_t clamped(std::uint32_t chunk) const {
    return chunk < args_.last_chunk ? chunk : args_.last_chunk;
  }
  __device__ __forceinline__ std::uint32_t chunk_of(std::int64_t col, std::int64_t inner) const {
    const std::int64_t element = tile_rows_.weight_offset() + ByRows::element(args_.weight, inner, col);
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(element) / kChunk);
  }
  __device__ __forceinline__ std::uint32_t chunks_of_row() const {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(args_.weight.K) / kChunk);
  }

  __device__ void multiply(const TilePart& part) {
    const SmallMLane<Tile> lane;
    const SharedAddress copy_to = address_of_slice(lane), operand = address_of_operand(lane),
                        codes = address_of_codes(lane);
    const std::int64_t inner0 = std::int64_t{part.first} * Tile::kStep, col0 = col0_of(part);
    const int whole_steps = static_cast<int>(args_.inner / Tile::kStep);
    const int tail = static_cast<int>(args_.inner % Tile::kStep);
    constexpr int kRowsAtOnce = kGemmThreads / static_cast<int>(X::kVectors);
    const int row = static_cast<int>(lane.thread / X::kVectors);
    const int inner = static_cast<int>(X::vector_at(lane.thread) * X::kVector);
    const int rows_of_group = kGrouped ? rows() : 0;  // in a register, because no argument of the kernel has it
    const T* x = row0_of(args_.x) + row * args_.x.stride + inner0 + inner;
    // The first chunk that this thread copies, and the first chunk whose scale the lane needs.
    std::uint32_t copied_chunk =
        chunk_of(col0 + Codes::col_at(lane.thread), inner0 + Codes::chunk_at(lane.thread) * kChunk);
    std::uint32_t decoded_chunk = chunk_of(col0 + lane.col(0), inner0 + lane.half() * Tile::kHalf);
    constexpr std::uint32_t kColsAtOnce = Tile::kCols / Codes::kThreadChunks;

    const auto fetch = [&](const SharedAddress& to, int step) {
      // Copies the same vector of every 16th row, and zeros beyond the product.
      const bool is_there = step < whole_steps || (step == whole_steps && inner < tail);
#pragma unroll
      for (int i = 0; i < Tile::kRows / kRowsAtOnce; ++i) {
        cp_async_or_zeros(to.at(i * kRowsAtOnce * X::kRowBytes), x + i * kRowsAtOnce * args_.x.stride,
                          is_there && row + i * kRowsAtOnce < (kGrouped ? rows_of_group : rows()));
      }
      x += Tile::kStep;
#pragma unroll
      for (unsigned i = 0; i < Codes::kThreadChunks; ++i) {
        const std::uint32_t chunk = clamped(copied_chunk + i * kColsAtOnce * chunks_of_row());
        cp_async_or_zeros(to.at(kCodesOffset + i * kGemmThreads * kVectorBytes),
                          args_.weight.codes + std::uint64_t{chunk} * kVectorBytes, 1);
      }
      copied_chunk += Tile::kStep / kChunk;
    };
    PerRow<typename ScaleReader<true>::Raw> pending;
    const auto fetch_scales = [&] {
      for_each_row([&](int i, int row) {
        const std::uint32_t chunk = clamped(decoded_chunk + (i * kMmaRows + row) * chunks_of_row());
        scales_.fetch(pending[i][row], scales_.block_of(chunk));
      });
      decoded_chunk += Tile::kStep / kChunk;
    };
    PerRow<float> scale;
    const auto finish_scales = [&] {
      const float offset = ScaleReader<true>::offset_of(args_.weight);  // read anew: no register is left to keep it
      for_each_row([&](int i, int row) { scale[i][row] = scales_.finish(pending[i][row], offset); });
    };

    // The stage of a step is found by how many steps are left, with this one.
    const auto stage_of = [](int rest) { return static_cast<std::uint32_t>(rest % kStages * sizeof(Stage)); };
    const int end = part.first + part.count;
#pragma unroll 1
    for (int rest = part.count; rest > part.count - (kStages - 1); --rest) {
      if (rest > 0) fetch(copy_to.at(stage_of(rest)), end - rest);
      cp_async_commit();  // an empty group too: the n-th is always step n's
    }
    fetch_scales();
    finish_scales();
#pragma unroll 1
    for (int rest = part.count; rest > 0; --rest) {
      cp_async_wait<kStages - 2>();
      sync_threads();  // this step is complete for all, and all have read the one before
      const int ahead = rest - (kStages - 1);
      if (ahead > 0) fetch(copy_to.at(stage_of(rest + 1)), end - ahead);
      cp_async_commit();
      const std::uint32_t stage = stage_of(rest);
      fetch_scales();
#pragma unroll 1  // one chunk at a time, for want of registers
      for (int c = 0; c < Tile::kHalf / kChunk; ++c) {
        typename Accumulators::Weights weights;
        for_each_row([&](int i, int row) {
          constexpr unsigned kLine = Codes::kChunks * kVectorBytes;
          const unsigned line = i * kMmaRows + row * (kMmaRows / 2);
          const auto word = load_shared<std::uint32_t>(codes.at(stage + line * kLine).xor_swizzled(c * kVectorBytes));
#pragma unroll
          for (int byte = 0; byte < 4; ++byte) {
            const auto pair = table_.pair_of_byte(word, byte);
            weights[i][byte / 2][byte % 2 * 2 + row] =
                pack_pair<T>(pair.at[0] * scale[i][row], pair.at[1] * scale[i][row]);
          }
        });
        accumulators_.multiply(weights, operand.at(stage).xor_swizzled(c * (kChunk * sizeof(T))));
      }
      finish_scales();
    }
    sync_threads();  // the stages have been read
  }

  // The adapter adds to the same accumulators, with U in place of X and B in place of the weight. U and B are small and
  // not read again, so both are loaded from global memory; a lane has four of mma's 16 of the rank. The halves
  // alternate. A lane's elements of B wait in shared memory until they are complete. So one piece of code loads every
  // pair, and no registers are held meanwhile.
  __device__ void add_lora(const TilePart& part) {
    if (part.first > 0 || args_.u.cols == 0) return;
    griddepcontrol_wait();  // for the kernel that makes U
    if constexpr (kGrouped) {
      TileAdapters<Tile::kRows> adapters(args_, tile_rows_.tile());
#pragma unroll 1
      while (adapters.next()) {
        const RowSpan rows = adapters.rows();
        add_adapter(col0_of(part), adapters.adapter(), tile_rows_.in_tile(rows.begin), tile_rows_.in_tile(rows.end));
      }
    } else {
      add_adapter(col0_of(part), 0, 0, rows());
    }
    sync_threads();  // before the stages are filled
  }
  // Multiplies by one adapter, for rows begin ... end-1 of the tile.
  __device__ __forceinline__ void add_adapter(std::int64_t col0, int adapter, int begin, int end) {
    const int rank = static_cast<int>(args_.u.cols);
    const SmallMLane<Tile> lane;
    const SharedAddress scratch = address_in_stages(lane.thread * (2 * kVectorBytes));
    const int first = kGrouped ? static_cast<int>(lane.half() + adapter) % Tile::kHalves : lane.half();
#pragma unroll 1
    for (int r0 = first * kMmaInner; r0 < rank; r0 += Tile::kHalves * kMmaInner) {
      const int r = r0 + 4 * lane.t;
#pragma unroll 1
      for (unsigned word = 0; word < kFragments * 4; ++word) {
        const std::int64_t col = col0 + lane.col(word / 4) + word % 2;
        const int first = r + word / 2 % 2 * 2;
        store_shared(scratch.at(word * 4), pack_pair<T>(lora_at<true>(args_, first, col, adapter),
                                                        lora_at<true>(args_, first + 1, col, adapter)));
      }
      std::uint32_t weights[kFragments][4];
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        const auto words = load_shared<Vector<std::uint32_t, 4>>(scratch.at(i * kVectorBytes));
#pragma unroll
        for (int w = 0; w < 4; ++w) weights[i][w] = words.at[w];
      }
      const T* const u = row0_of(args_.u) + lane.loaded_row() * args_.u.stride + r;
      accumulators_.multiply_vec4(weights, [&](int row) {
        sync_warp();  // a row at a time, for want of registers
        const int tile_row = row + static_cast<int>(lane.loaded_row());
        const bool has_row = tile_row < end && (!kGrouped || tile_row >= begin);
        const Vec8 words = gather_words(u + row * args_.u.stride, !has_row ? 0 : rank - r < 4 ? rank - r : 4);
        return Vector<std::uint32_t, 2>{{words.at[0], words.at[1]}};
      });
    }
  }

  __device__ void store(std::int64_t col0) const {
    const SmallMLane<Tile> lane;
    const std::int64_t col = col0 + lane.col(lane.half()), cols = args_.cols - col;
    const T* const bias = static_cast<const T*>(args_.bias);
    T* out = static_cast<T*>(args_.out.data) + col;
    if constexpr (kGrouped) out += tile_rows_.tile().begin * args_.out.stride;
    accumulators_.store(lane, out, args_.out.stride, bias == nullptr ? nullptr : bias + tile_rows_.bias_offset() + col,
                        rows(), cols < 2 ? static_cast<int>(cols) : 2);
  }

  const GemmArgs& args_;
  Shared& shared_;
  const TileRows<kGrouped, Tile::kRows> tile_rows_;
  const StreamK stream_k_;
  const ScaleReader<true> scales_;
  const typename Shared::Table table_;
  std::uint32_t first_step_;  // of the block's run
  Accumulators accumulators_;
};

template <class T, int kRows, bool kGrouped>
__global__ void __launch_bounds__(kGemmThreads, gemm_blocks_per_sm(kRows))
    small_m_gemm_kernel(const __grid_constant__ GemmArgs args) {
  using Tile = SmallMTile<kRows>;
  SmallMGemm<T, Tile, kGrouped> gemm(args, *dynamic_smem<SmallMShared<T, Tile>>());
  gemm.run();
}

}  // namespace qlora_native::QLN_CUDA
