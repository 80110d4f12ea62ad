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
constexpr int kChunkBytes = kGemmChunk / 2;
using GemmTable = PairTable<4>;  // more copies would take the room of a stage

struct GemmArgs {
  QuantizedWeightView weight;
  int block_shift;   // log2 of the blocksize
  int nested_shift;  // of the nested one, or -1 if it is no power of two
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

template <bool kAligned>
struct WeightStage {
  alignas(16) std::uint8_t codes[kGemmThreads * kChunkBytes];
  ChunkScale<kAligned> scales[kGemmThreads];
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
  // What a lane decodes of one half of a step: of each of its columns, 32 codes and their scale.
  template <bool kAligned>
  struct Registers {
    Vector<std::uint32_t, 4> words[kFragments];
    ChunkScale<kAligned> scales[kFragments];

    __device__ __forceinline__ void load(const WeightStage<kAligned>& stage, unsigned half, const Lane& lane) {
      static_assert(4 % kFragments == 0);  // the lane's rows are neighbours that hold their chunks in one order
      const unsigned first = place(lane.col_of_b(0), 0);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const unsigned at = (first ^ half) + f * kRowChunks;
        words[f] =
            load_vector<std::uint32_t, 4>(reinterpret_cast<const std::uint32_t*>(stage.codes + at * kChunkBytes));
        scales[f] = stage.scales[at];
      }
    }
    // The operand of the half's s-th mma: elements 2t, 2t+1 of each eight, which are byte t of a word.
    template <class T>
    __device__ __forceinline__ void decode(std::uint32_t (&b)[kFragments][2], int s, const GemmTable& table,
                                           const Lane& lane) const {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const GemmTable::Pair pair = table[byte_of(words[f].at[2 * s + j], lane.t)];
          const unsigned i = 16 * s + 8 * j + 2 * lane.t;
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

  // Of one half of a step: from each of eight rows one byte, which holds the lane's two columns.
  template <bool kAligned>
  struct Registers {
    static_assert(kFragments == 2);
    std::uint32_t bytes[2][4];
    ChunkScale<kAligned> scales[2][4];

    __device__ __forceinline__ void load(const WeightStage<kAligned>& stage, unsigned half, const Lane& lane) {
      const unsigned col = lane.col_of_b(0), byte = col % kGemmChunk / 2;
      const unsigned first = place(2 * lane.t, col / kGemmChunk);  // of its row of eight, and of every other eight
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const unsigned at = first + (32 * half + 16 * s + 8 * (j / 2) + j % 2) * kRowChunks;
          bytes[s][j] = stage.codes[at * kChunkBytes + byte];
          scales[s][j] = stage.scales[at];
        }
      }
    }
    template <class T>
    __device__ __forceinline__ void decode(std::uint32_t (&b)[kFragments][2], int s, const GemmTable& table,
                                           const Lane& lane) const {
      const unsigned i = lane.col_of_b(0) % kGemmChunk;
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
  alignas(16) T at[kTileRows * kGemmStep];

  __device__ __forceinline__ static unsigned place(unsigned row, unsigned vector) {
    return row * kGemmStep + (vector ^ (row % kRowVectors)) * kVector;
  }
  // The operand of the k-th mma of a step, of 16 rows. The place of vector 2k + h is that of h, its bits turned over by
  // those of 2k: one instruction from a lane's address for k = 0.
  __device__ __forceinline__ void operand(std::uint32_t (&a)[4], int row_fragment, unsigned k, const Lane& lane) const {
    const unsigned first = place(lane.thread % kMmaRows, lane.thread % kWarp / kMmaRows);
    ldmatrix_x4(a, at + (first ^ 2 * k * kVector) + row_fragment * kMmaRows * kGemmStep);
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
  static constexpr int kRowFragments = kTileRows / kMmaRows;
  static constexpr bool kForward = std::is_same_v<Weights, WeightRowsOfTile>;

 public:
  __device__ Gemm(const GemmArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        scales_(args.weight, args.block_shift, args.nested_shift, shared.nested),
        table_(shared.pairs) {}

  // The block's run of steps: the end of a tile, whole tiles, the beginning of one.
  __device__ void run() {
    const GemmConfig& config = args_.config;
    // Runs are given out from the last, so that a block waits only for blocks of lower index, which have begun.
    const int mine = config.blocks - 1 - static_cast<int>(block_index());
    for (std::int64_t step = config.begin_of(mine); step < config.begin_of(mine + 1);) {
      const std::int64_t tile = step / config.steps, rest_of_run = config.begin_of(mine + 1) - step;
      const int first = static_cast<int>(step % config.steps), rest_of_tile = config.steps - first;
      const int count = rest_of_run < rest_of_tile ? static_cast<int>(rest_of_run) : rest_of_tile;
      go_to(static_cast<int>(tile % config.row_tiles), static_cast<int>(tile / config.row_tiles));
      if (first == 0) add_low_rank();
      multiply(first, count);
      if (first > 0) {
        leave_sums(mine);
      } else {
        const std::int64_t end_of_tile = step + config.steps;
        for (int other = mine; config.begin_of(other + 1) < end_of_tile;) add_sums(++other);
        store();
      }
      step += count;
    }
  }

  // Tables that the whole run needs.
  __device__ void prepare() {
    GemmTable::fill(shared_.pairs, args_.weight.code);
    shared_.nested.fill(args_.weight);
    sync_threads();
  }

 private:
  // Where the tile begins.
  __device__ __forceinline__ std::int64_t row0() const { return std::int64_t{row_tile_} * kTileRows; }
  __device__ __forceinline__ std::int64_t col0() const { return std::int64_t{col_tile_} * kGemmTileCols; }

  __device__ void go_to(int row_tile, int col_tile) {
    row_tile_ = row_tile;
    col_tile_ = col_tile;
    rows_ = static_cast<int>(args_.rows - row0() < kTileRows ? args_.rows - row0() : kTileRows);
    cols_ = static_cast<int>(args_.cols - col0() < kGemmTileCols ? args_.cols - col0() : kGemmTileCols);
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
    int whole_steps;       // that are left of the inner dimension
    const T* left;         // in the first of its rows
    std::int64_t element;  // of the weight
  };

  __device__ void multiply(int first, int steps) {
    const std::int64_t inner0 = std::int64_t{first} * kGemmStep;
    Source source = {static_cast<int>(args_.inner / kGemmStep) - first, left_source(args_.left, inner0),
                     Weights::element(args_.weight, inner0 + Weights::inner_of(lane_.thread),
                                      col0() + Weights::col_of(lane_.thread))};
    WeightChunk<kAligned> chunk;
#pragma unroll 1
    for (int ahead = 0; ahead < kGemmStages - 1; ++ahead) {
      if (ahead < steps) {
        fetch(shared_.stages[ahead], source, chunk);
        keep_scale(shared_.stages[ahead], chunk);
      }
      cp_async_commit();  // an empty group too: the n-th is always step n's
    }
    int now = 0;
#pragma unroll 1
    for (int left = steps; left > 0; --left) {
      cp_async_wait<kGemmStages - 2>();
      sync_threads();  // this step's stage is there for all, and the one before has been read by all
      Stage& before = shared_.stages[now == 0 ? kGemmStages - 1 : now - 1];
      const bool more = left >= kGemmStages;
      if (more) fetch(before, source, chunk);
      cp_async_commit();
      consume(shared_.stages[now]);
      if (more) keep_scale(before, chunk);
      now = now == kGemmStages - 1 ? 0 : now + 1;
    }
    sync_threads();  // the next tile begins with stages that have been read
  }

  // The weight's chunk and the left operand's rows of one step.
  __device__ __forceinline__ void fetch(Stage& stage, Source& source, WeightChunk<kAligned>& chunk) const {
    const int inner = source.whole_steps > 0 ? kGemmStep : static_cast<int>(args_.inner % kGemmStep);
    fetch_left<kAligned>(stage.left, source.left, args_.left.stride, inner);
    const unsigned item = lane_.thread;
    const int inner_left = inner - static_cast<int>(Weights::inner_of(item));
    const int cols_left = cols_ - static_cast<int>(Weights::col_of(item));
    chunk.fetch(args_.weight, scales_, source.element,
                cols_left <= 0    ? 0
                : inner_left <= 0 ? 0
                : kForward        ? inner_left
                                  : cols_left,
                stage.weight.codes + chunk_place() * kChunkBytes);
    --source.whole_steps;
    source.left += kGemmStep;
    source.element += Weights::step(args_.weight);
  }
  __device__ __forceinline__ void keep_scale(Stage& stage, const WeightChunk<kAligned>& chunk) const {
    stage.weight.scales[chunk_place()] = chunk.scale(scales_);
  }
  __device__ __forceinline__ unsigned chunk_place() const {
    return kForward ? Weights::place(Weights::col_of(lane_.thread), Weights::inner_of(lane_.thread) / kGemmChunk)
                    : Weights::place(Weights::inner_of(lane_.thread), Weights::col_of(lane_.thread) / kGemmChunk);
  }

  // A thread brings the same 16-byte vector of every 32nd row.
  static constexpr unsigned kRowVectors = LeftStage<T, kTileRows>::kRowVectors;
  static constexpr unsigned kVector = LeftStage<T, kTileRows>::kVector;
  static constexpr unsigned kRowsAtOnce = kGemmThreads / kRowVectors;
  __device__ __forceinline__ const T* left_source(const ConstMatrix& matrix, std::int64_t inner0) const {
    return static_cast<const T*>(matrix.data) + (row0() + lane_.thread / kRowVectors) * matrix.stride + inner0 +
           lane_.thread % kRowVectors * kVector;
  }
  // `from`: left_source's, of which `inner` elements of the rows are there. kVectors: whole vectors of them.
  template <bool kVectors>
  __device__ __forceinline__ void fetch_left(LeftStage<T, kTileRows>& to, const T* from, std::int64_t stride,
                                             int inner) const {
    const unsigned first = lane_.thread / kRowVectors, vector = lane_.thread % kRowVectors;
    const int rest = inner - static_cast<int>(vector * kVector), rows = rows_ - static_cast<int>(first);
    T* into = to.at + LeftStage<T, kTileRows>::place(first, vector);
#pragma unroll
    for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
      if (kTileRows % kRowsAtOnce != 0 && first + row >= kTileRows) break;
      if constexpr (kVectors) {
        cp_async<16>(into, from, rest > 0 && row < rows ? 16 : 0);
      } else {
        Vector<T, kVector> values{};
#pragma unroll
        for (int j = 0; j < static_cast<int>(kVector); ++j) {
          if (j < rest && row < rows) values.at[j] = from[j];
        }
        store_vector<T, kVector>(into, values);
      }
      from += kRowsAtOnce * stride;
      into += kRowsAtOnce * kGemmStep;
    }
  }

  __device__ __forceinline__ void consume(const Stage& stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      typename Weights::template Registers<kAligned> weights;
      weights.load(stage.weight, half, lane_);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        std::uint32_t b[kFragments][2];
        weights.template decode<T>(b, s, table_, lane_);
        multiply_rows(stage.left, 2 * half + s, b);
      }
    }
  }
  __device__ __forceinline__ void multiply_rows(const LeftStage<T, kTileRows>& left, unsigned k,
                                                const std::uint32_t (&b)[kFragments][2]) {
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      std::uint32_t a[4];
      left.operand(a, i, k, lane_);
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
    LeftStage<T, kTileRows>& left = shared_.stages[0].left;
#pragma unroll 1
    for (std::int64_t r0 = 0; r0 < rank; r0 += kGemmStep) {
      const int there = rank - r0 < kGemmStep ? static_cast<int>(rank - r0) : kGemmStep;
      const T* const from = left_source(args_.low_rank, r0);
      if (args_.low_rank_vectors) {
        fetch_left<true>(left, from, args_.low_rank.stride, there);
      } else {
        fetch_left<false>(left, from, args_.low_rank.stride, there);
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
        multiply_rows(left, k, b);
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
    std::uint64_t kept = 0;
#pragma unroll 1
    for (int row = 2 * kRowFragments - 1; row >= 0; --row) {
      const PhiloxBlock random = dropout_random(args_.dropout.seed, m + 8 * row, col);
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
    const int rest = cols_ - static_cast<int>(lane_.col_of_c());
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
        if (i * kMmaRows + 8 * h + static_cast<int>(lane_.g) < rows_) store_elements(out, count, values);
        out += 8 * args_.out.stride;
      }
    }
  }

  const GemmArgs& args_;
  Shared& shared_;
  const ScaleReader<kAligned> scales_;
  const GemmTable table_;
  const Lane lane_;
  int row_tile_ = 0, col_tile_ = 0;
  int rows_ = 0, cols_ = 0;  // what the tile has of its size
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
  args.block_shift = block_shift_of(args.weight);
  args.nested_shift = nested_shift_of(args.weight);
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
