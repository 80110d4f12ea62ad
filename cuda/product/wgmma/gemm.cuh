// The product with a quantized weight on compute capability 9.0, by wgmma: README.md follows a tile through it.
//
//   forward    Y^T[128 of N, rows of M] = [ W | s*B ] . [ X | U ]^T
//   backward  dX^T[128 of K, rows of M] = [ W^T | A^T ] . [ dY | V ]^T
//
// The weight is wgmma's operand a, which consumers decode from shared memory to registers. The left operand, X or dY,
// is its operand b, which TMA puts into shared memory in the order that wgmma takes. A block computes one tile of the
// result after another, or a part of a tile's inner dimension (HopperConfig), in steps of 64:
//
//   producers, 3 warps    bring what a step needs into a stage that is empty: one asks TMA for the left operand and
//                         codes, and two bring scales
//   consumers, 2 x 4      decode and multiply a stage that is full: a step is decoded while the products of the one
//                         before run. Forward, four warps have 64 of the result's columns; tile.cuh says how they share
//                         the work of dX
//
// The barrier `full` of a stage counts its bytes and the producers; `empty` counts the warps of consumers. In a pair of
// blocks (HopperConfig::pairs) each asks for half of the left operand's rows, for both of them. So a stage is empty
// when the consumers of both have read it. Operands are what product_config asks for: 4 bits, blocks of 64 or more, K a
// multiple of 64, rows of 16-byte vectors, rank a multiple of 8.
#pragma once

#include "product/stream_k.cuh"
#include "product/wgmma/cluster_reduce.cuh"
#include "product/wgmma/weights.cuh"

namespace qlora_native::QLN_CUDA {

// The registers of a kernel are shared out anew: each of its 384 threads begins with 168, and then has one of these
// numbers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// The matrices whose tiles TMA loads. Without a rank there is no map of low_rank.
struct HopperMaps {
  TensorMap left, low_rank, codes;
};

struct HopperArgs : GemmArgs {
  HopperArgs(const Product& product, const HopperConfig& config, const StreamKWorkspace& workspace)
      : GemmArgs(product, config.gemm, workspace), cluster(config.cluster), pairs(config.pairs ? 1 : 0) {}

  int cluster;  // as HopperConfig has it
  int pairs;    // 1 or 0: two tiles, or one, belong to a cluster of blocks
};

template <class T, class Weights, class Tile>
class HopperGemm {
  using Shared = HopperShared<T, Tile>;
  using Stage = typename Shared::Stage;
  using Sums = HopperSums<Tile>;
  static constexpr int kProducts = Tile::kProducts;
  static_assert(Weights::kTileRows * Weights::kTileRowBytes == Shared::kCodeBytes);
  static constexpr int kConsumerBarrier = 1, kTablesBarrier = 2;  // numbers of barriers

 public:
  __device__ HopperGemm(const HopperArgs& args, const HopperMaps& maps, Shared& shared)
      : args_(args),
        maps_(maps),
        shared_(shared),
        stream_k_(args.config, args.stream_k),
        scales_(args.weight, args.scales, shared.levels),
        table_(shared.rows->pairs),
        own_(int_in_register(rank_of_block(args))),
        first_left_(descriptor_of_swizzled_rows(shared_address(shared.stages)) +
                    descriptor_step(HopperLane<Tile>().first_inner())) {}

  // Sets up the block's run and its barriers. Then producers may ask for copies, while consumers fill the tables.
  __device__ void prepare() {
    if (thread_index() == 0) {
      shared_.run = stream_k_.take_run();
      for (int i = 0; i < Tile::kStages; ++i) {
        mbarrier_init(&shared_.full[i], Tile::kScaleWarps + 1);  // and the thread that asks for copies
        mbarrier_init(&shared_.empty[i], Tile::kConsumerWarps << args_.pairs);
      }
      for (std::uint64_t& turn : shared_.sums) mbarrier_init(&turn, 1);
      fence_mbarrier_init();
      prefetch_map(maps_.left);
      prefetch_map(maps_.codes);
    }
    if (args_.pairs != 0) return wait_until_peer_has_barriers();
    sync_threads();
  }
  __device__ void run() {
    const int block_warp = warp_uniform(thread_index() / kWarp);
    if (block_warp < Tile::kConsumerWarps) {
      increase_max_registers<kConsumerRegisters>();
      prefetch_right();
      Shared::Table::fill(shared_.rows->pairs, args_.weight.code, Tile::kConsumers);
      shared_.levels.fill(args_.weight, Tile::kConsumers);
      wait_for_tables();
      for_each_part([&](const TilePart& part) { consume(part); });
    } else {
      decrease_max_registers<kProducerRegisters>();
      const int warp = block_warp - Tile::kConsumerWarps;
      if (warp < Tile::kScaleWarps) for_each_part([&](const TilePart& part) { bring_scales(part); });
      if (warp == Tile::kScaleWarps) {
        if (args_.pairs == 0) {
          for_each_part([&](const TilePart& part) { ask_for_tiles<false>(part); });
        } else {
          for_each_part([&](const TilePart& part) { ask_for_tiles<true>(part); });
        }
        wait_until_stages_are_read();
      }
      sync_warp();  // for the barriers of a cluster
      if (args_.cluster > 1) wait_until_stages_are_free();
    }
  }

 private:
  // Producers and consumers walk through the same parts of the block's run, and so through the same stages.
  template <class F>
  __device__ __forceinline__ void for_each_part(const F& f) const {
#pragma unroll 1
    for (std::uint32_t done = 0;;) {
      const TilePart part = part_after(done);
      if (part.count == 0) return;
      f(part);
      done += static_cast<std::uint32_t>(part.count);
    }
  }
  // The part that comes after the block's first `done` steps; it has no steps if there is none.
  __device__ __forceinline__ TilePart part_after(std::uint32_t done) const {
    const GemmConfig& config = args_.config;
    if (args_.cluster == 0) return stream_k_.part_after(shared_.run, done);
    // The blocks of a tile share its steps in the order of their ranks.
    const int rank = rank_in_tile();
    const int first = rank * config.steps / args_.cluster;
    const int count = (rank + 1) * config.steps / args_.cluster - first;
    const std::int64_t tile = (block_index() + done / count * config.blocks) / args_.cluster;
    return {0, tile, first, tile < config.tiles ? count : 0, false};
  }
  // The blocks of a cluster follow each other in the grid: those of a tile, and then those of the pair's other tile.
  __device__ __forceinline__ int tile_in_pair() const { return args_.pairs != 0 && own_ >= args_.cluster ? 1 : 0; }
  __device__ __forceinline__ int rank_in_tile() const { return own_ - tile_in_pair() * args_.cluster; }
  // The rank, in the cluster, of this block, and of the one that has the same steps of the pair's other tile.
  __device__ __forceinline__ static int rank_of_block(const HopperArgs& args) {
    return args.cluster == 0 ? 0 : static_cast<int>(block_index() % (args.cluster << args.pairs));
  }
  __device__ __forceinline__ int peer() const { return own_ ^ args_.cluster; }
  // The coordinates of TMA have 32 bits. Tiles are counted down the rows, and in pairs two by two.
  __device__ __forceinline__ int row0(const TilePart& part) const {
    return static_cast<int>((part.tile >> args_.pairs) % args_.config.row_tiles) * Tile::kRows;
  }
  __device__ __forceinline__ int col0(const TilePart& part) const {
    const auto cols = static_cast<int>((part.tile >> args_.pairs) / args_.config.row_tiles);
    return (cols << args_.pairs | (static_cast<int>(part.tile) & args_.pairs)) * Tile::kCols;
  }
  // Keeps a value, so that it is not computed anew at each step, by divisions.
  __device__ __forceinline__ static int int_in_register(int value) {
    return static_cast<int>(in_register(static_cast<std::uint32_t>(value)));
  }
  // The adapter comes first, so only the block that has the beginning of a tile multiplies by it.
  __device__ __forceinline__ int rank_of(const TilePart& part) const {
    return part.first == 0 ? static_cast<int>(args_.low_rank.cols) : 0;
  }

  // Goes through the stages in turn. `parity` is the last bit of how often it has passed all of them.
  struct Ring {
    std::uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
      const bool wraps = stage == Tile::kStages - 1;
      stage = wraps ? 0 : stage + 1;
      if (wraps) parity ^= 1;
    }
  };
  __device__ __forceinline__ SharedAddress stage_address(std::uint32_t stage) const {
    return SharedAddress(shared_.stages).at(stage * sizeof(Stage));
  }

  // All consumers come here once, and the warps that read the levels of scales afterwards.
  __device__ __forceinline__ static void wait_for_tables() {
    sync_named_barrier<kTablesBarrier>(Tile::kConsumers + Tile::kScaleWarps * kWarp);
  }

  // ---- producers ----------------------------------------------------------------------------------------------------

  // One warp asks TMA for tiles.
  template <bool kPairs>
  __device__ void ask_for_tiles(const TilePart& part) {
    const int row0 = int_in_register(this->row0(part)), col0 = int_in_register(this->col0(part));
    const bool asks = thread_index() % kWarp == 0;
#pragma unroll 1
    for (int r = 0, rank = rank_of(part); r < rank; r += Tile::kStep) {
      wait_for_empty();
      if (asks) {
        griddepcontrol_wait();  // which makes U or V
        load<kPairs>(maps_.low_rank, row0, r, 0);
      }
      ring_.advance();
    }
#pragma unroll 1
    for (int step = part.first; step < part.first + part.count; ++step) {
      wait_for_empty();
      if (asks) {
        const int inner0 = step * Tile::kStep;
        load<kPairs>(maps_.left, row0, inner0, Shared::kCodeBytes);
        tma_load_tile(shared_.stages[ring_.stage].codes, maps_.codes, Weights::tile_row(inner0, col0),
                      Weights::tile_byte(inner0, col0), &shared_.full[ring_.stage]);
      }
      ring_.advance();
    }
  }
  // Thread i of the others brings the scales i and i + 64 of each step. Those of the next kAhead steps are on their
  // way.
  __device__ void bring_scales(const TilePart& part) {
#pragma unroll 1
    for (int r = 0, rank = rank_of(part); r < rank; r += Tile::kStep) {  // steps of the adapter, which have no scales
      if (r == 0) come_to_tables();  // now, because consumers wait there before they load B or A
      wait_for_empty();
      arrive_at_full();
    }
    constexpr int kAhead = 2, kThreads = Tile::kScaleWarps * kWarp, kScales = Tile::kCols / kThreads;
    const int thread = thread_index() - Tile::kConsumers, first = part.first * Tile::kStep, col0 = this->col0(part);
    std::uint32_t chunks[kScales];
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int scale = thread + i * kThreads;
      const std::int64_t element =
          Weights::element(args_.weight, first + Weights::scale_inner(scale), col0 + Weights::scale_col(scale));
      chunks[i] = static_cast<std::uint32_t>(static_cast<std::uint64_t>(element) / kChunk);
    }
    typename ScaleReader<true>::Raw raw[kAhead][kScales];
    // Chunks beyond the product are multiplied by zeros of the left operand, or belong to columns that are not stored.
    // So any chunk will do there, and a chunk beyond the weight becomes its last.
    const auto fetch = [&](typename ScaleReader<true>::Raw(&to)[kScales]) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        scales_.fetch(to[i], scales_.block_of(chunks[i] < args_.last_chunk ? chunks[i] : args_.last_chunk));
        chunks[i] += static_cast<std::uint32_t>(Weights::step(args_.weight) / kChunk);
      }
    };
#pragma unroll
    for (auto& step : raw) fetch(step);
    const float offset = ScaleReader<true>::offset_of(args_.weight);
    const SharedAddress scales = stage_address(0).at(offsetof(Stage, scales) + thread * sizeof(float)).in_register();
    come_to_tables();
#pragma unroll 1
    for (int rest = part.count; rest > 0; --rest) {
      float scale[kScales];
#pragma unroll
      for (int i = 0; i < kScales; ++i) scale[i] = scales_.finish(raw[0][i], offset);
#pragma unroll
      for (int step = 1; step < kAhead; ++step) {
#pragma unroll
        for (int i = 0; i < kScales; ++i) raw[step - 1][i] = raw[step][i];
      }
      fetch(raw[kAhead - 1]);
      wait_for_empty();
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        store_shared(scales.at(stage_offset() + i * kThreads * sizeof(float)), scale[i]);
      }
      arrive_at_full();
    }
  }
  __device__ __forceinline__ void come_to_tables() {
    if (has_tables_) return;
    wait_for_tables();
    has_tables_ = true;
  }
  __device__ __forceinline__ void wait_for_empty() const {
    mbarrier_wait(&shared_.empty[ring_.stage], ring_.parity ^ 1);
  }
  // Asks for a tile of rows, or for the pair's half of it; `other_bytes` is how many other bytes will come beside the
  // tile. The peer's half may come before this block expects it, but not before `full` is in this phase, because the
  // peer waits for this block's consumers too.
  template <bool kPairs>
  __device__ __forceinline__ void load(const TensorMap& map, int row, int inner, std::uint32_t other_bytes) const {
    std::uint64_t* const full = &shared_.full[ring_.stage];
    T* const left = shared_.stages[ring_.stage].left;
    mbarrier_arrive_expect(full, Shared::kLeftBytes + other_bytes);
    if constexpr (!kPairs) return tma_load_tile(left, map, row, inner, full);
    const int half = tile_in_pair() * (Tile::kRows / 2);
    const int ranks = 1 << own_ | 1 << peer();
    tma_load_tile_multicast(left + half * Tile::kStep, map, row + half, inner, full, static_cast<std::uint16_t>(ranks));
  }
  __device__ __forceinline__ void arrive_at_full() {
    sync_warp();  // what its lanes have stored is there
    if (thread_index() % kWarp == kWarp - 1) mbarrier_arrive(&shared_.full[ring_.stage]);
    ring_.advance();
  }

  // ---- consumers ----------------------------------------------------------------------------------------------------

  __device__ void consume(const TilePart& part) {
    sums_.clear();
    if (const int rank = rank_of(part); rank > 0) add_low_rank(part, rank);
    multiply(part.count);
    if constexpr (Tile::kSharesSteps) sums_.join(shared_, sync_consumers);
    if (args_.cluster > 1) {
      wait_until_stages_are_free();
      if (args_.cluster == 2) return add_sums_of_cluster<2>(part);
      if (args_.cluster == 4) return add_sums_of_cluster<4>(part);
      return add_sums_of_cluster<8>(part);
    }
    if constexpr (Tile::kSharesCols) sums_.join(shared_, sync_consumers);
    if (args_.cluster == 0 && !stream_k_.complete_tile<Tile::kRows * Tile::kCols>(part, sums_, sync_consumers)) return;
    const HopperResult<T, Tile> result = result_of(part);
#pragma unroll
    for (int i = 0; i < Sums::kVectors; ++i) result.store(i, sums_.vector(i));
  }
  __device__ __forceinline__ static void sync_consumers() { sync_named_barrier<kConsumerBarrier>(Tile::kConsumers); }
  __device__ __forceinline__ HopperResult<T, Tile> result_of(const TilePart& part) const {
    const HopperLane<Tile> lane;
    const std::int64_t row = row0(part) + lane.row_of_result(), col = col0(part) + lane.col();
    const T* const bias = static_cast<const T*>(args_.bias);
    return HopperResult<T, Tile>(static_cast<T*>(args_.out.data) + row * args_.out.stride + col, args_.out.stride,
                                 bias == nullptr ? nullptr : bias + col, args_.rows - row, args_.cols - col);
  }

  template <int kCluster>
  __device__ __forceinline__ void add_sums_of_cluster(const TilePart& part) {
    hopper_cluster_sums<kCluster, Tile>(sums_, shared_, rank_in_tile(), tile_in_pair() * kCluster,
                                        [&] { return result_of(part); });
  }
  // All threads of the cluster's blocks come to these two, which order no stores. Of what comes before them, other
  // blocks read mbarriers alone.
  __device__ __forceinline__ static void wait_until_stages_are_free() { sync_cluster(); }
  // The peer's barriers must be there before copies and consumers arrive at them; fence_mbarrier_init() shows them.
  __device__ __forceinline__ static void wait_until_peer_has_barriers() { sync_cluster(); }
  // A block must not end before all consumers have arrived, those of the peer too, and nobody else waits for the last
  // of these arrivals.
  __device__ __forceinline__ void wait_until_stages_are_read() {
#pragma unroll 1
    for (int i = 0; i < Tile::kStages; ++i) {
      wait_for_empty();
      ring_.advance();
    }
  }

  // The products of a step run while the next step is decoded.
  __device__ void multiply(int steps) {
    typename Weights::template Decoder<T, Tile> decoder(
        stage_address(0).at(offsetof(Stage, codes)), stage_address(0).at(offsetof(Stage, scales)), args_.weight.code);
    const ClusterMbarriers empty = empty_barriers();
    wait_for_full();
    decoder.decode(stage_offset(), table_);
#pragma unroll 1
    for (int rest = steps; rest > 0; --rest) {
      HopperFragments fragments;
      decoder.round(fragments);
      multiply(fragments);
      const std::uint32_t stage = ring_.stage;
      ring_.advance();
      if (rest > 1) {
        wait_for_full();
        decoder.decode(stage_offset(), table_);
      }
      decoder.wait_for_products();
      arrive_at_empty(empty, stage);
    }
    sums_.wait_for_products();
  }
  // The distance in bytes of the ring's stage from the first.
  __device__ __forceinline__ std::uint32_t stage_offset() const {
    return static_cast<std::uint32_t>(ring_.stage * sizeof(Stage));
  }
  // The difference of descriptors for so many of the inner dimension. Their units are 16 bytes.
  static constexpr std::uint64_t descriptor_step(std::uint32_t inner) { return inner * sizeof(T) / 16; }
  // Multiplies by the left operand's rows in the ring's stage.
  __device__ __forceinline__ void multiply(const HopperFragments& fragments) {
    constexpr std::uint64_t kDescriptorStage = sizeof(Stage) / 16;
    const std::uint64_t left = in_register(first_left_ + ring_.stage * kDescriptorStage);
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
      wgmma<T, Tile::kRows>(sums_.sum[p / Tile::kInnerProducts], fragments[p],
                            left + descriptor_step(p % Tile::kInnerProducts * kWgmmaInner));
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void wait_for_full() const { mbarrier_wait(&shared_.full[ring_.stage], ring_.parity); }
  // The barriers at which a lane says that its warp has read a stage: lane 0 those of its own block, and lane 1 those
  // of the peer.
  __device__ __forceinline__ ClusterMbarriers empty_barriers() const {
    return {shared_.empty, args_.pairs == 0 || thread_index() % kWarp == 0 ? own_ : peer()};
  }
  __device__ __forceinline__ void arrive_at_empty(const ClusterMbarriers& empty, std::uint32_t stage) const {
    sync_warp();  // all lanes have read it
    if (thread_index() % kWarp <= args_.pairs) empty.arrive(stage);
  }

  // Brings the B or A of the block's first tile to L2 while the tables are filled. What comes after it, other blocks
  // have loaded by then.
  __device__ void prefetch_right() const {
    const TilePart part = part_after(0);
    const std::int64_t rank = part.count == 0 ? 0 : rank_of(part), col = col0(part);
    if (rank == 0) return;
    const std::int64_t cols = args_.cols - col < Tile::kCols ? args_.cols - col : Tile::kCols;
    // The columns of B lie one after another, with all their ranks, and those of A by rank.
    const auto bytes = static_cast<std::int64_t>(size_of(args_.right_dtype));
    const std::int64_t spans = Tile::kForward ? 1 : rank, span_bytes = (Tile::kForward ? cols * rank : cols) * bytes;
#pragma unroll 1
    for (std::int64_t span = 0; span < spans; ++span) {
      const auto* const begin =
          static_cast<const std::byte*>(args_.right) + right_index<Tile::kForward>(args_, span, col) * bytes;
#pragma unroll 1
      for (std::int64_t at = thread_index() * kSectorBytes; at < span_bytes; at += Tile::kConsumers * kSectorBytes) {
        prefetch_sector(begin + at);
      }
    }
  }
  // Multiplies by the adapter, 64 of the rank at a time, with s*B, or A, in place of the weight. A lane's share comes
  // from global memory, and waits in the lane's own shared memory until it is complete. So one piece of code loads
  // every pair, and no registers are held meanwhile.
  __device__ void add_low_rank(const TilePart& part, int rank) {
    const HopperLane<Tile> lane;
    const ClusterMbarriers empty = empty_barriers();
    const std::int64_t col = col0(part) + lane.col();
#pragma unroll 1
    for (int r0 = 0; r0 < rank; r0 += Tile::kStep) {
#pragma unroll 1
      for (unsigned word = 0; word < kProducts * 4; ++word) {
        const std::int64_t r = r0 + lane.inner(word / 4, word % 4), of_word = col + lane.col_of(word / 4, word % 4);
        store_shared(shared_.scratch(lane.thread, word), pack_pair<T>(right_at<Tile::kForward>(args_, r, of_word),
                                                                      right_at<Tile::kForward>(args_, r + 1, of_word)));
      }
      HopperFragments fragments;
#pragma unroll
      for (unsigned word = 0; word < kProducts * 4; ++word) {
        fragments[word / 4][word % 4] = load_shared<std::uint32_t>(shared_.scratch(lane.thread, word));
      }
      wait_for_full();
      multiply(fragments);
      sums_.wait_for_products();
      arrive_at_empty(empty, ring_.stage);
      ring_.advance();
    }
    if constexpr (!Tile::kForward) {
      // This comes before anything else is in the sums, because the mask must fall on nothing else.
      if (args_.dropout.threshold > 0) {
        sums_.drop(args_.dropout.with_seed(), row0(part) + lane.row(), col, shared_, sync_consumers);
      }
    }
  }

  const HopperArgs& args_;
  const HopperMaps& maps_;
  Shared& shared_;
  const StreamK stream_k_;
  const ScaleReader<true> scales_;
  const typename Shared::Table table_;
  const int own_;                   // its rank in the cluster
  const std::uint64_t first_left_;  // the descriptor of the warpgroup's part of the first stage's left operand
  Ring ring_;
  bool has_tables_ = false;  // of a producer
  Sums sums_;
};

template <class T, class Weights, int kRows>
__global__ void __launch_bounds__(HopperTile<kRows, Weights::kForward>::kThreads, 1)
    hopper_gemm_kernel(const __grid_constant__ HopperArgs args, const __grid_constant__ HopperMaps maps) {
  using Tile = HopperTile<kRows, Weights::kForward>;
  HopperGemm<T, Weights, Tile> gemm(args, maps, HopperShared<T, Tile>::in_dynamic_smem());
  gemm.prepare();
  gemm.run();
}

// ---- on the host ----

// A matrix as TMA loads it: in tiles of `box_rows` rows by a step of its columns.
inline TileSource tiles_of(const char* name, const ConstMatrix& matrix, std::int64_t cols, int box_rows) {
  const auto bytes = static_cast<int>(size_of(matrix.dtype));
  return {.name = name,
          .data = matrix.data,
          .element_bytes = bytes,
          .rows = matrix.rows,
          .cols = cols,
          .stride_bytes = (matrix.rows > 1 ? matrix.stride : cols) * bytes,
          .box_rows = box_rows,
          .box_cols = kGemmStep,
          .swizzle = Swizzle::bytes_128};
}
template <class Weights>
TileSource tiles_of_codes(const QuantizedWeightView& w) {
  return {.name = "codes",
          .data = w.codes,
          .element_bytes = 1,
          .rows = w.N,
          .cols = w.K / 2,
          .stride_bytes = w.K / 2,
          .box_rows = Weights::kTileRows,
          .box_cols = Weights::kTileRowBytes,
          .swizzle = Weights::kSwizzle};
}

template <class Weights>
void hopper_gemm(const Product& product, const HopperConfig& hopper, Counters& counters, const Stream& stream) {
  const GemmConfig& config = hopper.gemm;
  if (config.blocks == 0) return;
  constexpr bool kForward = Weights::kForward;
  const std::int64_t rank = product.low_rank.cols;
  const int box_rows = config.tile_rows / (hopper.pairs ? 2 : 1);
  HopperMaps maps{TensorMap(tiles_of(kForward ? "x" : "dy", product.left, product.inner, box_rows)),
                  {},
                  TensorMap(tiles_of_codes<Weights>(product.weight))};
  if (rank > 0) {
    maps.low_rank = TensorMap(tiles_of(kForward ? "u" : "v", product.low_rank, rank, box_rows));
  }
  const StreamKWorkspace workspace(config, counters, stream);
  const HopperArgs args(product, hopper, workspace);
  const auto launch_for = [&]<class T, int kRows>() {
    using Tile = HopperTile<kRows, Weights::kForward>;
    const LaunchShape shape = {.blocks = config.blocks,
                               .threads = Tile::kThreads,
                               .smem_bytes = HopperShared<T, Tile>::bytes(),
                               .cluster = hopper.blocks_of_cluster(),
                               .programmatic_launch = args.follows_low_rank()};
    launch<hopper_gemm_kernel<T, Weights, kRows>>(shape, stream, args, maps);
  };
  const auto launch_tile = [&]<class T>() {
    if (config.tile_rows == kGemmFewRows) return launch_for.template operator()<T, kGemmFewRows>();
    if (config.tile_rows == kThinRows) return launch_for.template operator()<T, kThinRows>();
    if (config.tile_rows == kGemmMiddleRows) return launch_for.template operator()<T, kGemmMiddleRows>();
    if (config.tile_rows == kGemmManyRows) return launch_for.template operator()<T, kGemmManyRows>();
    launch_for.template operator()<T, kGemmTallRows>();
  };
  if (product.left.dtype == DType::bf16) {
    launch_tile.template operator()<Bf16>();
  } else {
    launch_tile.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
