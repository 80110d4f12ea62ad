// The product with a quantized weight on tensor cores, forward and backward: cuda/README.md follows a tile through it.
//
// A block of 8 warps computes one tile of out after another, or a part of a tile's inner dimension. The inner dimension
// passes through shared memory, 64 at a time: the left operand as it is, and the weight as codes, which are decoded by
// the thread that has copied them. While one step is multiplied, the weight of the next step is decoded:
//
//   step, 2 stages   i - 1            i                  i + 1
//   copied           X i, codes i+1   X i+1, codes i+2   X i+2, codes i+3
//   decoded          W i              W i+1              W i+2              into two buffers in turn
//   multiplied       X i-1 . W i-1    X i . W i          X i+1 . W i+1
//
// One barrier a step serves all purposes. A thread that passes it knows that the left operand and the decoded weight of
// step i are there, and that all threads have read step i - 1, whose places it may write to.
#pragma once

#include "device/elements.cuh"
#include "product/gemm/accumulators.cuh"
#include "product/gemm/operands.cuh"
#include "product/gemm/shared.cuh"
#include "product/gemm/tile_rows.cuh"
#include "product/product.cuh"
#include "product/stream_k.cuh"
#include "product/tile.cuh"

namespace qlora_native::QLN_CUDA {

template <class T, class Weights, class Tile, bool kGrouped>
class Gemm {
  using Shared = GemmShared<T, Weights, Tile>;
  using Stage = typename Shared::Stage;
  using Left = LeftStage<T, Tile>;
  using Scale = ChunkScale<Tile::kAligned>;
  static constexpr bool kAligned = Tile::kAligned;
  static constexpr int kStages = Tile::kStages, kThreadChunks = Tile::kThreadChunks;

 public:
  __device__ Gemm(const GemmArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        tile_rows_(args),
        stream_k_(tile_rows_.config(), args.stream_k),
        scales_(args.weight, args.scales, shared.nested),
        table_(shared.rows->pairs) {}

  // Computes the block's run of steps: the end of a tile, whole tiles, and the beginning of one.
  __device__ void run() {
    if (kGrouped && shared_.run < 0) return griddepcontrol_wait();
    for (std::uint32_t done = 0;;) {  // counts steps; 2^32 of them would take minutes
      const TilePart part = stream_k_.part_after(shared_.run, done);
      if (part.count == 0) return;
      go_to(part);
      tile_rows_.go_to(part.tile);
      sums_.clear();
      if (part.first == 0) add_low_rank();
      multiply(part.first, part.count);
      finish(part);
      done += static_cast<std::uint32_t>(part.count);
    }
  }

  // Gets the block's run, and fills the tables that all of the run needs.
  __device__ void prepare() {
    tile_rows_.prepare();
    if (thread_index() == 0) shared_.run = stream_k_.take_run();
    Shared::Table::fill(shared_.rows->pairs, args_.weight.code);
    shared_.nested.fill(args_.weight);
    sync_threads();
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

  // ---- the inner dimension in steps -------------------------------------------------------------------------------

  // A stage is passed as its distance in bytes from the first.
  static constexpr std::uint32_t kStageBytes = sizeof(Stage);
  static_assert(offsetof(Stage, left) == 0 && kStageBytes % kStageAlignment == 0);
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
  // Returns where a thread's share of the left operand is. Its share of the codes begins kCodesOffset bytes after it.
  __device__ SharedAddress address_of_share(const Lane& lane) const {
    return address_in_stage(lane.thread * kVectorBytes);
  }

  // Where this thread reads and writes in the first stage. It does so at the same places of every other stage.
  struct Addresses {
    SharedAddress left_from, copy_to;        // left operand: where ldmatrix reads, and where copies go
    SharedAddress weights_from, weights_to;  // weights: where ldmatrix reads, and where decoded ones go
    __device__ Addresses(const Gemm& gemm, const Lane& lane)
        : left_from(gemm.address_in_stage(Left::first_operand(lane))),
          copy_to(gemm.address_of_share(lane)),
          weights_from(gemm.address_in_weights(Weights::first_operand(lane))),
          weights_to(gemm.address_in_weights(Weights::first_place(lane.thread))) {}
  };

  // How much of the inner dimension a step has.
  __device__ __forceinline__ int inner_of_step(int step) const {
    const int whole_steps = static_cast<int>(args_.inner / kGemmStep);
    return step < whole_steps ? kGemmStep : step == whole_steps ? last_inner() : 0;
  }
  __device__ __forceinline__ int last_inner() const { return static_cast<int>(args_.inner % kGemmStep); }

  // The part of the weight that this thread brings: the codes of a step go to a stage, and their scales to registers.
  struct WeightShare {
    unsigned thread;
    Position<kAligned> position;  // in the weight
    PendingScale<kAligned> scale;
  };
  // The scales of as many steps as the weight is ahead of the multiply.
  using Scales = Scale[kStages - 1];

  __device__ void multiply(int first, int steps) {
    const Lane lane;
    const Addresses at(*this, lane);
    const std::int64_t inner0 = std::int64_t{first} * kGemmStep;
    LeftRows<T, Tile> left(lane, args_.left, row0(), rows(), inner0);
    const std::int64_t element =
        tile_rows_.weight_offset() +
        Weights::element(args_.weight, inner0 + Weights::inner_of(lane.thread), col0() + Weights::col_of(lane.thread));
    WeightShare share = {lane.thread, static_cast<Position<kAligned>>(kAligned ? element / kChunk : element), {}};
    Scales scales = {};
    const int end = first + steps;
    // How many steps are full, and in how many this thread's vector of the left operand is there.
    const int whole_steps = static_cast<int>(args_.inner / kGemmStep);
    const int left_steps = kAligned && left.inner() < last_inner() ? whole_steps + 1 : whole_steps;

    // The weight is one step ahead, so its first step is decoded before the loop.
    fetch_weight(at.copy_to.at(kLastStage), share, first);
    cp_async_commit();
    const Scale first_scale = share.scale.finish(scales_);
#pragma unroll 1
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      if (ahead < steps) {
        fetch_left(at.copy_to.at(ahead * kStageBytes), left, first + ahead, left_steps);
        fetch_weight(at.copy_to.at(ahead * kStageBytes), share, first + ahead + 1);
      }
      cp_async_commit();  // an empty group too: the n-th is always step n's
      push(scales, share);
    }
    cp_async_wait<kStages - 1>();
    const Codes first_codes = codes_at(at.copy_to.at(kLastStage));
#pragma unroll
    for (unsigned v = 0; v < kChunkVectors; ++v) decode(at.weights_to, first_codes, first_scale, v);

    std::uint32_t stage = 0, buffer = 0;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      cp_async_wait<kStages - 2>();
      sync_threads();  // this step is there for all, and the one before has been read by all
      if (step + kStages - 1 < end) {
        const SharedAddress to = at.copy_to.at(stage_before(stage));
        fetch_left(to, left, step + kStages - 1, left_steps);
        fetch_weight(to, share, step + kStages);
      }
      cp_async_commit();
      const Codes codes = codes_at(at.copy_to.at(stage));
      const SharedAddress next = at.weights_to.at(buffer ^ kBufferBytes);
#pragma unroll
      for (unsigned k = 0; k < kChunkVectors; ++k) {
        decode(next, codes, scales[0], k);
        sums_.multiply(at.left_from.at(stage), at.weights_from.at(buffer), k);
      }
      push(scales, share);
      stage = stage_after(stage);
      buffer ^= kBufferBytes;
    }
    sync_threads();  // the next tile begins with stages that have been read
  }
  static_assert(kChunkVectors * kMmaInner == kGemmStep);

  __device__ __forceinline__ void fetch_left(const SharedAddress& to, LeftRows<T, Tile>& left, int step,
                                             int left_steps) const {
    if constexpr (kAligned) {
      left.fetch_vectors(to, step < left_steps);
    } else {
      left.fetch_elements(to, args_.left.stride, rows(), inner_of_step(step));
    }
    left.next_step();
  }
  __device__ __forceinline__ void fetch_weight(const SharedAddress& to, WeightShare& share, int step) const {
    if constexpr (kAligned) {
      // Chunks beyond the product are multiplied by zeros of the left operand, or belong to columns that are not
      // stored. So any chunk will do there, and a chunk beyond the weight becomes its last.
      const std::uint32_t last = args_.last_chunk - (kThreadChunks - 1);
      const std::uint32_t chunk = share.position < last ? share.position : last;
      const std::uint8_t* const from = args_.weight.codes + std::uint64_t{chunk} * kChunkBytes;
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        cp_async_or_zeros(to.at(kCodesOffset + i * kGemmThreads * kChunkBytes), from + i * kChunkBytes, 1);
      }
      share.scale.fetch(scales_, chunk);
      share.position += static_cast<std::uint32_t>(Weights::step(args_.weight) / kChunk);
    } else {
      const int inner = inner_of_step(step) - static_cast<int>(Weights::inner_of(share.thread));
      const int col = cols() - static_cast<int>(Weights::col_of(share.thread));
      const int count = inner <= 0 || col <= 0 ? 0 : Weights::kForward ? inner : col;
      Vector<std::uint32_t, kCodeWords> words[1];
      gather_codes<4>(args_.weight.codes, share.position, count, words);
      store_shared(to.at(kCodesOffset), words[0]);
      share.scale.fetch(args_.weight, scales_, share.position, count);
      share.position += Weights::step(args_.weight);
    }
  }
  // Makes the scale that fetch_weight() has begun to read the last of `scales`.
  __device__ __forceinline__ void push(Scales& scales, const WeightShare& share) const {
#pragma unroll
    for (int s = 0; s < kStages - 2; ++s) scales[s] = scales[s + 1];
    scales[kStages - 2] = share.scale.finish(scales_);
  }

  struct Codes {
    Vector<std::uint32_t, kCodeWords> chunks[kThreadChunks];
  };
  __device__ __forceinline__ Codes codes_at(const SharedAddress& from) const {
    Codes codes;
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      codes.chunks[i] =
          load_shared<Vector<std::uint32_t, kCodeWords>>(from.at(kCodesOffset + i * kGemmThreads * kChunkBytes));
    }
    return codes;
  }
  // Decodes one vector of each of the thread's chunks. `to`: where the first vector of the first chunk stands.
  __device__ __forceinline__ void decode(const SharedAddress& to, const Codes& codes, const Scale& scale,
                                         unsigned vector) const {
#pragma unroll
    for (unsigned i = 0; i < kThreadChunks; ++i) {
      Vec8 eight;
#pragma unroll
      for (unsigned j = 0; j < 4; ++j) {
        const unsigned byte = Weights::byte_of_chunk(vector, j);
        const auto pair = table_.pair_of_byte(codes.chunks[i].at[byte / 4], byte % 4);
        const int e = static_cast<int>(2 * byte);
        eight.at[j] = pack_pair<T>(pair.at[0] * scale.at(e), pair.at[1] * scale.at(e + 1));
      }
      store_shared(to.xor_swizzled((i * kChunkVectors + vector) * kVectorBytes), eight);
    }
  }

  // ---- the adapter: a few more of the inner dimension --------------------------------------------------------------

  __device__ void add_low_rank() {
    const Lane lane;
    const Addresses at(*this, lane);
    const std::int64_t rank = args_.low_rank.cols;
    griddepcontrol_wait();  // which makes U or V
    if constexpr (kGrouped) {
      add_adapters(lane, at);
    } else {
#pragma unroll 1
      for (std::int64_t r0 = 0; r0 < rank; r0 += kGemmStep) {
        add_low_rank_step(lane, at, r0, rank - r0 < kGemmStep ? static_cast<int>(rank - r0) : kGemmStep);
      }
    }
    if constexpr (!Weights::kForward) {
      // This comes before anything else is in the sums, because the mask must fall on nothing else.
      if (rank > 0 && args_.dropout.threshold > 0) {
        sums_.drop(args_.dropout.with_seed(), row0() + lane.row<Tile>(), col0() + lane.col<Tile>());
      }
    }
  }
  // With rows in groups, multiplies by the adapters that the tile has rows of, as many at a time as a step has room
  // for. In a step an adapter takes as many places as it has rank, rounded up to whole products of mma.
  __device__ __forceinline__ std::int64_t padded_rank() const {
    return ceil_div(args_.low_rank.cols, kMmaInner) * kMmaInner;
  }
  __device__ void add_adapters(const Lane& lane, const Addresses& at) {
    const std::int64_t padded = padded_rank();
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
        add_low_rank_step(lane, at, r0, all - r0 < kGemmStep ? static_cast<int>(all - r0) : kGemmStep);
      }
    }
  }
  // Which r of the rank of which adapter stands at a place. r is the rank or more where there is none.
  struct AdapterRank {
    std::int64_t r;
    int adapter;
  };
  __device__ __forceinline__ AdapterRank adapter_rank_at(std::int64_t place) const {
    if constexpr (!kGrouped) return {place, 0};
    const std::int64_t padded = padded_rank();
    if (padded > kGemmStep) return {place, shared_.adapters[0]};
    const int adapter = shared_.adapters[place / padded];
    return {adapter < 0 ? args_.low_rank.cols : place % padded, adapter < 0 ? 0 : adapter};
  }
  // Both operands pass through the first stage and the first buffer of weights, as in other steps.
  __device__ __forceinline__ void add_low_rank_step(const Lane& lane, const Addresses& at, std::int64_t r0,
                                                    int step_inner) {
    const int inner = LeftRows<T, Tile>::inner_of(lane);
    const AdapterRank own = adapter_rank_at(r0 + inner);
    LeftRows<T, Tile> left(lane, args_.low_rank, row0(), rows(), own.r - inner);
    int left_inner = step_inner;
    if constexpr (kGrouped) {
      const RowSpan span = TileAdapters<Tile::kRows>::rows_of(args_, tile_rows_.tile(), own.adapter);
      left.keep(tile_rows_.in_tile(span.begin), tile_rows_.in_tile(span.end));
      const std::int64_t rest = args_.low_rank.cols - own.r;
      left_inner = inner + (rest < kGemmStep ? static_cast<int>(rest) : kGemmStep);
    }
    if (args_.low_rank_vectors) {
      left.template fetch_vectors<kGrouped>(at.copy_to, left.inner() < left_inner);
    } else {
      left.template fetch_elements<kGrouped>(at.copy_to, args_.low_rank.stride, rows(), left_inner);
    }
    cp_async_commit();
#pragma unroll 1
    for (unsigned v = 0; v < kThreadChunks * kChunkVectors; ++v) store_right(at.weights_to, lane.thread, r0, v);
    cp_async_wait<0>();
    sync_threads();
#pragma unroll 1
    for (int k = 0; k * kMmaInner < step_inner; ++k) sums_.multiply(at.left_from, at.weights_from, k);
    sync_threads();  // before the stage is filled again
  }
  // Stores a vector of the thread's share of a step, where decode() would put it.
  __device__ __forceinline__ void store_right(const SharedAddress& to, unsigned thread, std::int64_t r0,
                                              unsigned vector) const {
    const unsigned first = vector / kChunkVectors * kChunk;
    const std::int64_t inner = Weights::inner_of(thread), col = col0() + Weights::col_of(thread);
    // Forward, the eight elements of the vector are neighbours along the rank.
    const AdapterRank own =
        adapter_rank_at(r0 + inner + (Weights::kForward ? first + vector % kChunkVectors * kVecSize : 0));
    const auto at = [&](std::int64_t r, std::int64_t col) {
      return right_at<Weights::kForward>(args_, r, col, own.adapter);
    };
    Vec8 eight;
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      const unsigned e = first + 2 * Weights::byte_of_chunk(vector % kChunkVectors, j);
      eight.at[j] = Weights::kForward ? pack_pair<T>(at(own.r + 2 * j, col), at(own.r + 2 * j + 1, col))
                                      : pack_pair<T>(at(own.r, col + e), at(own.r, col + e + 1));
    }
    store_shared(to.xor_swizzled(vector * kVectorBytes), eight);
  }

  // ---- results -----------------------------------------------------------------------------------------------------

  __device__ void finish(const TilePart& part) {
    go_to(part);
    if (!stream_k_.complete_tile<Tile::kRows * Tile::kCols>(part, sums_)) return;
    const Lane lane;
    const std::int64_t row = row0() + lane.row<Tile>(), col = col0() + lane.col<Tile>();
    const T* const bias = static_cast<const T*>(args_.bias);
    sums_.store(static_cast<T*>(args_.out.data) + row * args_.out.stride + col, args_.out.stride,
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
  GemmSums<T, Weights, Tile> sums_;
};

// Weights: DecodedRows (forward) or DecodedColumns (backward).
template <class T, template <class> class Weights, class Tile, bool kGrouped>
__global__ void __launch_bounds__(kGemmThreads, Tile::kBlocks) gemm_kernel(const __grid_constant__ GemmArgs args) {
  Gemm<T, Weights<Tile>, Tile, kGrouped> gemm(args, GemmShared<T, Weights<Tile>, Tile>::in_dynamic_smem());
  gemm.prepare();
  gemm.run();
}

// ---- on the host ----

template <template <class> class Weights>
void gemm(const Product& product, const GemmConfig& config, Counters& counters, const Stream& stream) {
  if (config.blocks == 0) return;
  const StreamKWorkspace workspace(config, counters, stream);
  const GemmArgs args(product, config, workspace);
  const auto launch_for = [&]<class T, int kRows, int kCols, bool kAligned>() {
    using Tile = GemmTile<kRows, kCols, kAligned>;
    const LaunchShape shape = {.blocks = config.blocks,
                               .threads = kGemmThreads,
                               .smem_bytes = GemmShared<T, Weights<Tile>, Tile>::bytes(),
                               .programmatic_launch = args.follows_low_rank()};
    if constexpr (kAligned && kCols == kGemmCols) {
      if (config.grouped) return launch<gemm_kernel<T, Weights, Tile, true>>(shape, stream, args);
    }
    launch<gemm_kernel<T, Weights, Tile, false>>(shape, stream, args);
  };
  // The tiles that product_config chooses among.
  const auto launch_tile = [&]<class T>() {
    if (config.tile_cols == kGemmWideCols)
      return launch_for.template operator()<T, kGemmManyRows, kGemmWideCols, true>();
    switch (config.tile_rows) {
      case kGemmTallRows:
        return launch_for.template operator()<T, kGemmTallRows, kGemmCols, true>();
      case kGemmManyRows:
        return launch_for.template operator()<T, kGemmManyRows, kGemmCols, true>();
      case kGemmMiddleRows:
        if (config.aligned) return launch_for.template operator()<T, kGemmMiddleRows, kGemmCols, true>();
        return launch_for.template operator()<T, kGemmMiddleRows, kGemmCols, false>();
      case kGemmFewRows:
        if (config.aligned) return launch_for.template operator()<T, kGemmFewRows, kGemmCols, true>();
        return launch_for.template operator()<T, kGemmFewRows, kGemmCols, false>();
    }
  };
  if (args.left.dtype == DType::bf16) {
    launch_tile.template operator()<Bf16>();
  } else {
    launch_tile.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
