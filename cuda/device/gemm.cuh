// The product with a quantized weight on tensor cores, forward and backward: README.md follows a tile through it.
//
//   out[rows, cols] = low_rank[rows, rank] . R[rank, cols]  +  left[rows, inner] . W'[inner, cols]  + bias
//
//             left    low_rank   W'     R              the columns of out are
//   forward   X       U          W^T    (s*B)^T        rows of W     (WeightRowsOfTile)
//   backward  dY      V          W      A              columns of W  (WeightColumnsOfTile)
//
// A block of 8 warps computes a tile of kTileRows x 128. The inner dimension passes through a ring of stages in shared
// memory, 64 at a time: `left` as it is, the weight as codes with one scale for 32 of them. Each warp decodes the codes
// of its own 16 columns, once, straight into the registers that mma takes them from.
#pragma once

#include "device/elements.cuh"
#include "device/problem.cuh"
#include "device/sources.cuh"
#include "device/weight_chunk.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kGemmWarps = 8;
constexpr int kGemmThreads = kGemmWarps * kWarp;
constexpr int kGemmStages = 4;
constexpr int kWarpCols = kGemmTileCols / kGemmWarps;
constexpr int kFragments = kWarpCols / kMmaCols;  // of a warp's columns
// Of one step's weights a thread brings one chunk.
static_assert(kGemmTileCols * kGemmStep == kGemmThreads * kGemmChunk);
// And of the left operand one 16-byte vector of every so many rows.
constexpr int kLeftRowsAtOnce = 32;
constexpr int kChunkBytes = kGemmChunk / 2;
using GemmTable = PairTable<4>;  // more copies would take the room of a stage

struct GemmArgs {
  QuantizedWeightView weight;
  WeightShifts shifts;
  std::uint32_t last_chunk;  // of an aligned weight
  std::int64_t rows, cols, inner;
  ConstMatrix left;         // [rows, inner]
  std::int64_t left_apart;  // bytes between the rows that one thread brings
  ConstMatrix low_rank;     // [rows, rank]
  bool low_rank_vectors;    // whose rows are whole 16-byte vectors
  const void* right;        // B [cols, rank] or A [rank, cols]
  DType right_dtype;
  float right_factor;
  Dropout dropout;   // backward: of the low-rank part
  const void* bias;  // forward: [cols] or null
  Matrix out;
  GemmConfig config;
  // Tiles whose steps several blocks share: the sums of each block that has not the tile's first step, in the order in
  // which its threads hold them, and whether they are there.
  float* sums;
  std::uint32_t* ready;
};

// Which column of the result a lane holds. mma gives lane (g, t) the columns g of B, and 2t and 2t+1 of C, of each
// fragment. Fragment f takes the warp's columns f, f + kFragments, ..., so that a lane ends up with neighbours:
//
//   of B, column g of fragment f:            kFragments * g + f
//   of C, columns 2t, 2t+1 of all fragments: kFragments * 2t + {0 ... 2 * kFragments - 1}
struct Lane {
  unsigned thread, warp, g, t;
  __device__ Lane()
      : thread(static_cast<unsigned>(thread_index())), warp(thread / kWarp), g(thread % kWarp / 4), t(thread % 4) {}
  __device__ unsigned col_of_b(unsigned f) const { return warp * kWarpCols + kFragments * g + f; }
  __device__ unsigned col_of_c() const { return warp * kWarpCols + kFragments * 2 * t; }
};
constexpr int kLaneCols = 2 * kFragments;

// Parts of a stage begin at multiples of this, so that a place within one is turned to another by flipping bits.
constexpr int kStageAlignment = 128;

template <bool kAligned>
struct WeightStage {
  alignas(kStageAlignment) std::uint8_t codes[kGemmThreads * kChunkBytes];
  alignas(kStageAlignment) ChunkScale<kAligned> scales[kGemmThreads];
};

// How the chunks of a step's weights lie in its stage, and how lanes decode them. The columns of the result are rows of
// W, which lie along the inner dimension: 128 rows of two chunks.
//
//   row    chunks
//   0-3    0 1          the chunks of every other four rows change places, so that rows that a warp reads at once lie
//   4-7    1 0          in different banks
struct WeightRowsOfTile {
  static constexpr unsigned kRowChunks = kGemmStep / kGemmChunk;
  __device__ static unsigned place(unsigned row, unsigned chunk) { return row * kRowChunks + (chunk ^ (row / 4 % 2)); }
  // Of a thread's chunk: where in the inner dimension of the step, and among the columns of the tile, it begins.
  __device__ static unsigned inner_of(unsigned item) { return item % kRowChunks * kGemmChunk; }
  __device__ static unsigned col_of(unsigned item) { return item / kRowChunks; }
  // Its element of the weight, and how far the next step's is.
  __device__ static std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return col * w.K + inner;
  }
  __device__ static std::int64_t step(const QuantizedWeightView&) { return kGemmStep; }
  // The place of a lane's first chunk, where in it its codes begin, and which byte of each word is its.
  __device__ static unsigned first_of(const Lane& lane) { return place(lane.col_of_b(0), 0); }
  __device__ static unsigned begin_of(const Lane&) { return 0; }
  __device__ static unsigned byte_of_lane(const Lane& lane) { return lane.t; }
  // What a lane decodes of one half of a step: of each of its columns, 32 codes and their scale.
  template <bool kAligned>
  struct Registers {
    Vector<std::uint32_t, 4> words[kFragments];
    ChunkScale<kAligned> scales[kFragments];

    // `codes`, `scales`: of the lane's first chunk. The step's other half has its chunk beside it.
    __device__ __forceinline__ void load(const SharedPlace& codes, const SharedPlace& scales, unsigned half) {
      static_assert(4 % kFragments == 0);  // the lane's rows are neighbours that hold their chunks in one order
      constexpr unsigned kScale = sizeof(ChunkScale<kAligned>);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        words[f] =
            load_shared<Vector<std::uint32_t, 4>>(codes.flipped(half * kChunkBytes).at(f * kRowChunks * kChunkBytes));
        this->scales[f] = load_shared<ChunkScale<kAligned>>(scales.flipped(half * kScale).at(f * kRowChunks * kScale));
      }
    }
    // The operand of the half's s-th mma: elements 2t, 2t+1 of each eight, which are byte t of a word.
    template <class T>
    __device__ __forceinline__ void decode(std::uint32_t (&b)[kFragments][2], int s, const GemmTable& table,
                                           unsigned byte) const {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const GemmTable::Pair pair = table[byte_of(words[f].at[2 * s + j], byte)];
          const unsigned i = 16 * s + 8 * j + 2 * byte;
          b[f][j] = pack_pair<T>(pair.at[0] * scales[f].at(i), pair.at[1] * scales[f].at(i + 1));
        }
      }
    }
  };
};

// The columns of the result are columns of W, and the inner dimension goes over its rows: 64 rows of four chunks.
//
//   row   chunks
//   0, 1  0 1 2 3
//   2, 3  1 0 3 2       lanes of equal g read rows 2t: four that lie in different banks
//   4, 5  2 3 0 1
//   6, 7  3 2 1 0
struct WeightColumnsOfTile {
  static constexpr unsigned kRowChunks = kGemmTileCols / kGemmChunk;
  __device__ static unsigned place(unsigned row, unsigned chunk) {
    return row * kRowChunks + (chunk ^ (row / 2 % kRowChunks));
  }
  __device__ static unsigned inner_of(unsigned item) { return item / kRowChunks; }
  __device__ static unsigned col_of(unsigned item) { return item % kRowChunks * kGemmChunk; }
  __device__ static std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return inner * w.K + col;
  }
  __device__ static std::int64_t step(const QuantizedWeightView& w) { return kGemmStep * w.K; }
  // The place of a lane's first chunk, with which those of every other eight rows lie in step, and its byte there.
  __device__ static unsigned first_of(const Lane& lane) { return place(2 * lane.t, lane.col_of_b(0) / kGemmChunk); }
  __device__ static unsigned begin_of(const Lane& lane) { return byte_of_lane(lane); }
  __device__ static unsigned byte_of_lane(const Lane& lane) { return lane.col_of_b(0) % kGemmChunk / 2; }

  // Of one half of a step: from each of eight rows one byte, which holds the lane's two columns.
  template <bool kAligned>
  struct Registers {
    static_assert(kFragments == 2);
    std::uint32_t bytes[2][4];
    ChunkScale<kAligned> scales[2][4];

    // `codes`, `scales`: of the lane's byte in the first row, and of its chunk.
    __device__ __forceinline__ void load(const SharedPlace& codes, const SharedPlace& scales, unsigned half) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const unsigned chunks = (32 * half + 16 * s + 8 * (j / 2) + j % 2) * kRowChunks;
          bytes[s][j] = load_shared<std::uint8_t>(codes.at(chunks * kChunkBytes));
          this->scales[s][j] = load_shared<ChunkScale<kAligned>>(
              scales.at(chunks * static_cast<unsigned>(sizeof(ChunkScale<kAligned>))));
        }
      }
    }
    template <class T>
    __device__ __forceinline__ void decode(std::uint32_t (&b)[kFragments][2], int s, const GemmTable& table,
                                           unsigned byte) const {
      const unsigned i = 2 * byte;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const GemmTable::Pair upper = table[bytes[s][2 * j]], lower = table[bytes[s][2 * j + 1]];
        const ChunkScale<kAligned>&first = scales[s][2 * j], &second = scales[s][2 * j + 1];
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          b[f][j] = pack_pair<T>(upper.at[f] * first.at(i + f), lower.at[f] * second.at(i + f));
        }
      }
    }
  };
};

// 64 elements of each row of a tile's left operand, as eight 16-byte vectors; vector v of row r stands at v ^ (r % 8),
// so that the eight rows of an ldmatrix lie in different banks.
template <class T, int kTileRows>
struct LeftStage {
  static constexpr unsigned kVector = 16 / sizeof(T);
  static constexpr unsigned kRowVectors = kGemmStep / kVector;
  alignas(kStageAlignment) T at[kTileRows * kGemmStep];

  __device__ __forceinline__ static unsigned place(unsigned row, unsigned vector) {
    return row * kGemmStep + (vector ^ (row % kRowVectors)) * kVector;
  }
  // The operand of the k-th mma of a step, of 16 rows. The place of vector 2k + h is that of h, its bits turned over by
  // those of 2k: one instruction from a lane's place for k = 0.
  __device__ static unsigned first_of(const Lane& lane) {
    return place(lane.thread % kMmaRows, lane.thread % kWarp / kMmaRows);
  }
  // `first`: the place of first_of in a stage.
  __device__ __forceinline__ static void operand(std::uint32_t (&a)[4], int row_fragment, unsigned k,
                                                 const SharedPlace& first) {
    ldmatrix_x4(a, first.flipped(2 * k * kVectorBytes).at(row_fragment * kMmaRows * kGemmStep * sizeof(T)));
  }
};

template <class T, int kTileRows, bool kAligned>
struct GemmShared {
  struct Stage {
    LeftStage<T, kTileRows> left;
    WeightStage<kAligned> weight;
  } stages[kGemmStages];
  GemmTable::Pair pairs[GemmTable::kPairs];
  typename ScaleReader<kAligned>::Nested nested;
};

template <class T, int kTileRows, bool kAligned>
constexpr std::size_t gemm_smem_bytes() {
  constexpr std::size_t kBytes = sizeof(GemmShared<T, kTileRows, kAligned>);
  static_assert(kBytes <= kMaxSmemBytes);
  return kBytes;
}

template <class T, class Weights, int kTileRows, bool kAligned>
class Gemm {
  using Shared = GemmShared<T, kTileRows, kAligned>;
  using Stage = typename Shared::Stage;
  using Left = LeftStage<T, kTileRows>;
  static constexpr int kRowFragments = kTileRows / kMmaRows;
  static constexpr bool kForward = std::is_same_v<Weights, WeightRowsOfTile>;

 public:
  __device__ Gemm(const GemmArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        scales_(args.weight, args.shifts, shared.nested),
        table_(shared.pairs),
        byte_(kept(Weights::byte_of_lane(lane_))),
        left_first_(place_in_stage(kLeft + Left::first_of(lane_) * sizeof(T))),
        codes_first_(place_in_stage(kCodes + Weights::first_of(lane_) * kChunkBytes + Weights::begin_of(lane_))),
        scales_first_(place_in_stage(kScales + Weights::first_of(lane_) * sizeof(ChunkScale<kAligned>))),
        left_to_(
            place_in_stage(kLeft + Left::place(lane_.thread / kRowVectors, lane_.thread % kRowVectors) * sizeof(T))),
        codes_to_(place_in_stage(kCodes + chunk_place() * kChunkBytes)),
        scale_to_(place_in_stage(kScales + chunk_place() * sizeof(ChunkScale<kAligned>))) {}

  // The block's run of steps: the end of a tile, whole tiles, the beginning of one.
  __device__ void run() {
    for (std::uint32_t done = 0;;) {  // steps: 2^32 of them would be minutes
      const Part part = part_after(done);
      if (part.count == 0) return;
      go_to(part);
      clear();
      if (part.first == 0) add_low_rank();
      multiply(part.first, part.count);
      finish(part_after(kept(done)));  // once more, so that the multiply has those registers
      done += static_cast<std::uint32_t>(part.count);
    }
  }

  // Tables that the whole run needs.
  __device__ void prepare() {
    GemmTable::fill(shared_.pairs, args_.weight.code);
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
    const int run = config.blocks - 1 - static_cast<int>(kept(static_cast<std::uint32_t>(block_index())));
    const std::int64_t step = config.begin_of(run) + done, rest = config.begin_of(run + 1) - step;
    const int first = static_cast<int>(step % config.steps), rest_of_tile = config.steps - first;
    return {run, step / config.steps, first, rest < rest_of_tile ? static_cast<int>(rest) : rest_of_tile};
  }
  __device__ void finish(const Part& part) {
    go_to(part);
    if (part.first > 0) return leave_sums(part.run);
    const std::int64_t end_of_tile = (part.tile + 1) * args_.config.steps;
    for (int other = part.run; args_.config.begin_of(other + 1) < end_of_tile;) add_sums(++other);
    store();
  }

  __device__ void go_to(const Part& part) {
    row_tile_ = static_cast<int>(part.tile % args_.config.row_tiles);
    col_tile_ = static_cast<int>(part.tile / args_.config.row_tiles);
  }
  // Where the tile begins.
  __device__ __forceinline__ std::int64_t row0() const { return std::int64_t{row_tile_} * kTileRows; }
  __device__ __forceinline__ std::int64_t col0() const { return std::int64_t{col_tile_} * kGemmTileCols; }
  // What it has of its size.
  __device__ __forceinline__ int rows() const {
    return static_cast<int>(args_.rows - row0() < kTileRows ? args_.rows - row0() : kTileRows);
  }
  __device__ __forceinline__ int cols() const {
    return static_cast<int>(args_.cols - col0() < kGemmTileCols ? args_.cols - col0() : kGemmTileCols);
  }

  __device__ void clear() {
    there_in_whole_ = kept(there_in(kGemmStep));
    there_in_last_ = kept(there_in(last_inner()));
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int part = 0; part < 4; ++part) sum_[i][f][part] = 0.0f;
      }
    }
  }

  // ---- the inner dimension in steps -------------------------------------------------------------------------------

  // Where this thread's share of the next step's operands comes from.
  struct Source {
    int whole_steps;              // that are left of the inner dimension
    const T* left;                // in the first of its rows
    Position<kAligned> position;  // of its chunk of the weight
  };
  __device__ static Position<kAligned> position_of(std::int64_t element) {
    return static_cast<Position<kAligned>>(kAligned ? element / kGemmChunk : element);
  }

  // Stages are passed as bytes from the first.
  static constexpr std::uint32_t kStage = sizeof(Stage);
  static constexpr std::uint32_t kLeft = offsetof(Stage, left);
  static constexpr std::uint32_t kCodes = offsetof(Stage, weight) + offsetof(WeightStage<kAligned>, codes);
  static constexpr std::uint32_t kScales = offsetof(Stage, weight) + offsetof(WeightStage<kAligned>, scales);
  static_assert(kStage % kStageAlignment == 0);
  __device__ SharedPlace place_in_stage(std::size_t bytes) const {
    return SharedPlace(shared_.stages).at(static_cast<std::uint32_t>(bytes)).kept();
  }

  __device__ void multiply(int first, int steps) {
    const std::int64_t inner0 = std::int64_t{first} * kGemmStep;
    Source source = {static_cast<int>(args_.inner / kGemmStep) - first, left_source(args_.left, inner0),
                     position_of(Weights::element(args_.weight, inner0 + Weights::inner_of(lane_.thread),
                                                  col0() + Weights::col_of(lane_.thread)))};
    PendingScale<kAligned> scale;
#pragma unroll 1
    for (int ahead = 0; ahead < kGemmStages - 1; ++ahead) {
      if (ahead < steps) {
        fetch(ahead * kStage, source, scale);
        keep_scale(ahead * kStage, scale);
      }
      cp_async_commit();  // an empty group too: the n-th is always step n's
    }
    std::uint32_t now = 0, before = (kGemmStages - 1) * kStage;
#pragma unroll 1
    for (int left = steps; left > 0; --left) {
      cp_async_wait<kGemmStages - 2>();
      sync_threads();  // this step's stage is there for all, and the one before has been read by all
      const bool more = left >= kGemmStages;
      if (more) fetch(before, source, scale);
      cp_async_commit();
      consume(now);
      if (more) keep_scale(before, scale);
      before = now;
      now = now == (kGemmStages - 1) * kStage ? 0 : now + kStage;
    }
    sync_threads();  // the next tile begins with stages that have been read
  }

  // The weight's chunk and the left operand's rows of one step.
  __device__ __forceinline__ void fetch(std::uint32_t stage, Source& source, PendingScale<kAligned>& scale) const {
    const bool whole = source.whole_steps > 0;
    if constexpr (kAligned) {
      fetch_left_vectors(stage, source.left, args_.left_apart, whole ? there_in_whole_ : there_in_last_);
      // What the product has not of a chunk is multiplied by zeros of the left operand, or its column is not stored.
      const std::uint32_t chunk = source.position < args_.last_chunk ? source.position : args_.last_chunk;
      cp_async_or_zeros(codes_to_.at(stage), args_.weight.codes + std::uint64_t{chunk} * kChunkBytes, 1);
      scale.fetch(scales_, chunk);
    } else {
      const int inner = whole ? kGemmStep : last_inner();
      fetch_left_elements(stage, source.left, args_.left.stride, inner);
      const int inner_left = inner - static_cast<int>(Weights::inner_of(lane_.thread));
      const int cols_left = cols() - static_cast<int>(Weights::col_of(lane_.thread));
      const int count = inner_left <= 0 || cols_left <= 0 ? 0 : kForward ? inner_left : cols_left;
      Vector<std::uint32_t, kCodeWords> words[1];
      gather_codes<4>(args_.weight.codes, source.position, count, words);
      store_shared(codes_to_.at(stage), words[0]);
      scale.fetch(args_.weight, scales_, source.position, count);
    }
    --source.whole_steps;
    source.left += kGemmStep;
    source.position += position_of(Weights::step(args_.weight));
  }
  __device__ __forceinline__ int last_inner() const { return static_cast<int>(args_.inner % kGemmStep); }
  __device__ __forceinline__ void keep_scale(std::uint32_t stage, const PendingScale<kAligned>& scale) const {
    store_shared(scale_to_.at(stage), scale.finish(scales_));
  }
  __device__ __forceinline__ unsigned chunk_place() const {
    return kForward ? Weights::place(Weights::col_of(lane_.thread), Weights::inner_of(lane_.thread) / kGemmChunk)
                    : Weights::place(Weights::inner_of(lane_.thread), Weights::col_of(lane_.thread) / kGemmChunk);
  }

  // A thread brings the same 16-byte vector of every 32nd row.
  static constexpr unsigned kRowVectors = Left::kRowVectors;
  static constexpr unsigned kVector = Left::kVector;
  static constexpr unsigned kRowsAtOnce = kLeftRowsAtOnce;
  static_assert(kRowsAtOnce == kGemmThreads / kRowVectors);
  __device__ __forceinline__ const T* left_source(const ConstMatrix& matrix, std::int64_t inner0) const {
    return static_cast<const T*>(matrix.data) + (row0() + lane_.thread / kRowVectors) * matrix.stride + inner0 +
           lane_.thread % kRowVectors * kVector;
  }
  static constexpr int kVectorsOfThread = (kTileRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr std::uint32_t kBytesApart = kRowsAtOnce * kGemmStep * sizeof(T);
  // A bit for each of them that is there, in a step of which `inner` elements are.
  __device__ unsigned there_in(int inner) const {
    unsigned bits = 0;
    const int rest = inner - static_cast<int>(lane_.thread % kRowVectors * kVector);
#pragma unroll
    for (int i = 0; i < kVectorsOfThread; ++i) {
      const int row = static_cast<int>(lane_.thread / kRowVectors + i * kRowsAtOnce);
      if (rest > 0 && row < rows()) bits |= 1u << i;
    }
    return bits;
  }
  // `from`: left_source's; `apart`: bytes to the next of its rows. `there`: there_in's.
  __device__ __forceinline__ void fetch_left_vectors(std::uint32_t stage, const T* from, std::int64_t apart,
                                                     unsigned there) const {
    if (kTileRows < kRowsAtOnce && lane_.thread >= kTileRows * kRowVectors) return;
#pragma unroll
    for (int i = 0; i < kVectorsOfThread; ++i) {
      cp_async_or_zeros(left_to_.at(stage + i * kBytesApart), from, there & 1u << i);
      from = reinterpret_cast<const T*>(reinterpret_cast<const std::byte*>(from) + apart);
    }
  }
  // Of rows that are no vectors, and of which `inner` elements are there.
  __device__ __forceinline__ void fetch_left_elements(std::uint32_t stage, const T* from, std::int64_t stride,
                                                      int inner) const {
    const int first = static_cast<int>(lane_.thread / kRowVectors);
    const int rest = inner - static_cast<int>(lane_.thread % kRowVectors * kVector);
#pragma unroll
    for (int i = 0; i < kVectorsOfThread; ++i) {
      const int row = first + i * static_cast<int>(kRowsAtOnce);
      if (row >= kTileRows) break;
      Vector<T, kVector> values{};
#pragma unroll
      for (int j = 0; j < static_cast<int>(kVector); ++j) {
        if (j < rest && row < rows()) values.at[j] = from[j];
      }
      store_shared(left_to_.at(stage + i * kBytesApart), values);
      from += kRowsAtOnce * stride;
    }
  }

  __device__ __forceinline__ void consume(std::uint32_t stage) {
    const SharedPlace left = left_first_.at(stage), codes = codes_first_.at(stage), scales = scales_first_.at(stage);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      typename Weights::template Registers<kAligned> weights;
      weights.load(codes, scales, half);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        std::uint32_t b[kFragments][2];
        weights.template decode<T>(b, s, table_, byte_);
        multiply_rows(left, 2 * half + s, b);
      }
    }
  }
  // `left`: the lane's first place of the stage.
  __device__ __forceinline__ void multiply_rows(const SharedPlace& left, unsigned k,
                                                const std::uint32_t (&b)[kFragments][2]) {
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      std::uint32_t a[4];
      Left::operand(a, i, k, left);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) mma_16x8x16<T>(sum_[i][f], a, b[f]);
    }
  }

  // ---- the adapter: a few more of the inner dimension --------------------------------------------------------------

  __device__ __forceinline__ float right_at(std::int64_t r, std::int64_t col) const {
    const std::int64_t rank = args_.low_rank.cols;
    if (r >= rank || col >= args_.cols) return 0.0f;
    return args_.right_factor *
           load_as_f32(args_.right, args_.right_dtype, kForward ? col * rank + r : r * args_.cols + col);
  }

  // The left operand as in other steps, through the first stage; the right one, which is small, from where it lies.
  __device__ void add_low_rank() {
    const std::int64_t rank = args_.low_rank.cols;
#pragma unroll 1
    for (std::int64_t r0 = 0; r0 < rank; r0 += kGemmStep) {
      const int there = rank - r0 < kGemmStep ? static_cast<int>(rank - r0) : kGemmStep;
      const T* const from = left_source(args_.low_rank, r0);
      if (args_.low_rank_vectors) {
        fetch_left_vectors(0, from, args_.low_rank.stride * kRowsAtOnce * sizeof(T), there_in(there));
      } else {
        fetch_left_elements(0, from, args_.low_rank.stride, there);
      }
      cp_async_commit();
      cp_async_wait<0>();
      sync_threads();
#pragma unroll 1
      for (int k = 0; k * kMmaInner < there; ++k) {
        const std::int64_t r = r0 + k * kMmaInner + 2 * lane_.t;
        std::uint32_t b[kFragments][2];
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const std::int64_t col = col0() + lane_.col_of_b(f);
          b[f][0] = pack_pair<T>(right_at(r, col), right_at(r + 1, col));
          b[f][1] = pack_pair<T>(right_at(r + 8, col), right_at(r + 9, col));
        }
        multiply_rows(left_first_, k, b);
      }
      sync_threads();  // before the stage is filled again
    }
    if constexpr (!kForward) {
      // Before anything else is in the sums, because the mask falls on nothing else.
      if (rank > 0 && args_.dropout.threshold > 0) drop();
    }
  }

  // In two loops: the random bits are much code, the sums are registers and must be named.
  __device__ void drop() {
    static_assert(8 % kLaneCols == 0 && 2 * kRowFragments * kLaneCols <= 64);  // a row's columns share their bits
    const std::int64_t m = row0() + lane_.g, col = col0() + lane_.col_of_c();
    const std::uint64_t seed = args_.dropout.prepared().seed;
    std::uint64_t kept = 0;
#pragma unroll 1
    for (int row = 2 * kRowFragments - 1; row >= 0; --row) {
      const PhiloxBlock random = dropout_random(seed, m + 8 * row, col);
#pragma unroll
      for (int j = kLaneCols - 1; j >= 0; --j) {
        kept = kept << 1 | (dropout_keeps(random, col + j, args_.dropout.threshold) ? 1u : 0u);
      }
    }
#pragma unroll
    for (int row = 0; row < 2 * kRowFragments; ++row) {
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        float& sum = sum_of(row / 2, row % 2, j);
        sum = (kept >> (row * kLaneCols + j) & 1) != 0 ? sum : 0.0f;
      }
    }
  }

  // ---- results -----------------------------------------------------------------------------------------------------

  // Of row g + 8h of row fragment i, the j-th of the lane's columns.
  __device__ __forceinline__ float& sum_of(int i, int h, int j) {
    return sum_[i][j % kFragments][2 * h + j / kFragments];
  }

  __device__ __forceinline__ float* sums_of(int block, int i, int f) const {
    return args_.sums +
           (((std::int64_t{block} * kRowFragments + i) * kFragments + f) * kGemmThreads + thread_index()) * 4;
  }
  __device__ void leave_sums(int mine) {
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const float (&s)[4] = sum_[i][f];
        store_vector<float, 4>(sums_of(mine, i, f), {{s[0], s[1], s[2], s[3]}});
      }
    }
    sync_threads();
    if (thread_index() == 0) signal(args_.ready + mine, 1);
  }
  __device__ void add_sums(int other) {
    if (thread_index() == 0) wait_for(args_.ready + other, 1);
    sync_threads();
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const Vector<float, 4> s = load_vector<float, 4>(sums_of(other, i, f));
#pragma unroll
        for (int part = 0; part < 4; ++part) sum_[i][f][part] += s.at[part];
      }
    }
  }

  __device__ void store() {
    const std::int64_t col = col0() + lane_.col_of_c();
    const int rest = cols() - static_cast<int>(lane_.col_of_c());
    if (rest <= 0) return;
    const int count = rest < kLaneCols ? rest : kLaneCols;
    float bias[kLaneCols] = {};
    if (kForward && args_.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        if (j < count) bias[j] = to_f32(static_cast<const T*>(args_.bias)[col + j]);
      }
    }
    T* out = static_cast<T*>(args_.out.data) + (row0() + lane_.g) * args_.out.stride + col;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T values[kLaneCols];
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) values[j] = from_f32<T>(sum_of(i, h, j) + bias[j]);
        if (i * kMmaRows + 8 * h + static_cast<int>(lane_.g) < rows()) store_elements(out, count, values);
        out += 8 * args_.out.stride;
      }
    }
  }

  const GemmArgs& args_;
  Shared& shared_;
  const ScaleReader<kAligned> scales_;
  const GemmTable table_;
  const Lane lane_;
  const unsigned byte_;
  // Where this thread reads and writes: in the first stage, and as far into every other.
  const SharedPlace left_first_, codes_first_, scales_first_, left_to_, codes_to_, scale_to_;
  int row_tile_ = 0, col_tile_ = 0;
  unsigned there_in_whole_ = 0, there_in_last_ = 0;
  float sum_[kRowFragments][kFragments][4];
};

template <class T, class Weights, int kTileRows, bool kAligned>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_kernel(const __grid_constant__ GemmArgs args) {
  Gemm<T, Weights, kTileRows, kAligned> gemm(args, *dynamic_smem<GemmShared<T, kTileRows, kAligned>>());
  gemm.prepare();
  gemm.run();
}

// ---- on the host
// -----------------------------------------------------------------------------------------------------

// `args`: without what is filled in here.
template <class Weights>
void gemm(GemmArgs args, const Stream& stream) {
  args.shifts = shifts_of(args.weight);
  args.last_chunk = last_chunk_of(args.weight);
  args.left_apart = args.left.stride * kLeftRowsAtOnce * static_cast<std::int64_t>(size_of(args.left.dtype));
  args.low_rank_vectors = rows_are_vectors(args.low_rank, args.low_rank.cols);
  const int blocks = args.config.blocks;
  if (blocks == 0) return;

  // The flags come last, behind sums that are a whole number of vectors.
  const auto sums = static_cast<std::size_t>(blocks) * args.config.tile_rows * kGemmTileCols * sizeof(float);
  const std::size_t flags = static_cast<std::size_t>(blocks) * sizeof(std::uint32_t);
  const Workspace workspace(args.config.splits_a_tile() ? sums + flags : 0, stream);
  if (args.config.splits_a_tile()) {
    args.sums = reinterpret_cast<float*>(workspace.data());
    args.ready = reinterpret_cast<std::uint32_t*>(workspace.data() + sums);
    fill_bytes(args.ready, 0, flags, stream);
  }
  const auto start = [&]<class T, int kTileRows, bool kAligned>() {
    launch<gemm_kernel<T, Weights, kTileRows, kAligned>>(
        {blocks, kGemmThreads, gemm_smem_bytes<T, kTileRows, kAligned>()}, stream, args);
  };
  const auto with_rows = [&]<class T>() {
    if (!args.config.aligned) {
      if (args.config.tile_rows == 16) return start.template operator()<T, 16, false>();
      return start.template operator()<T, 64, false>();
    }
    if (args.config.tile_rows == 16) return start.template operator()<T, 16, true>();
    if (args.config.tile_rows == 64) return start.template operator()<T, 64, true>();
    // Where gemm_config never asks for it, it is not compiled.
    if constexpr (std::is_same_v<Weights, WeightRowsOfTile>) return start.template operator()<T, 128, true>();
  };
  if (args.left.dtype == DType::bf16) {
    with_rows.template operator()<Bf16>();
  } else {
    with_rows.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
