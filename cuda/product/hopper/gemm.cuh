// The forward product with a quantized weight on compute capability 9.0, by wgmma: README.md follows a tile through it.
//
//   Y^T[128 of N, rows of M] = [ W | s*B ] . [ X | U ]^T
//
// W is wgmma's a: consumers decode it from shared memory to registers. X is its b, which TMA puts into shared memory in
// the order that wgmma takes. A block computes a tile of Y, or a part of its inner dimension, after the other, 64 of
// the inner dimension a step:
//
//   producers, a warpgroup    X and codes of a step by TMA, a scale for each row of W, into the next stage that is
//   empty consumers, two            rows 0 ... 63 and 64 ... 127 of W: a stage that is full is decoded and multiplied
//
//   tensor cores    i-1,3   i,0    i,1    i,2    i,3    i+1,0   ...     product k = 0 ... 3 of step i
//   a decode of     i,2     i,3    i+1,0  i+1,1  i+1,2  i+1,3   ...     while three products wait or run
//
// `full` of a stage counts its bytes and the warps of producers, `empty` the warps of consumers. Operands are what
// product_config asks for: 4 bits, blocks of 64 or more, K a multiple of 64, rows of 16-byte vectors, rank a multiple
// of 8.
#pragma once

#include "product/gemm/runs.cuh"
#include "product/hopper/tile.cuh"

namespace qlora_native::QLN_CUDA {

// A kernel's registers are shared out anew: 168 for each of 384 threads become these.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// What TMA loads tiles of. No rank: no U.
struct HopperMaps {
  TensorMap left, low_rank, codes;
};

template <class T, class Tile>
class HopperGemm {
  using Shared = HopperShared<T, Tile>;
  using Stage = typename Shared::Stage;
  static constexpr int kProducts = Tile::kProducts;
  static constexpr int kConsumersMeet = 1;  // a barrier's number

 public:
  __device__ HopperGemm(const GemmArgs& args, const HopperMaps& maps, Shared& shared)
      : args_(args),
        maps_(maps),
        shared_(shared),
        runs_(args.config, args.shared_sums),
        scales_(args.weight, args.scales, shared.levels),
        table_(shared.rows->pairs) {}

  // The block's run, its barriers, and tables.
  __device__ void prepare() {
    if (thread_index() == 0) {
      shared_.run = runs_.take();
      for (int i = 0; i < Tile::kStages; ++i) {
        mbarrier_init(&shared_.full[i], Tile::kProducerWarps + 1);  // and the thread that asks for copies
        mbarrier_init(&shared_.empty[i], Tile::kConsumerWarps);
      }
      fence_mbarrier_init();
      prefetch_map(maps_.left);
      prefetch_map(maps_.codes);
    }
    Shared::Table::fill(shared_.rows->pairs, args_.weight.code);
    shared_.levels.fill(args_.weight);
    sync_threads();
  }
  __device__ void run() {
    if (thread_index() < Tile::kConsumers) {
      increase_max_registers<kConsumerRegisters>();
      for_parts([&](const Part& part) { consume(part); });
    } else {
      decrease_max_registers<kProducerRegisters>();
      for_parts([&](const Part& part) { produce(part); });
    }
  }

 private:
  // Both walk through the same parts of the block's run, and so through the same stages.
  template <class F>
  __device__ __forceinline__ void for_parts(const F& f) const {
#pragma unroll 1
    for (std::uint32_t done = 0;;) {
      const Part part = runs_.part_after(shared_.run, done);
      if (part.count == 0) return;
      f(part);
      done += static_cast<std::uint32_t>(part.count);
    }
  }
  // Coordinates of TMA are 32 bits.
  __device__ __forceinline__ int row0(const Part& part) const {
    return static_cast<int>(part.tile % args_.config.row_tiles) * Tile::kRows;
  }
  __device__ __forceinline__ int col0(const Part& part) const {
    return static_cast<int>(part.tile / args_.config.row_tiles) * Tile::kCols;
  }
  // Not computed anew at each step, by divisions.
  __device__ __forceinline__ static int kept_int(int value) {
    return static_cast<int>(kept(static_cast<std::uint32_t>(value)));
  }
  // The adapter comes first, by whoever has the beginning of a tile.
  __device__ __forceinline__ int rank_of(const Part& part) const {
    return part.first == 0 ? static_cast<int>(args_.low_rank.cols) : 0;
  }

  // The stages in turn, and how often they have been passed, by its last bit.
  struct Ring {
    std::uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void go_on() {
      if (++stage < Tile::kStages) return;
      stage = 0;
      parity ^= 1;
    }
  };
  __device__ __forceinline__ SharedPlace place_of(std::uint32_t stage) const {
    return SharedPlace(shared_.stages).at(stage * sizeof(Stage));
  }

  // ---- producers: thread i brings the scale of row i of a tile of W -----------------------------------------------

  __device__ __forceinline__ bool asks_for_copies() const { return thread_index() == Tile::kConsumers; }

  __device__ void produce(const Part& part) {
    const int row0 = kept_int(this->row0(part)), col0 = kept_int(this->col0(part));
#pragma unroll 1
    for (int r = 0, rank = rank_of(part); r < rank; r += Tile::kStep) {
      wait_for_empty();
      if (asks_for_copies()) load(maps_.low_rank, row0, r, 0);
      arrive_at_full();
    }
    // Of so many steps the scales are on their way.
    constexpr int kAhead = 2;
    typename ScaleReader<true>::Raw raw[kAhead];
    const int thread = thread_index() - Tile::kConsumers;
    const int row = col0 + thread, last = static_cast<int>(args_.cols) - 1;
    const std::int64_t element = (row < last ? row : last) * args_.weight.K + std::int64_t{part.first} * Tile::kStep;
    auto chunk = static_cast<std::uint32_t>(static_cast<std::uint64_t>(element) / kChunk);
    int to_fetch = part.count;
    const auto fetch = [&](typename ScaleReader<true>::Raw& to) {
      scales_.fetch(to, scales_.block_of(chunk));
      if (--to_fetch > 0) chunk += Tile::kStep / kChunk;  // beyond the part: the last one again
    };
#pragma unroll
    for (auto& each : raw) fetch(each);
    const float offset = ScaleReader<true>::offset_of(args_.weight);
    const SharedPlace scales = place_of(0).at(offsetof(Stage, scales) + thread * sizeof(float)).kept();
#pragma unroll 1
    for (int step = part.first; step < part.first + part.count; ++step) {
      wait_for_empty();
      if (asks_for_copies()) {
        load(maps_.left, row0, step * Tile::kStep, Shared::kCodeBytes);
        tma_load_tile(shared_.stages[ring_.stage].codes, maps_.codes, col0, step * (Tile::kStep / 2),
                      &shared_.full[ring_.stage]);
      }
      const float scale = scales_.finish(raw[0], offset);
#pragma unroll
      for (int i = 1; i < kAhead; ++i) raw[i - 1] = raw[i];
      fetch(raw[kAhead - 1]);
      store_shared(scales.at(ring_.stage * sizeof(Stage)), scale);
      arrive_at_full();
    }
  }
  __device__ __forceinline__ void wait_for_empty() const {
    mbarrier_wait(&shared_.empty[ring_.stage], ring_.parity ^ 1);
  }
  // The tile of rows of X, or U, and so many bytes that come beside it.
  __device__ __forceinline__ void load(const TensorMap& map, int row, int inner, std::uint32_t bytes) const {
    std::uint64_t* const full = &shared_.full[ring_.stage];
    mbarrier_arrive_expect(full, Shared::kLeftBytes + bytes);
    tma_load_tile(shared_.stages[ring_.stage].left, map, row, inner, full);
  }
  __device__ __forceinline__ void arrive_at_full() {
    sync_warp();  // what its lanes have stored is there
    if (thread_index() % kWarp == kWarp - 1) mbarrier_arrive(&shared_.full[ring_.stage]);
    ring_.go_on();
  }

  // ---- consumers ----------------------------------------------------------------------------------------------------

  __device__ void consume(const Part& part) {
    sums_.clear();
    if (const int rank = rank_of(part); rank > 0) add_low_rank(col0(part), rank);
    multiply(part.count);
    if (!runs_.complete<Tile::kRows * Tile::kCols>(part, sums_,
                                                   [] { sync_some_threads<kConsumersMeet>(Tile::kConsumers); })) {
      return;
    }
    const HopperLane lane;
    const std::int64_t row = row0(part) + 2 * static_cast<int>(lane.t), col = col0(part) + static_cast<int>(lane.col());
    const T* const bias = static_cast<const T*>(args_.bias);
    sums_.store(static_cast<T*>(args_.out.data) + row * args_.out.stride + col, args_.out.stride,
                bias == nullptr ? nullptr : bias + col, args_.rows - row, args_.cols - col);
  }

  // What a lane has of a product's a: by half of its 16, and row.
  using Fragment = std::uint32_t[4];
  // And before they are rounded, of all products of a step, in pairs.
  using Values = float[kProducts * 8];

  // Where a lane finds, in the first stage, both vectors of its first row's codes, and its rows' scales.
  struct Places {
    SharedPlace codes[2], scales;
  };

  // Products of a step run while the next one is decoded. It is rounded to their operand when they are done: the
  // compiler lets no one define an operand of wgmma in the meantime.
  __device__ void multiply(int steps) {
    const HopperLane lane;
    const SharedPlace codes = place_of(0).at(offsetof(Stage, codes) + HopperCodes::place(lane.col())).kept();
    const Places places = {{codes, codes.flipped(kVectorBytes).kept()},
                           place_of(0).at(offsetof(Stage, scales) + lane.col() * sizeof(float)).kept()};
    Values values;
    wait_for_full();
    decode(places, lane.t, values);
#pragma unroll 1
    for (int rest = steps; rest > 0; --rest) {
      Fragment fragments[kProducts];
#pragma unroll
      for (int i = 0; i < kProducts * 4; ++i) fragments[i / 4][i % 4] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
      multiply(fragments);
      const std::uint32_t stage = ring_.stage;
      ring_.go_on();
      if (rest > 1) {
        wait_for_full();
        decode(places, lane.t, values);
      }
      wgmma_wait_for(values);
      arrive_at_empty(stage);
    }
    wgmma_wait_for(sums_.sum);
  }
  __device__ __forceinline__ void decode(const Places& places, unsigned t, Values& values) const {
    const auto stage = static_cast<std::uint32_t>(ring_.stage * sizeof(Stage));
    const auto scale = load_shared<Vector<float, 2>>(places.scales.at(stage));
#pragma unroll
    for (unsigned vector = 0; vector < 2; ++vector) {
#pragma unroll
      for (unsigned row = 0; row < 2; ++row) {
        const SharedPlace codes = places.codes[vector].at(stage + row * HopperCodes::kRowBytes);
        const auto words = load_shared<Vector<std::uint32_t, 4>>(codes);
#pragma unroll
        for (unsigned word = 0; word < 4; ++word) {
          const auto pair = table_.of_byte(words.at[word], t);
          float* const to = values + (vector * 4 + word) * 4 + row * 2;
          to[0] = pair.at[0] * scale.at[row];
          to[1] = pair.at[1] * scale.at[row];
        }
      }
    }
  }
  // By the rows of X, or of U, of the ring's stage.
  __device__ __forceinline__ void multiply(const Fragment (&fragments)[kProducts]) {
    constexpr std::uint64_t kApart = kWgmmaInner * sizeof(T) / 16;  // in a descriptor's units
    const auto stage = static_cast<std::uint32_t>(ring_.stage * sizeof(Stage));
    const std::uint64_t left = descriptor_of_swizzled_rows(shared_address(shared_.stages) + stage);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kProducts; ++k) wgmma<T, Tile::kRows>(sums_.sum, fragments[k], left + k * kApart);
    wgmma_commit();
  }
  __device__ __forceinline__ void wait_for_full() const { mbarrier_wait(&shared_.full[ring_.stage], ring_.parity); }
  __device__ __forceinline__ void arrive_at_empty(std::uint32_t stage) const {
    sync_warp();  // all lanes have read it
    if (thread_index() % kWarp == 0) mbarrier_arrive(&shared_.empty[stage]);
  }

  // 64 of the rank at a time, with s*B in place of W: a lane's share comes from global memory. It waits in the lane's
  // own shared memory until it is whole: one piece of code loads each pair, and no registers are held meanwhile.
  __device__ void add_low_rank(std::int64_t col0, int rank) {
    const HopperLane lane;
    const std::int64_t col = col0 + lane.col();
    const auto scratch = [&](unsigned word) {  // neighbouring lanes' lie in other banks
      return SharedPlace(&shared_.rows[lane.thread].scratch[(word + lane.lane) % Shared::kScratchWords]);
    };
#pragma unroll 1
    for (int r0 = 0; r0 < rank; r0 += Tile::kStep) {
#pragma unroll 1
      for (unsigned word = 0; word < kProducts * 4; ++word) {
        const std::int64_t r = r0 + word / 4 * kWgmmaInner + word / 2 % 2 * 8 + 2 * lane.t;
        store_shared(scratch(word), pack_pair<T>(right_at<true>(args_, r, col + word % 2),
                                                 right_at<true>(args_, r + 1, col + word % 2)));
      }
      Fragment fragments[kProducts];
#pragma unroll
      for (unsigned word = 0; word < kProducts * 4; ++word) {
        fragments[word / 4][word % 4] = load_shared<std::uint32_t>(scratch(word));
      }
      wait_for_full();
      multiply(fragments);
      wgmma_wait_for(sums_.sum);
      arrive_at_empty(ring_.stage);
      ring_.go_on();
    }
  }

  const GemmArgs& args_;
  const HopperMaps& maps_;
  Shared& shared_;
  const Runs runs_;
  const ScaleReader<true> scales_;
  const typename Shared::Table table_;
  Ring ring_;
  HopperSums<T, Tile> sums_;
};

template <class T, int kRows>
__global__ void __launch_bounds__(HopperTile<kRows>::kThreads, 1)
    hopper_gemm_kernel(const __grid_constant__ GemmArgs args, const __grid_constant__ HopperMaps maps) {
  using Tile = HopperTile<kRows>;
  HopperGemm<T, Tile> gemm(args, maps, HopperShared<T, Tile>::of_block());
  gemm.prepare();
  gemm.run();
}

}  // namespace qlora_native::QLN_CUDA
