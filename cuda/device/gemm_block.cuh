// What a block of the tensor-core product (gemm.cuh) does: 8 warps compute a tile, or a part of its inner dimension,
// after the other. The inner dimension passes through a ring of stages in shared memory, 64 at a time: the left operand
// as it is, the weight as codes with their scales. Each warp decodes the codes of its own columns, once, straight into
// the registers that mma takes them from: as its operand of 16 rows. So mma's rows are columns of the result.
#pragma once

#include "device/elements.cuh"
#include "device/gemm_left.cuh"
#include "device/gemm_sums.cuh"
#include "device/gemm_tile.cuh"
#include "device/gemm_weights.cuh"
#include "device/sources.cuh"

namespace qlora_native::QLN_CUDA {

struct GemmArgs {
  QuantizedWeightView weight;
  WeightScales scales;
  std::uint32_t last_chunk;    // of an aligned weight
  std::uint32_t chunks_apart;  // between the pieces that one thread brings
  std::int64_t rows, cols, inner;
  ConstMatrix left;       // [rows, inner]
  ConstMatrix low_rank;   // [rows, rank]
  bool low_rank_vectors;  // whose rows are whole 16-byte vectors
  const void* right;      // B [cols, rank] or A [rank, cols]
  DType right_dtype;
  float right_factor;
  Dropout dropout;   // backward: of the low-rank part
  const void* bias;  // forward: [cols] or null
  Matrix out;
  GemmConfig config;
  // Tiles whose steps several blocks share: the sums of each block that has not the tile's first step, and whether they
  // are there.
  float* sums;
  std::uint32_t* ready;
};

template <class T, class Weights, class Tile>
struct GemmShared {
  static constexpr std::size_t kSlack = Weights::Table::kRows ? kRowsBegin : 0;  // so that `pairs` may begin there
  static_assert(kRowsBegin == kGemmMostReservedSmem);
  struct Stage {
    LeftStage<T, Tile::kRows> left;
    alignas(kStageAlignment) std::uint8_t codes[Weights::kCodeBytes];
    alignas(kStageAlignment) typename Weights::Scale scales[Weights::kScales];
  };
  typename Weights::Table::Pair pairs[Weights::Table::kPairs];
  Stage stages[Tile::kStages];
  typename ScaleReader<Tile::kAligned>::Nested nested;

  static __device__ GemmShared& of_block() {
    std::byte* const smem = dynamic_smem<std::byte>();
    return *reinterpret_cast<GemmShared*>(smem + (kSlack > 0 ? SharedPlace(smem).to_rows() : 0));
  }
  static constexpr std::size_t bytes() {
    constexpr std::size_t kBytes = kSlack + sizeof(GemmShared);
    static_assert(kBytes <= (kSlack > 0 ? kGemmMostCopiesSmem : kLeastSmemBytes));
    constexpr bool kSmall = Tile::kRows == kGemmFewRows && Tile::kAligned;
    static_assert(Tile::kWide ||
                  kBytes <= (kSmall ? kLeastSmemBytes / kGemmBlocks - kGemmMostReservedSmem : kGemmSmem));
    return kBytes;
  }
};

template <class T, class Weights, class Tile>
class Gemm {
  using Shared = GemmShared<T, Weights, Tile>;
  using Stage = typename Shared::Stage;
  using Left = LeftStage<T, Tile::kRows>;
  using Scale = typename Weights::Scale;
  using Sums = GemmSums<T, Tile>;
  static constexpr bool kAligned = Tile::kAligned;
  static constexpr int kStages = Tile::kStages;

 public:
  __device__ Gemm(const GemmArgs& args, Shared& shared)
      : args_(args), shared_(shared), scales_(args.weight, args.scales, shared.nested), table_(shared.pairs) {}

  // The block's run of steps: the end of a tile, whole tiles, the beginning of one.
  __device__ void run() {
    for (std::uint32_t done = 0;;) {  // steps: 2^32 of them would be minutes
      const Part part = part_after(done);
      if (part.count == 0) return;
      go_to(part);
      sums_.clear();
      if (part.first == 0) add_low_rank();
      multiply(part.first, part.count);
      finish(part);
      done += static_cast<std::uint32_t>(part.count);
    }
  }

  // Tables that the whole run needs.
  __device__ void prepare() {
    Weights::Table::fill(shared_.pairs, args_.weight.code);
    shared_.nested.fill(args_.weight);
    sync_threads();
  }

 private:
  // Of a run that part which is of one tile: steps first ... first + count - 1 of the tile.
  struct Part {
    int run;
    std::int64_t tile;
    int first, count;
  };
  __device__ Part part_after(std::uint32_t done) const {
    const GemmConfig& config = args_.config;
    // Runs are given out from the last, so that a block waits only for blocks of lower index, which have begun.
    const int run = config.blocks - 1 - static_cast<int>(block_index());
    const std::int64_t step = config.begin_of(run) + done, rest = config.begin_of(run + 1) - step;
    const int first = static_cast<int>(step % config.steps), rest_of_tile = config.steps - first;
    return {run, step / config.steps, first, rest < rest_of_tile ? static_cast<int>(rest) : rest_of_tile};
  }
  __device__ void go_to(const Part& part) {
    row_tile_ = static_cast<int>(part.tile % args_.config.row_tiles);
    col_tile_ = static_cast<int>(part.tile / args_.config.row_tiles);
  }
  // Where the tile begins.
  __device__ __forceinline__ std::int64_t row0() const { return std::int64_t{row_tile_} * Tile::kRows; }
  __device__ __forceinline__ std::int64_t col0() const { return std::int64_t{col_tile_} * Tile::kCols; }
  // What it has of its size.
  __device__ __forceinline__ int rows() const {
    return static_cast<int>(args_.rows - row0() < Tile::kRows ? args_.rows - row0() : Tile::kRows);
  }
  __device__ __forceinline__ int cols() const {
    return static_cast<int>(args_.cols - col0() < Tile::kCols ? args_.cols - col0() : Tile::kCols);
  }

  // ---- the inner dimension in steps -------------------------------------------------------------------------------

  // Where this thread's share of the next step's operands comes from.
  struct Source {
    unsigned thread;
    LeftRows<T, Tile> left;
    Position<kAligned> position;  // in the weight, of its first piece
    Position<kAligned> to_scale;  // from there
  };
  __device__ static Position<kAligned> position_of(std::int64_t element) {
    return static_cast<Position<kAligned>>(kAligned ? element / kGemmChunk : element);
  }

  // Stages are passed as bytes from the first.
  static constexpr std::uint32_t kStage = sizeof(Stage);
  static_assert(offsetof(Stage, left) == 0);
  static constexpr std::uint32_t kCodes = offsetof(Stage, codes);
  static constexpr std::uint32_t kScales = offsetof(Stage, scales);
  static_assert(kStage % kStageAlignment == 0);
  __device__ SharedPlace place_in_stage(std::size_t bytes) const {
    return SharedPlace(shared_.stages).at(static_cast<std::uint32_t>(bytes)).kept();
  }

  // Where this thread reads and writes: in the first stage, and as far into every other.
  struct Places {
    SharedPlace left, codes, scales, to, scale_to;
  };
  // Of its share of the left operand. That of the codes begins kCodes further on.
  __device__ SharedPlace place_of_share(const Lane& lane) const { return place_in_stage(lane.thread * kVectorBytes); }

  __device__ void multiply(int first, int steps) {
    const Lane lane;
    const Places at = {place_in_stage(Left::first_of(lane)), place_in_stage(kCodes + Weights::codes_of(lane)),
                       place_in_stage(kScales + Weights::scales_of(lane) * sizeof(Scale)), place_of_share(lane),
                       place_in_stage(kScales + Weights::place_of_scale(lane.thread) * sizeof(Scale))};
    const std::int64_t inner0 = std::int64_t{first} * kGemmStep;
    const unsigned thread = lane.thread;
    const auto position = [&](unsigned inner, unsigned col) {
      return position_of(Weights::element(args_.weight, inner0 + inner, col0() + col));
    };
    const Position<kAligned> piece = position(Weights::inner_of_piece(thread), Weights::col_of_piece(thread));
    const Position<kAligned> its_scale = position(Weights::inner_of_scale(thread), Weights::col_of_scale(thread));
    Source source = {thread, {lane, args_.left, row0(), rows(), inner0}, piece, its_scale - piece};
    PendingScale<kAligned> scale;
    // Of how many steps the inner dimension is whole, or this thread's vector of it is there: of all but the last.
    const int whole = static_cast<int>(args_.inner / kGemmStep) - first;
    const int whole_steps = kAligned && source.left.inner() < last_inner() ? steps : whole;
#pragma unroll 1
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      if (ahead < steps) {
        fetch(at, ahead * kStage, source, scale, Weights::kWholeSteps || ahead < whole_steps);
        store_shared(at.scale_to.at(ahead * kStage), scale.finish(scales_));
      }
      cp_async_commit();  // an empty group too: the n-th is always step n's
    }
    std::uint32_t now = 0, before = (kStages - 1) * kStage;
    const int left_at_last = steps + kStages - 1 - whole_steps;
#pragma unroll 1
    for (int left = steps; left > 0; --left) {
      cp_async_wait<kStages - 2>();
      sync_threads();  // this step's stage is there for all, and the one before has been read by all
      const bool more = left >= kStages;
      if (more) fetch(at, before, source, scale, Weights::kWholeSteps || left > left_at_last);
      cp_async_commit();
      consume(lane, at.left.at(now), at.codes.at(now), at.scales.at(now));
      if (more) store_shared(at.scale_to.at(before), scale.finish(scales_));
      before = now;
      now = now == (kStages - 1) * kStage ? 0 : now + kStage;
    }
    sync_threads();  // the next tile begins with stages that have been read
  }

  // The weight's codes and scale and the left operand's rows of one step.
  __device__ __forceinline__ void fetch(const Places& at, std::uint32_t stage, Source& source,
                                        PendingScale<kAligned>& scale, bool whole) const {
    if constexpr (kAligned) {
      source.left.fetch_vectors(at.to.at(stage), whole);
      // What the product has not of a step is multiplied by zeros of the left operand, or its column is not stored.
      const auto in_weight = [&](std::uint32_t chunk) { return chunk < args_.last_chunk ? chunk : args_.last_chunk; };
#pragma unroll
      for (int i = 0; i < Tile::kPieces; ++i) {
        const std::uint32_t chunk = in_weight(source.position + i * args_.chunks_apart);
        const SharedPlace to = at.to.at(stage).at(kCodes + i * kGemmThreads * kChunkBytes);
        cp_async_or_zeros(to, args_.weight.codes + std::uint64_t{chunk} * kChunkBytes, 1);
      }
      scale.fetch(scales_, in_weight(source.position + source.to_scale));
    } else {
      const int inner = whole ? kGemmStep : last_inner();
      source.left.fetch_elements(at.to.at(stage), args_.left.stride, rows(), inner);
      const auto count = [&](unsigned inner0, unsigned col0) {
        const int inner_left = inner - static_cast<int>(inner0), cols_left = cols() - static_cast<int>(col0);
        return inner_left <= 0 || cols_left <= 0 ? 0 : Weights::kForward ? inner_left : cols_left;
      };
      const unsigned thread = source.thread;
      Vector<std::uint32_t, kCodeWords> words[1];
      gather_codes<4>(args_.weight.codes, source.position,
                      count(Weights::inner_of_piece(thread), Weights::col_of_piece(thread)), words);
      store_shared(at.to.at(stage).at(kCodes), words[0]);
      scale.fetch(args_.weight, scales_, source.position + source.to_scale,
                  count(Weights::inner_of_scale(thread), Weights::col_of_scale(thread)));
    }
    source.left.next_step();
    source.position += position_of(Weights::step(args_.weight));
  }
  __device__ __forceinline__ int last_inner() const { return static_cast<int>(args_.inner % kGemmStep); }

  __device__ __forceinline__ void consume(const Lane& lane, const SharedPlace& left, const SharedPlace& codes,
                                          const SharedPlace& scales) {
    typename Weights::Registers weights;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weights.load(codes, scales, half);
      typename Sums::Operand a[2];
#pragma unroll
      for (int s = 0; s < 2; ++s) weights.template decode<T>(a[s], half, s, table_, Weights::first_of_scaled(lane));
      sums_.multiply(a, Left::half(left, half));
    }
  }

  // ---- the adapter: a few more of the inner dimension --------------------------------------------------------------

  __device__ __forceinline__ float right_at(std::int64_t r, std::int64_t col) const {
    const std::int64_t rank = args_.low_rank.cols;
    if (r >= rank || col >= args_.cols) return 0.0f;
    return args_.right_factor *
           load_as_f32(args_.right, args_.right_dtype, Weights::kForward ? col * rank + r : r * args_.cols + col);
  }

  // The left operand as in other steps, through the first stage; the right one, which is small, from where it lies.
  __device__ void add_low_rank() {
    const Lane lane;
    const std::int64_t rank = args_.low_rank.cols;
    const std::int64_t col = col0() + lane.col<Tile>();
#pragma unroll 1
    for (std::int64_t r0 = 0; r0 < rank; r0 += kGemmStep) {
      const int there = rank - r0 < kGemmStep ? static_cast<int>(rank - r0) : kGemmStep;
      const LeftRows<T, Tile> left(lane, args_.low_rank, row0(), rows(), r0);
      if (args_.low_rank_vectors) {
        left.fetch_vectors(place_of_share(lane), left.inner() < there);
      } else {
        left.fetch_elements(place_of_share(lane), args_.low_rank.stride, rows(), there);
      }
      cp_async_commit();
      cp_async_wait<0>();
      sync_threads();
      const SharedPlace first = place_in_stage(Left::first_of_sixteen(lane));
#pragma unroll 1
      for (int k = 0; k * kMmaInner < there; ++k) {
        const std::int64_t r = r0 + k * kMmaInner + 4 * lane.t;
        typename Sums::Operand a;
#pragma unroll
        for (int j = 0; j < Tile::kLaneCols; ++j) {
          a[j / 2][j % 2] = pack_pair<T>(right_at(r, col + j), right_at(r + 1, col + j));
          a[j / 2][j % 2 + 2] = pack_pair<T>(right_at(r + 2, col + j), right_at(r + 3, col + j));
        }
        sums_.multiply(a, Left::sixteen(first, k));
      }
      sync_threads();  // before the stage is filled again
    }
    if constexpr (!Weights::kForward) {
      // Before anything else is in the sums, because the mask falls on nothing else.
      if (rank > 0 && args_.dropout.threshold > 0) sums_.drop(args_.dropout.prepared(), row0() + lane.row(), col);
    }
  }

  // ---- results -----------------------------------------------------------------------------------------------------

  __device__ void finish(const Part& part) {
    go_to(part);
    if (part.first > 0) {
      sums_.leave(sums_of(part.run));
      sync_threads();
      if (thread_index() == 0) signal(args_.ready + part.run, 1);
      return;
    }
    int rest_of_tile = args_.config.steps - part.count;
    for (int other = part.run + 1; rest_of_tile > 0; ++other) {
      if (thread_index() == 0) wait_for(args_.ready + other, 1);
      sync_threads();
      sums_.add(sums_of(other));
      const std::int64_t length = args_.config.length_of(other);
      rest_of_tile -= length < rest_of_tile ? static_cast<int>(length) : rest_of_tile;
    }
    const Lane lane;
    const std::int64_t row = row0() + lane.row(), col = col0() + lane.col<Tile>();
    const T* const bias = static_cast<const T*>(args_.bias);
    sums_.store(static_cast<T*>(args_.out.data) + row * args_.out.stride + col, args_.out.stride,
                bias == nullptr ? nullptr : bias + col, rows() - static_cast<int>(lane.row()),
                cols() - static_cast<int>(lane.col<Tile>()));
  }
  __device__ __forceinline__ float* sums_of(int run) const {
    return args_.sums + std::int64_t{run} * Tile::kRows * Tile::kCols;
  }

  const GemmArgs& args_;
  Shared& shared_;
  const ScaleReader<kAligned> scales_;
  const typename Weights::Table table_;
  int row_tile_ = 0, col_tile_ = 0;
  Sums sums_;
};

}  // namespace qlora_native::QLN_CUDA
