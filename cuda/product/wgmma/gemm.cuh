// The product with a quantized weight on compute capability 9.0, by wgmma, TMA and warp specialization.
//
//   forward    Y^T[128 of N, rows of M] = [ W | s*B ] . [ X | U ]^T
//   backward  dX^T[128 of K, rows of M] = [ W^T | A^T ] . [ dY | V ]^T
//
// Operands are those of supports_wgmma(): bf16 or fp16, 4 bits, blocks of 64 or more, K a multiple of 64, rows of
// 16-byte vectors, a rank that is a multiple of 8. The weight is wgmma's operand a, which consumers decode to
// registers, so that decoded weights do not pass through shared memory. X, or dY, is its operand b, which TMA puts into
// shared memory in the order that wgmma takes.
//
//   producers, 3 warps                          shared memory                       consumers, 2 warpgroups of 4 warps
//
//   X    -- TMA ------------------------------> stage: rows x 64 of X ------------> wgmma's b -.
//   codes - TMA ------------------------------>        128 rows x 32 bytes -.                  |-> accumulators
//   absmax -decoded, two scales a thread ----->        128 scales ----------|- decode -> its a '   of a warpgroup
//                                               table of 256 bytes ---------'
//             full: bytes and 3 arrivals -----> stages <----------------- empty: an arrival of each consumer warp
//
//   step            i                       i + 1                   i + 2
//   tensor cores    product of i            product of i + 1        product of i + 2
//   a consumer      decodes i + 1, waits    decodes i + 2, waits    decodes i + 3, waits
//
// A block computes one tile after another, or a part of a tile's steps (schedule.cuh). The adapter takes a step for
// each 64 of the rank, before the tile's first step. README.md has dX, clusters, and pairs of blocks.
#pragma once

#include "product/wgmma/cluster_reduce.cuh"
#include "product/wgmma/lora.cuh"
#include "product/wgmma/scales.cuh"
#include "product/wgmma/weights.cuh"

namespace qlora_native::QLN_CUDA {

// The matrices whose tiles TMA loads; u where there is a rank.
struct WgmmaMaps {
  TensorMap x, u, codes;
};

// ---- shared memory --------------------------------------------------------------------------------------------------

template <class T, class Tile>
struct WgmmaShared {
  using Table = PairTable<16, kRowBytes / sizeof(Vector<float, 2>)>;
  static constexpr int kScratchWords = 32, kScratchVectors = kScratchWords / 4;
  struct Row {
    typename Table::Pair pairs[16];
    std::uint32_t scratch[kScratchWords];  // of one consumer
  };
  static_assert(sizeof(Row) == kRowBytes && Tile::kConsumers == 256);
  // A step has this many codes and scales in both layouts of the weight (weights.cuh).
  struct alignas(kSwizzledAlignment) Stage {
    T x[Tile::kRows * Tile::kStep];  // rows of X, or of U, as wgmma takes them
    std::uint8_t codes[Tile::kCols * Tile::kStep / 2];
    float scales[Tile::kCols];
  };
  Row rows[256];
  Stage stages[Tile::kStages];
  typename ScaleReader<true>::Levels levels;
  std::uint64_t full[Tile::kStages];            // counts a stage's bytes, and the producers
  std::uint64_t empty[Tile::kStages];           // counts the warps of consumers that have read it
  std::uint64_t reduce_full[kMaxReduceRounds];  // counts the bytes of partial sums of a cluster's blocks
  int run;                                      // the block's, of stream-K

  // A word, or a vector of four, of a consumer's scratch memory. Those of adjacent lanes lie in different banks.
  __device__ __forceinline__ SharedAddress scratch(unsigned thread, unsigned word) {
    return SharedAddress(&rows[thread].scratch[(word + thread) % kScratchWords]);
  }
  __device__ __forceinline__ SharedAddress scratch_vector(unsigned thread, unsigned i) {
    return SharedAddress(&rows[thread].scratch[(i + thread) % kScratchVectors * 4]);
  }
  static constexpr std::uint32_t kXBytes = sizeof(Stage::x), kCodeBytes = sizeof(Stage::codes);
  // As in GemmShared: the table must begin at kRowsBegin.
  static __device__ WgmmaShared& in_dynamic_smem() { return *dynamic_smem_for_rows<WgmmaShared, true>(); }
  static constexpr std::size_t bytes() {
    static_assert(kRowsBegin % kSwizzledAlignment == 0 && sizeof(rows) % kSwizzledAlignment == 0);
    constexpr std::size_t kBytes = kMaxReservedSmem + sizeof(WgmmaShared);
    static_assert(kBytes == wgmma_smem_bytes(Tile::kRows));
    return kBytes;
  }
};

template <class T, class Weights, class Tile>
class WgmmaGemm {
  using Shared = WgmmaShared<T, Tile>;
  using Stage = typename Shared::Stage;
  using Accumulators = WgmmaAccumulators<Tile>;
  static_assert(Weights::kTileRows * Weights::kTileRowBytes == Shared::kCodeBytes);
  // Each thread begins with 168, and producers leave most of theirs to consumers, four warps at once.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kConsumerBarrier = 1, kTablesBarrier = 2;  // numbers of barriers

 public:
  __device__ WgmmaGemm(const WgmmaArgs& args, const WgmmaMaps& maps, Shared& shared)
      : args_(args),
        maps_(maps),
        shared_(shared),
        scales_(args.weight, args.scales, shared.levels),
        table_(shared.rows->pairs),
        schedule_(args),
        x_descriptor_(descriptor_of_swizzled_rows(shared_address(shared.stages)) +
                      descriptor_step(WgmmaLane<Tile>().first_inner())) {}

  // ---- barriers and roles -------------------------------------------------------------------------------------------

  // Then producers may issue loads, while consumers fill the tables.
  __device__ void prepare() {
    if (thread_index() == 0) {
      shared_.run = schedule_.take_run();
      for (int i = 0; i < Tile::kStages; ++i) {
        mbarrier_init(&shared_.full[i], Tile::kScaleWarps + 1);  // and the thread that issues loads
        mbarrier_init(&shared_.empty[i], Tile::kConsumerWarps << args_.pairs);
      }
      for (std::uint64_t& round : shared_.reduce_full) mbarrier_init(&round, 1);
      fence_mbarrier_init();
      prefetch_map(maps_.x);
      prefetch_map(maps_.codes);
    }
    // The peer's barriers must be there before loads and consumers arrive at them; fence_mbarrier_init() shows them.
    if (args_.pairs != 0) return sync_cluster_relaxed();
    sync_threads();
  }
  __device__ void run() {
    const int block_warp = warp_uniform(thread_index() / kWarp);
    if (block_warp < Tile::kConsumerWarps) {
      increase_max_registers<kConsumerRegisters>();
      prefetch_lora(args_, schedule_, shared_.run);
      Shared::Table::fill(shared_.rows->pairs, args_.weight.code, Tile::kConsumers);
      shared_.levels.fill(args_.weight, Tile::kConsumers);
      wait_for_tables();
      for_each_part([&](const TilePart& part) { consume(part); });
    } else {
      decrease_max_registers<kProducerRegisters>();
      const int warp = block_warp - Tile::kConsumerWarps;
      if (warp < Tile::kScaleWarps) for_each_part([&](const TilePart& part) { load_scales(part); });
      if (warp == Tile::kScaleWarps) {
        if (args_.pairs == 0) {
          for_each_part([&](const TilePart& part) { load_tiles<false>(part); });
        } else {
          for_each_part([&](const TilePart& part) { load_tiles<true>(part); });
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
      const TilePart part = schedule_.part_after(shared_.run, done);
      if (part.count == 0) return;
      f(part);
      done += static_cast<std::uint32_t>(part.count);
    }
  }
  __device__ __forceinline__ SharedAddress first_stage() const { return SharedAddress(shared_.stages); }
  // The distance in bytes of the ring's stage from the first.
  __device__ __forceinline__ std::uint32_t stage_offset() const {
    return static_cast<std::uint32_t>(ring_.stage * sizeof(Stage));
  }
  __device__ __forceinline__ void wait_for_empty() const {
    mbarrier_wait(&shared_.empty[ring_.stage], ring_.parity ^ 1);
  }
  __device__ __forceinline__ void wait_for_full() const { mbarrier_wait(&shared_.full[ring_.stage], ring_.parity); }
  // All consumers call this once, and the warps that read the levels of scales afterwards.
  __device__ __forceinline__ static void wait_for_tables() {
    sync_named_barrier<kTablesBarrier>(Tile::kConsumers + Tile::kScaleWarps * kWarp);
  }
  __device__ __forceinline__ static void sync_consumers() { sync_named_barrier<kConsumerBarrier>(Tile::kConsumers); }
  // All threads of the cluster's blocks call this. What they read in their stages precedes what others store there.
  __device__ __forceinline__ static void wait_until_stages_are_free() { sync_cluster(); }
  // A block must not end before all consumers have arrived, those of the peer too, and nobody else waits for the last
  // of these arrivals.
  __device__ __forceinline__ void wait_until_stages_are_read() {
#pragma unroll 1
    for (int i = 0; i < Tile::kStages; ++i) {
      wait_for_empty();
      ring_.advance();
    }
  }

  // ---- producers ----------------------------------------------------------------------------------------------------

  // One warp, of which a thread issues TMA's loads.
  template <bool kPairs>
  __device__ void load_tiles(const TilePart& part) {
    const int row0 = in_int_register(schedule_.row0(part)), col0 = in_int_register(schedule_.col0(part));
    const bool issues = thread_index() % kWarp == 0;
#pragma unroll 1
    for (int r = 0, rank = schedule_.lora_rank(part); r < rank; r += Tile::kStep) {
      wait_for_empty();
      if (issues) {
        griddepcontrol_wait();  // for the kernel that makes U or V
        load_rows<kPairs>(maps_.u, row0, r, 0);
      }
      ring_.advance();
    }
#pragma unroll 1
    for (int step = part.first; step < part.first + part.count; ++step) {
      wait_for_empty();
      if (issues) {
        const int inner0 = step * Tile::kStep;
        load_rows<kPairs>(maps_.x, row0, inner0, Shared::kCodeBytes);
        tma_load_tile(shared_.stages[ring_.stage].codes, maps_.codes, Weights::tile_row(inner0, col0),
                      Weights::tile_byte(inner0, col0), &shared_.full[ring_.stage]);
      }
      ring_.advance();
    }
  }
  // Loads a tile of rows, or the pair's half of it; `other_bytes` is how many other bytes the stage gets. The peer's
  // half may arrive before this block expects it, but not before `full` is in this phase, because the peer waits for
  // this block's consumers too.
  template <bool kPairs>
  __device__ __forceinline__ void load_rows(const TensorMap& map, int row, int inner, std::uint32_t other_bytes) const {
    std::uint64_t* const full = &shared_.full[ring_.stage];
    T* const x = shared_.stages[ring_.stage].x;
    mbarrier_arrive_expect(full, Shared::kXBytes + other_bytes);
    if constexpr (!kPairs) return tma_load_tile(x, map, row, inner, full);
    const int half = schedule_.tile_in_pair() * (Tile::kRows / 2);
    const int ranks = 1 << schedule_.block_rank() | 1 << schedule_.peer_rank();
    tma_load_tile_multicast(x + half * Tile::kStep, map, row + half, inner, full, static_cast<std::uint16_t>(ranks));
  }
  // Two warps: thread i loads the scales i and i + 64 of each step.
  __device__ void load_scales(const TilePart& part) {
#pragma unroll 1
    for (int r = 0, rank = schedule_.lora_rank(part); r < rank; r += Tile::kStep) {  // steps of the adapter: no scales
      if (r == 0) wait_for_tables_once();  // now, because consumers wait there before they load B or A
      wait_for_empty();
      arrive_at_full();
    }
    using Loader = ScaleLoader<Weights, Tile>;
    const int thread = thread_index() - Tile::kConsumers;
    Loader loader(args_, scales_, thread, part.first * Tile::kStep, schedule_.col0(part));
    const SharedAddress scales = first_stage().at(offsetof(Stage, scales) + thread * sizeof(float)).in_register();
    wait_for_tables_once();
#pragma unroll 1
    for (int rest = part.count; rest > 0; --rest) {
      float scale[Loader::kScales];
      loader.next(scale);
      wait_for_empty();
#pragma unroll
      for (int i = 0; i < Loader::kScales; ++i) {
        store_shared(scales.at(stage_offset() + i * Loader::kThreads * sizeof(float)), scale[i]);
      }
      arrive_at_full();
    }
  }
  __device__ __forceinline__ void wait_for_tables_once() {
    if (has_tables_) return;
    wait_for_tables();
    has_tables_ = true;
  }
  __device__ __forceinline__ void arrive_at_full() {
    sync_warp();  // what its lanes have stored is visible
    if (thread_index() % kWarp == kWarp - 1) mbarrier_arrive(&shared_.full[ring_.stage]);
    ring_.advance();
  }

  // ---- consumers: main loop -----------------------------------------------------------------------------------------

  // The products of a step run while the next step is decoded.
  __device__ void multiply(int steps) {
    typename Weights::template Decoder<T, Tile> decoder(first_stage().at(offsetof(Stage, codes)),
                                                        first_stage().at(offsetof(Stage, scales)), args_.weight.code);
    const ClusterMbarriers empty = empty_barriers();
    wait_for_full();
    decoder.decode(stage_offset(), table_);
#pragma unroll 1
    for (int rest = steps; rest > 0; --rest) {
      WgmmaFragments fragments;
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
    accumulators_.wait_for_products();
  }
  // The difference of descriptors for so many of the inner dimension, in 16 bytes.
  static constexpr std::uint64_t descriptor_step(std::uint32_t inner) { return inner * sizeof(T) / 16; }
  // Multiplies by the rows of X in the ring's stage.
  __device__ __forceinline__ void multiply(const WgmmaFragments& fragments) {
    constexpr std::uint64_t kDescriptorStage = sizeof(Stage) / 16;
    const std::uint64_t x = in_register(x_descriptor_ + ring_.stage * kDescriptorStage);
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < Tile::kProducts; ++p) {
      wgmma<T, Tile::kRows>(accumulators_.d[p / Tile::kInnerProducts], fragments[p],
                            x + descriptor_step(p % Tile::kInnerProducts * kWgmmaInner));
    }
    wgmma_commit();
  }
  // The barriers at which a lane says that its warp has read a stage: lane 0 those of its own block, and lane 1 those
  // of the peer.
  __device__ __forceinline__ ClusterMbarriers empty_barriers() const {
    return {shared_.empty,
            args_.pairs == 0 || thread_index() % kWarp == 0 ? schedule_.block_rank() : schedule_.peer_rank()};
  }
  __device__ __forceinline__ void arrive_at_empty(const ClusterMbarriers& empty, std::uint32_t stage) const {
    sync_warp();  // all lanes have read it
    if (thread_index() % kWarp <= args_.pairs) empty.arrive(stage);
  }

  // Multiplies by the adapter, with s*B, or A, in place of the weight. A lane's operands wait in its scratch memory
  // until they are complete, so that one piece of code loads every pair and no registers are held meanwhile.
  __device__ void add_lora(const TilePart& part, int rank) {
    const WgmmaLane<Tile> lane;
    const ClusterMbarriers empty = empty_barriers();
    const std::int64_t col = schedule_.col0(part) + lane.col();
#pragma unroll 1
    for (int r0 = 0; r0 < rank; r0 += Tile::kStep) {
#pragma unroll 1
      for (unsigned word = 0; word < Tile::kProducts * 4; ++word) {
        const std::int64_t r = r0 + lane.inner(word / 4, word % 4), word_col = col + lane.col_of(word / 4, word % 4);
        store_shared(shared_.scratch(lane.thread, word), pack_pair<T>(lora_at<Tile::kForward>(args_, r, word_col),
                                                                      lora_at<Tile::kForward>(args_, r + 1, word_col)));
      }
      WgmmaFragments fragments;
#pragma unroll
      for (unsigned word = 0; word < Tile::kProducts * 4; ++word) {
        fragments[word / 4][word % 4] = load_shared<std::uint32_t>(shared_.scratch(lane.thread, word));
      }
      wait_for_full();
      multiply(fragments);
      accumulators_.wait_for_products();
      arrive_at_empty(empty, ring_.stage);
      ring_.advance();
    }
    if constexpr (!Tile::kForward) {
      // The accumulators hold nothing else yet, and the mask must fall on nothing else.
      if (args_.dropout.threshold > 0) {
        accumulators_.drop(args_.dropout.with_seed(), schedule_.row0(part) + lane.row(), col, shared_, sync_consumers);
      }
    }
  }

  // ---- epilogue -----------------------------------------------------------------------------------------------------

  __device__ void consume(const TilePart& part) {
    accumulators_.clear();
    if (const int rank = schedule_.lora_rank(part); rank > 0) add_lora(part, rank);
    multiply(part.count);
    if constexpr (Tile::kSplitsSteps) accumulators_.combine_warpgroups(shared_, sync_consumers);
    if (args_.cluster > 1) {
      wait_until_stages_are_free();
      if (args_.cluster == 2) return reduce_in_cluster<2>(part);
      if (args_.cluster == 4) return reduce_in_cluster<4>(part);
      return reduce_in_cluster<8>(part);
    }
    if constexpr (Tile::kSplitsCols) accumulators_.combine_warpgroups(shared_, sync_consumers);
    if (args_.cluster == 0 && !schedule_.complete_tile(part, accumulators_, sync_consumers)) return;
    const WgmmaEpilogue<T, Tile> epilogue = epilogue_of(part);
#pragma unroll
    for (int i = 0; i < Accumulators::kVectors; ++i) epilogue.store(i, accumulators_.vector(i));
  }
  __device__ __forceinline__ WgmmaEpilogue<T, Tile> epilogue_of(const TilePart& part) const {
    const WgmmaLane<Tile> lane;
    const std::int64_t row = schedule_.row0(part) + lane.row_of_result(), col = schedule_.col0(part) + lane.col();
    const T* const bias = static_cast<const T*>(args_.bias);
    return WgmmaEpilogue<T, Tile>(static_cast<T*>(args_.out.data) + row * args_.out.stride + col, args_.out.stride,
                                  bias == nullptr ? nullptr : bias + col, args_.rows - row, args_.cols - col);
  }
  template <int kCluster>
  __device__ __forceinline__ void reduce_in_cluster(const TilePart& part) {
    cluster_reduce<kCluster, Tile>(accumulators_, shared_, schedule_.rank_in_tile(),
                                   schedule_.tile_in_pair() * kCluster, [&] { return epilogue_of(part); });
  }

  const WgmmaArgs& args_;
  const WgmmaMaps& maps_;
  Shared& shared_;
  const ScaleReader<true> scales_;
  const typename Shared::Table table_;
  const WgmmaSchedule<Tile> schedule_;
  const std::uint64_t x_descriptor_;  // of the warpgroup's part of X in the first stage
  StageRing<Tile> ring_;
  bool has_tables_ = false;  // of a producer
  Accumulators accumulators_;
};

template <class T, class Weights, int kRows>
__global__ void __launch_bounds__(WgmmaTile<kRows, Weights::kForward>::kThreads, 1)
    wgmma_gemm_kernel(const __grid_constant__ WgmmaArgs args, const __grid_constant__ WgmmaMaps maps) {
  using Tile = WgmmaTile<kRows, Weights::kForward>;
  WgmmaGemm<T, Weights, Tile> gemm(args, maps, WgmmaShared<T, Tile>::in_dynamic_smem());
  gemm.prepare();
  gemm.run();
}

}  // namespace qlora_native::QLN_CUDA
