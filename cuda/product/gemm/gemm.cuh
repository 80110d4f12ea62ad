// The product with a quantized weight on tensor cores, by mma.sync, forward and backward.
//
//   forward    Y[rows, cols] = [ X | U ] . [ W | s*B ]^T + bias
//   backward  dX[rows, cols] = [ dY | V ] . [ W ; A ]
//
// Operands are those of supports_gemm(): bf16 or fp16, 4 bits, blocks of 32 or more. A block of 8 warps computes one
// tile after another, or a part of a tile's inner dimension (stream_k.cuh). The inner dimension passes through shared
// memory, 64 at a time: X (or dY) as it is, and the weight as codes. A thread decodes the codes that it has copied,
// once for all rows of the tile, and stores the result in shared memory, from where the warps load it as they load X.
// While one step is multiplied, the weight of the next step is decoded:
//
//   step, 2 stages   i - 1            i                  i + 1
//   copied           X i, codes i+1   X i+1, codes i+2   X i+2, codes i+3
//   decoded          W i              W i+1              W i+2              into two buffers by turns
//   multiplied       X i-1 . W i-1    X i . W i          X i+1 . W i+1
//
// One barrier a step serves all purposes. A thread that passes it knows that X and the decoded weight of step i are in
// shared memory, and that all threads have read step i - 1, which it may overwrite.
#pragma once

#include "product/gemm/accumulators.cuh"
#include "product/gemm/adapters.cuh"
#include "product/gemm/operands.cuh"
#include "product/gemm/tile_rows.cuh"
#include "product/stream_k.cuh"

namespace qlora_native::QLN_CUDA {

// ---- shared memory --------------------------------------------------------------------------------------------------

template <class T, class Weights, class Tile>
struct GemmShared {
  // Each byte's pair has 16 copies, so that lanes that are served at once read different banks.
  using Table = PairTable<16, kRowBytes / sizeof(Vector<float, 2>)>;
  struct Row {
    typename Table::Pair pairs[16];
    std::byte weights[kLineVectors * kVectorBytes];
  };
  static_assert(2 * Tile::kCols >= 256 && sizeof(Row) == kRowBytes);
  // X of a step, and the codes of the next step. Only the thread that has copied codes reads them.
  struct Stage {
    XStage<T, Tile> x;
    std::uint8_t codes[Tile::kThreadChunks * kGemmThreads * kChunkBytes];
  };
  Row rows[2 * Tile::kCols];  // the first 256 have the table; all have decoded weights, of this step and of the next
  Stage stages[Tile::kStages];
  typename ScaleReader<Tile::kAligned>::Nested nested;
  int run;  // the block's
  // With rows in groups: the adapters that a step of the inner dimension has, -1 for none.
  static constexpr int kAdapters = kGemmStep / kMmaInner;
  int adapters[kAdapters];

  // `rows` must begin where the table must, which is not far from the beginning of shared memory: supports_gemm() has
  // checked it. If it were further away all the same, the end would lie in another block's memory.
  static __device__ GemmShared& in_dynamic_smem() { return *dynamic_smem_for_rows<GemmShared>(); }
  static constexpr std::size_t bytes() {
    static_assert(kRowsBegin == kMaxReservedSmem);
    constexpr std::size_t kBytes = kRowsBegin + sizeof(GemmShared);
    static_assert(kBytes == gemm_smem_bytes(Tile::kRows, Tile::kCols));
    static_assert(Tile::kRows > 64 || kBytes <= kMinSmemBytes);
    return kBytes;
  }
};

template <class T, class Weights, class Tile, bool kGrouped>
class Gemm {
  using Shared = GemmShared<T, Weights, Tile>;
  using Stage = typename Shared::Stage;
  using X = XStage<T, Tile>;
  static constexpr bool kAligned = Tile::kAligned;
  using Scale = ChunkScale<kAligned>;
  static constexpr int kStages = Tile::kStages, kThreadChunks = Tile::kThreadChunks;

 public:
  __device__ Gemm(const GemmArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        tile_rows_(args),
        stream_k_(tile_rows_.config(), args.stream_k),
        scales_(args.weight, args.scales, shared.nested),
        table_(shared.rows->pairs) {}

  // Gets the block's run, and fills the tables that all of the run needs.
  __device__ void prepare() {
    tile_rows_.prepare();
    if (thread_index() == 0) shared_.run = stream_k_.take_run();
    Shared::Table::fill(shared_.rows->pairs, args_.weight.code);
    shared_.nested.fill(args_.weight);
    sync_threads();
  }
  // Computes the block's run of steps: the end of a tile, whole tiles, and the beginning of one.
  __device__ void run() {
    if (kGrouped && shared_.run < 0) return griddepcontrol_wait();
    for (std::uint32_t done = 0;;) {  // counts steps; 2^32 of them would take minutes
      const TilePart part = stream_k_.part_after(shared_.run, done);
      if (part.count == 0) return;
      go_to(part);
      tile_rows_.go_to(part.tile);
      accumulators_.clear();
      if (part.first == 0) add_lora();
      multiply(part.first, part.count);
      finish(part);
      done += static_cast<std::uint32_t>(part.count);
    }
  }

 private:
  __device__ void go_to(const TilePart& part) {
    row_tile_ = static_cast<int>(part.tile % tile_rows_.config().row_tiles);
    col_tile_ = static_cast<int>(part.tile / tile_rows_.config().row_tiles);
  }
  // Where the tile begins.
  __device__ __forceinline__ std::int64_t row0() const {
    if constexpr (kGrouped) return tile_rows_.tile().begin;
    return std::int64_t{row_tile_} * Tile::kRows;
  }
  __device__ __forceinline__ std::int64_t col0() const { return std::int64_t{col_tile_} * Tile::kCols; }
  // How much of its full size the tile has.
  __device__ __forceinline__ int rows() const {
    if constexpr (kGrouped) return tile_rows_.rows();
    return static_cast<int>(args_.rows - row0() < Tile::kRows ? args_.rows - row0() : Tile::kRows);
  }
  __device__ __forceinline__ int cols() const {
    return static_cast<int>(args_.cols - col0() < Tile::kCols ? args_.cols - col0() : Tile::kCols);
  }

  // ---- main loop ----------------------------------------------------------------------------------------------------

  // A stage is passed as its distance in bytes from the first.
  static constexpr std::uint32_t kStageBytes = sizeof(Stage);
  static_assert(offsetof(Stage, x) == 0 && kStageBytes % kStageAlignment == 0);
  static constexpr std::uint32_t kCodesOffset = offsetof(Stage, codes);
  static constexpr std::uint32_t kLastStage = (kStages - 1) * kStageBytes;
  static constexpr std::uint32_t stage_after(std::uint32_t stage) {
    return kStages == 2 ? kLastStage - stage : stage == kLastStage ? 0 : stage + kStageBytes;
  }
  static constexpr std::uint32_t stage_before(std::uint32_t stage) {
    return kStages == 2 ? kLastStage - stage : stage == 0 ? kLastStage : stage - kStageBytes;
  }
  // One of the two buffers of decoded weights is passed likewise.
  static constexpr std::uint32_t kBufferBytes = Tile::kCols * kLineBytes;
  __device__ SharedAddress address_in_stage(std::size_t bytes) const {
    return SharedAddress(shared_.stages).at(static_cast<std::uint32_t>(bytes)).in_register();
  }
  __device__ SharedAddress address_in_weights(std::size_t bytes) const {
    return SharedAddress(shared_.rows->weights).at(static_cast<std::uint32_t>(bytes)).in_register();
  }
  // The codes that a thread copies begin kCodesOffset bytes after its vectors of X.

  // Where this thread reads and writes in the first stage. It does so at the same places of every other stage.
  struct Addresses {
    SharedAddress x_from, copy_to;           // X: where ldmatrix reads, and where copies go
    SharedAddress weights_from, weights_to;  // weights: where ldmatrix reads, and where decoded ones go
    __device__ Addresses(const Gemm& gemm, const Lane& lane)
        : x_from(gemm.address_in_stage(X::first_operand(lane))),
          copy_to(gemm.address_in_stage(lane.thread * kVectorBytes)),
          weights_from(gemm.address_in_weights(Weights::first_operand(lane))),
          weights_to(gemm.address_in_weights(Weights::first_place(lane.thread))) {}
  };

  // How much of the inner dimension a step has.
  __device__ __forceinline__ int inner_of_step(int step) const {
    const int whole_steps = static_cast<int>(args_.inner / kGemmStep);
    return step < whole_steps ? kGemmStep : step == whole_steps ? last_inner() : 0;
  }
  __device__ __forceinline__ int last_inner() const { return static_cast<int>(args_.inner % kGemmStep); }

  // The part of the weight that this thread loads: the codes of a step go to a stage, and their scales to registers.
  struct WeightSlice {
    unsigned thread;
    Position<kAligned> position;  // in the weight
    std::uint32_t last_chunk;     // that it may load
    PendingScale<kAligned> scale;
  };
  // The scales of as many steps as the weight is ahead of the multiply.
  using Scales = Scale[kStages - 1];

  __device__ void multiply(int first, int steps) {
    const Lane lane;
    const Addresses at(*this, lane);
    const std::int64_t inner0 = std::int64_t{first} * kGemmStep;
    XRows<T, Tile> x(lane, args_.x, row0(), rows(), inner0);
    const std::int64_t element =
        tile_rows_.weight_offset() +
        Weights::element(args_.weight, inner0 + Weights::inner_of(lane.thread), col0() + Weights::col_of(lane.thread));
    WeightSlice slice = {lane.thread,
                         static_cast<Position<kAligned>>(kAligned ? element / kChunk : element),
                         last_chunk_of(lane.thread),
                         {}};
    Scales scales = {};
    const int end = first + steps;
    // How many steps are full, and in how many this thread's vector of X exists.
    const int whole_steps = static_cast<int>(args_.inner / kGemmStep);
    const int x_steps = kAligned && x.inner() < last_inner() ? whole_steps + 1 : whole_steps;

    // The weight is one step ahead, so its first step is decoded before the loop.
    fetch_weight(at.copy_to.at(kLastStage), slice, first);
    cp_async_commit();
    const Scale first_scale = slice.scale.finish(scales_);
#pragma unroll 1
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      if (ahead < steps) {
        fetch_x(at.copy_to.at(ahead * kStageBytes), x, first + ahead, x_steps);
        fetch_weight(at.copy_to.at(ahead * kStageBytes), slice, first + ahead + 1);
      }
      cp_async_commit();  // an empty group too: the n-th is always step n's
      push(scales, slice);
    }
    cp_async_wait<kStages - 1>();
    const GemmCodes<Tile> first_codes = load_codes<Tile>(at.copy_to.at(kLastStage).at(kCodesOffset));
#pragma unroll
    for (unsigned v = 0; v < kChunkVectors; ++v) decode<T, Weights>(table_, at.weights_to, first_codes, first_scale, v);

    std::uint32_t stage = 0, buffer = 0;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      cp_async_wait<kStages - 2>();
      sync_threads();  // this step is complete for all, and all have read the one before
      if (step + kStages - 1 < end) {
        const SharedAddress to = at.copy_to.at(stage_before(stage));
        fetch_x(to, x, step + kStages - 1, x_steps);
        fetch_weight(to, slice, step + kStages);
      }
      cp_async_commit();
      const GemmCodes<Tile> codes = load_codes<Tile>(at.copy_to.at(stage).at(kCodesOffset));
      const SharedAddress next = at.weights_to.at(buffer ^ kBufferBytes);
#pragma unroll
      for (unsigned k = 0; k < kChunkVectors; ++k) {
        decode<T, Weights>(table_, next, codes, scales[0], k);
        accumulators_.multiply(at.x_from.at(stage), at.weights_from.at(buffer), k);
      }
      push(scales, slice);
      stage = stage_after(stage);
      buffer ^= kBufferBytes;
    }
    sync_threads();  // the next tile begins with stages that have been read
  }
  static_assert(kChunkVectors * kMmaInner == kGemmStep);

  // Chunks beyond the product are multiplied by zeros of X, or belong to columns that are not stored. So almost any
  // chunk will do there, and a chunk beyond the weight becomes its last. In dX, where they are multiplied for all
  // columns, it becomes the last of its own columns: 0 times a scale that is not finite is NaN, and so are these
  // columns anyway.
  __device__ __forceinline__ std::uint32_t last_chunk_of(unsigned thread) const {
    const std::uint32_t last = args_.last_chunk - (kThreadChunks - 1);
    if constexpr (Weights::kForward || !kAligned) return last;
    const std::int64_t element =
        tile_rows_.weight_offset() + Weights::element(args_.weight, args_.inner - 1, col0() + Weights::col_of(thread));
    const auto chunk = static_cast<std::uint32_t>(static_cast<std::uint64_t>(element) / kChunk);
    return chunk < last ? chunk : last;
  }
  __device__ __forceinline__ void fetch_x(const SharedAddress& to, XRows<T, Tile>& x, int step, int x_steps) const {
    if constexpr (kAligned) {
      x.fetch_vectors(to, step < x_steps);
    } else {
      x.fetch_elements(to, args_.x.stride, rows(), inner_of_step(step));
    }
    x.next_step();
  }
  __device__ __forceinline__ void fetch_weight(const SharedAddress& to, WeightSlice& slice, int step) const {
    if constexpr (kAligned) {
      const std::uint32_t chunk = slice.position < slice.last_chunk ? slice.position : slice.last_chunk;
      const std::uint8_t* const from = args_.weight.codes + std::uint64_t{chunk} * kChunkBytes;
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        cp_async_or_zeros(to.at(kCodesOffset + i * kGemmThreads * kChunkBytes), from + i * kChunkBytes, 1);
      }
      slice.scale.fetch(scales_, chunk);
      slice.position += static_cast<std::uint32_t>(Weights::step(args_.weight) / kChunk);
    } else {
      const int inner = inner_of_step(step) - static_cast<int>(Weights::inner_of(slice.thread));
      const int col = cols() - static_cast<int>(Weights::col_of(slice.thread));
      const int count = inner <= 0 || col <= 0 ? 0 : Weights::kForward ? inner : col;
      Vector<std::uint32_t, kCodeWords> words[1];
      gather_codes<4>(args_.weight.codes, slice.position, count, words);
      store_shared(to.at(kCodesOffset), words[0]);
      slice.scale.fetch(args_.weight, scales_, slice.position, count);
      slice.position += Weights::step(args_.weight);
    }
  }
  // Makes the scale that fetch_weight() has begun to read the last of `scales`.
  __device__ __forceinline__ void push(Scales& scales, const WeightSlice& slice) const {
#pragma unroll
    for (int s = 0; s < kStages - 2; ++s) scales[s] = scales[s + 1];
    scales[kStages - 2] = slice.scale.finish(scales_);
  }

  // ---- the adapter: a few more of the inner dimension ---------------------------------------------------------------

  __device__ void add_lora() {
    const Lane lane;
    const Addresses at(*this, lane);
    const std::int64_t rank = args_.u.cols;
    griddepcontrol_wait();  // for the kernel that makes U or V
    if constexpr (kGrouped) {
      add_adapters(lane, at);
    } else {
#pragma unroll 1
      for (std::int64_t r0 = 0; r0 < rank; r0 += kGemmStep) {
        add_lora_step(lane, at, r0, rank - r0 < kGemmStep ? static_cast<int>(rank - r0) : kGemmStep);
      }
    }
    if constexpr (!Weights::kForward) {
      // The accumulators hold nothing else yet, and the mask must fall on nothing else.
      if (rank > 0 && args_.dropout.threshold > 0) {
        accumulators_.drop(args_.dropout.with_seed(), row0() + lane.row<Tile>(), col0() + lane.col<Tile>());
      }
    }
  }
  // With rows in groups, multiplies by the adapters that the tile has rows of, as many at a time as a step holds.
  __device__ void add_adapters(const Lane& lane, const Addresses& at) {
    const std::int64_t padded = padded_rank(args_);
    TileAdapters<Tile::kRows> adapters(args_, tile_rows_.tile());
#pragma unroll 1
    for (;;) {
      int count = 0;
      while ((count + 1) * padded <= kGemmStep || count == 0) {
        if (!adapters.next()) break;
        if (thread_index() == 0) shared_.adapters[count] = adapters.adapter();
        ++count;
      }
      if (count == 0) return;
      for (int i = count; i < Shared::kAdapters; ++i) {
        if (thread_index() == 0) shared_.adapters[i] = -1;
      }
      sync_threads();
      const std::int64_t all = count * padded;
#pragma unroll 1
      for (std::int64_t r0 = 0; r0 < all; r0 += kGemmStep) {
        add_lora_step(lane, at, r0, all - r0 < kGemmStep ? static_cast<int>(all - r0) : kGemmStep);
      }
    }
  }
  // Both operands pass through the first stage and the first buffer of weights, as in other steps.
  __device__ __forceinline__ void add_lora_step(const Lane& lane, const Addresses& at, std::int64_t r0,
                                                int step_inner) {
    const int inner = XRows<T, Tile>::inner_of(lane);
    const AdapterRank at_place = adapter_rank_at<kGrouped>(args_, shared_.adapters, r0 + inner);
    XRows<T, Tile> x(lane, args_.u, row0(), rows(), at_place.r - inner);
    int x_inner = step_inner;
    if constexpr (kGrouped) {
      const RowSpan span = TileAdapters<Tile::kRows>::rows_of(args_, tile_rows_.tile(), at_place.adapter);
      x.mask_rows(tile_rows_.in_tile(span.begin), tile_rows_.in_tile(span.end));
      const std::int64_t rest = args_.u.cols - at_place.r;
      x_inner = inner + (rest < kGemmStep ? static_cast<int>(rest) : kGemmStep);
    }
    if (args_.u_has_vectors) {
      x.template fetch_vectors<kGrouped>(at.copy_to, x.inner() < x_inner);
    } else {
      x.template fetch_elements<kGrouped>(at.copy_to, args_.u.stride, rows(), x_inner);
    }
    cp_async_commit();
#pragma unroll 1
    for (unsigned v = 0; v < kThreadChunks * kChunkVectors; ++v) store_lora(at.weights_to, lane.thread, r0, v);
    cp_async_wait<0>();
    sync_threads();
#pragma unroll 1
    for (int k = 0; k * kMmaInner < step_inner; ++k) accumulators_.multiply(at.x_from, at.weights_from, k);
    sync_threads();  // before the stage is filled again
  }
  // Stores a vector of the thread's slice of a step, where decode() would put it.
  __device__ __forceinline__ void store_lora(const SharedAddress& to, unsigned thread, std::int64_t r0,
                                             unsigned vector) const {
    const unsigned first = vector / kChunkVectors * kChunk;
    const std::int64_t inner = Weights::inner_of(thread), col = col0() + Weights::col_of(thread);
    // Forward, the eight elements of the vector are adjacent along the rank.
    const AdapterRank at_place = adapter_rank_at<kGrouped>(
        args_, shared_.adapters, r0 + inner + (Weights::kForward ? first + vector % kChunkVectors * kVecSize : 0));
    const auto at = [&](std::int64_t r, std::int64_t col) {
      return lora_at<Weights::kForward>(args_, r, col, at_place.adapter);
    };
    Vec8 eight;
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      const unsigned e = first + 2 * Weights::byte_of_chunk(vector % kChunkVectors, j);
      eight.at[j] = Weights::kForward ? pack_pair<T>(at(at_place.r + 2 * j, col), at(at_place.r + 2 * j + 1, col))
                                      : pack_pair<T>(at(at_place.r, col + e), at(at_place.r, col + e + 1));
    }
    store_shared(to.xor_swizzled(vector * kVectorBytes), eight);
  }

  // ---- epilogue -----------------------------------------------------------------------------------------------------

  __device__ void finish(const TilePart& part) {
    go_to(part);
    if (!stream_k_.complete_tile<Tile::kRows * Tile::kCols>(part, accumulators_)) return;
    const Lane lane;
    const std::int64_t row = row0() + lane.row<Tile>(), col = col0() + lane.col<Tile>();
    const T* const bias = static_cast<const T*>(args_.bias);
    accumulators_.store(static_cast<T*>(args_.out.data) + row * args_.out.stride + col, args_.out.stride,
                        bias == nullptr ? nullptr : bias + tile_rows_.bias_offset() + col,
                        rows() - static_cast<int>(lane.row<Tile>()), cols() - static_cast<int>(lane.col<Tile>()));
  }

  const GemmArgs& args_;
  Shared& shared_;
  const TileRows<kGrouped, Tile::kRows> tile_rows_;
  const StreamK stream_k_;
  const ScaleReader<kAligned> scales_;
  const typename Shared::Table table_;
  int row_tile_ = 0, col_tile_ = 0;
  GemmAccumulators<T, Weights, Tile> accumulators_;
};

// Weights: DecodedRows (forward) or DecodedColumns (backward).
template <class T, template <class> class Weights, class Tile, bool kGrouped>
__global__ void __launch_bounds__(kGemmThreads, Tile::kBlocks) gemm_kernel(const __grid_constant__ GemmArgs args) {
  Gemm<T, Weights<Tile>, Tile, kGrouped> gemm(args, GemmShared<T, Weights<Tile>, Tile>::in_dynamic_smem());
  gemm.prepare();
  gemm.run();
}

}  // namespace qlora_native::QLN_CUDA
