// The forward product of up to eight rows of x, where reading the weight is what takes time: Y = [X | U] . [W | s*B]^T
// + bias.
//
// A block takes 16 rows of W at a time. Its warps share K, 128 elements of each row a turn, and add up their sums at
// the end, always in one order. Lane (g, t) of a warp, g = lane / 4 and t = lane % 4, has of rows g and g + 8 the
// elements 32 t ... 32 t + 31: 16 bytes of 4-bit codes, which share a scale.
//
//   K of a turn    0 ... 31  32 ... 63  64 ... 95  96 ... 127
//   row g, g + 8   t = 0     t = 1      t = 2      t = 3
//
// Where each group of rows has a weight of its own, a block has some of the columns of one group after another, up to
// eight rows at a time.
//
// In bf16 and fp16 a tensor core multiplies: the weights are the operand of 16 rows, and x, filled up with zeros, the
// one of 8. In which order K is summed is free, so of its 16 a lane's four come from its own 32. In fp32 CUDA cores do.
#include "device/weight_chunk.cuh"
#include "product/product.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kGemvWarps = 8;
constexpr int kGemvThreads = kGemvWarps * kWarp;
constexpr int kQuad = 4;                        // lanes that share a row
constexpr int kFour = 4;                        // elements of a row that are multiplied at once
constexpr int kTurn = kQuad * kChunk;           // of K, that a warp takes at once
static_assert(kGemvCols == 2 * kWarp / kQuad);  // a lane has two rows of W

// As many as lanes that shared memory serves at once: each of them has banks of its own.
using GemvTable = PairTable<16>;

struct GemvArgs : Product {
  WeightScales scales;
  std::uint32_t last_chunk;  // of an aligned weight
};

template <bool kAligned>
struct GemvShared {
  GemvTable::Pair pairs[GemvTable::kPairs];
  typename ScaleReader<kAligned>::Nested nested;
  float sums[kGemvWarps][kGemvRows][kGemvCols];
};

struct GemvLane {
  int warp, g, t;
  __device__ GemvLane() : warp(thread_index() / kWarp), g(thread_index() % kWarp / kQuad), t(thread_index() % kQuad) {}
};

// ---- x, and the sums over it ----

// Of up to kRows rows of x, what a lane needs of them in its warp's turn: 32 elements along K, four of which are
// multiplied at once with the same of two rows of W. Sums: the warp's, of 16 rows of W with each row of x.
//
// In 16 bits a lane holds those of row g alone; mma's sums are those of W's rows g (c[0], c[1]) and g + 8 (c[2], c[3])
// with x's rows 2t and 2t + 1.
template <class T, int kRows>
class GemvRows {
  static_assert(kRows == kMmaCols);

 public:
  struct Sums {
    float c[4] = {};
  };
  using Four = Vector<std::uint32_t, 2>;

  // Of the four at `from`, which is in row 0, those that are there: `count` along K.
  __device__ static Four load_four(const T* from, std::int64_t stride, int rows, int count, const GemvLane& lane) {
    from += lane.g * stride;
    std::uint32_t bits[kFour] = {};
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (lane.g < rows && i < count) bits[i] = from[i].bits;
    }
    return {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}};
  }
  // Likewise, of rows first ... last-1.
  __device__ static Four load_four(const T* from, std::int64_t stride, int first, int last, int count,
                                   const GemvLane& lane) {
    return load_four(from, stride, last, lane.g < first ? 0 : count, lane);
  }
  // All of the chunk at `from`; kVectors: `count` is 32 or more, or less than 1.
  template <bool kVectors>
  __device__ __forceinline__ void fetch(const T* from, std::int64_t stride, int rows, int count, const GemvLane& lane) {
    constexpr int kElements = kVectorBytes / sizeof(T);
    static_assert(kElements == 2 * kFour);
#pragma unroll
    for (int i = 0; i < kChunk; i += kElements) {
      Four& first = four_[i / kFour];
      Four& second = four_[i / kFour + 1];
      if constexpr (kVectors) {
        Vector<std::uint32_t, 4> words{};
        if (lane.g < rows && count > 0) {
          words = load_vector<std::uint32_t, 4>(reinterpret_cast<const std::uint32_t*>(from + lane.g * stride + i));
        }
        first = {{words.at[0], words.at[1]}};
        second = {{words.at[2], words.at[3]}};
      } else {
        first = load_four(from + i, stride, rows, count - i, lane);
        second = load_four(from + i + kFour, stride, rows, count - i - kFour, lane);
      }
    }
  }
  __device__ __forceinline__ Four four_at(int i) const { return four_[i / kFour]; }

  __device__ __forceinline__ static void add(Sums& sums, const Four& x, const float (&w)[2][kFour]) {
    const std::uint32_t a[4] = {pack_pair<T>(w[0][0], w[0][1]), pack_pair<T>(w[1][0], w[1][1]),
                                pack_pair<T>(w[0][2], w[0][3]), pack_pair<T>(w[1][2], w[1][3])};
    const std::uint32_t b[2] = {x.at[0], x.at[1]};
    mma_16x8x16<T>(sums.c, a, b);
  }
  __device__ __forceinline__ static void leave(const Sums& sums, float (&to)[kGemvRows][kGemvCols],
                                               const GemvLane& lane) {
#pragma unroll
    for (int part = 0; part < 4; ++part) to[2 * lane.t + part % 2][lane.g + part / 2 * 8] = sums.c[part];
  }

 private:
  Four four_[kChunk / kFour];
};

// In fp32 a lane takes its part of K of all rows, from the first cache when it is multiplied: it is too much to hold.
template <int kRows>
class GemvRows<float, kRows> {
 public:
  struct Sums {
    float of[2][kRows] = {};
  };
  struct Four {
    Vector<float, kFour> row[kRows];
  };

  __device__ __forceinline__ static Four load_four(const float* from, std::int64_t stride, int rows, int count,
                                                   const GemvLane& lane) {
    return load_four(from, stride, 0, rows, count, lane);
  }
  __device__ __forceinline__ static Four load_four(const float* from, std::int64_t stride, int first, int last,
                                                   int count, const GemvLane&) {
    Four four{};
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        if (m >= first && m < last && i < count) four.row[m].at[i] = from[m * stride + i];
      }
    }
    return four;
  }
  template <bool kVectors>
  __device__ __forceinline__ void fetch(const float* from, std::int64_t stride, int rows, int count, const GemvLane&) {
    from_ = from;
    stride_ = stride;
    rows_ = rows;
    count_ = count;
    vectors_ = kVectors;
  }
  __device__ __forceinline__ Four four_at(int i) const {
    if (!vectors_) return load_four(from_ + i, stride_, rows_, count_ - i, GemvLane());
    Four four{};
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m < rows_ && count_ > 0) four.row[m] = load_vector<float, kFour>(from_ + m * stride_ + i);
    }
    return four;
  }

  __device__ __forceinline__ static void add(Sums& sums, const Four& x, const float (&w)[2][kFour]) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int i = 0; i < kFour; ++i) sums.of[row][m] = fma(w[row][i], x.row[m].at[i], sums.of[row][m]);
      }
    }
  }
  // The lanes of a row add up their parts: to all of them, in one order.
  __device__ __forceinline__ static void leave(const Sums& sums, float (&to)[kGemvRows][kGemvCols],
                                               const GemvLane& lane) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        float sum = sums.of[row][m];
#pragma unroll
        for (int mask = 1; mask < kQuad; mask *= 2) sum += shfl_xor(sum, mask);
        if (lane.t == m % kQuad) to[m][lane.g + row * 8] = sum;
      }
    }
  }

 private:
  const float* from_;
  std::int64_t stride_;
  int rows_, count_;
  bool vectors_;
};

// ---- the weight ----

// A lane's chunk of one row of W on its way: codes and scale.
template <int kBits, bool kAligned>
class GemvChunk {
 public:
  // Of an aligned weight.
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const ScaleReader<true>& scales,
                                        std::uint32_t chunk) {
    constexpr int kBytes = kVectors * kVectorBytes;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      codes_[i] = load_vector<std::uint32_t, 4>(
          reinterpret_cast<const std::uint32_t*>(w.codes + std::uint64_t{chunk} * kBytes + i * kVectorBytes));
    }
    scale_.fetch(scales, chunk);
  }
  // Of any other, from its element on; `count`: how many elements there are.
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const ScaleReader<false>& scales,
                                        std::int64_t element, int count) {
    gather_codes<kBits>(w.codes, element, count, codes_);
    scale_.fetch(w, scales, element, count);
  }
  // What four codes are multiplied by.
  __device__ __forceinline__ ChunkScale<kAligned> unit(const ScaleReader<kAligned>& scales) const {
    const ChunkScale<kAligned> scale = scale_.finish(scales);
    return kBits == 8 ? scale.divided_by(127.0f) : scale;
  }
  // The four at `first`, rounded to nothing yet.
  __device__ __forceinline__ void decode(float (&w)[kFour], int first, const ChunkScale<kAligned>& unit,
                                         const GemvTable& table) const {
#pragma unroll
    for (int i = 0; i < kFour; i += 2) {
      const int byte = (first + i) * kBits / 8;
      const std::uint32_t word = codes_[byte / kVectorBytes].at[byte % kVectorBytes / 4];
      GemvTable::Pair pair;
      if constexpr (kBits == 4) {
        pair = table.of_byte(word, byte % 4);
      } else {
        pair = {{signed_byte(word, byte % 4), signed_byte(word, byte % 4 + 1)}};
      }
      w[i] = pair.at[0] * unit.at(first + i);
      w[i + 1] = pair.at[1] * unit.at(first + i + 1);
    }
  }

 private:
  static constexpr int kVectors = kChunk * kBits / 8 / kVectorBytes;
  __device__ __forceinline__ static float signed_byte(std::uint32_t word, int i) {
    return static_cast<float>(static_cast<std::int8_t>(byte_of(word, static_cast<std::uint32_t>(i))));
  }
  Vector<std::uint32_t, 4> codes_[kVectors];
  PendingScale<kAligned> scale_;
};

// How many of a lane's chunk that begins at `first` are there, of `whole` in all.
__device__ __forceinline__ int left_of(std::int64_t whole, std::int64_t first) {
  return whole - first < kChunk ? static_cast<int>(whole - first) : kChunk;
}

// The sums of eight rows in fp32 leave registers for one block of a multiprocessor only.
template <class T, int kRows>
constexpr int kGemvBlocks = std::is_same_v<T, float> && kRows > 1 ? 1 : 2;

// What of the product a block has at a time: some columns of up to kGemvRows rows.
template <class T, bool kGroups>
class GemvPart {
 public:
  __device__ explicit GemvPart(const GemvArgs& args)
      : args_(args), apart_(grid_blocks() * kGemvCols), rows_(static_cast<int>(args.left.rows)) {}
  __device__ bool go_on() { return false; }  // it is all that the block has

  __device__ std::int64_t begin() const { return block_index() * kGemvCols; }
  __device__ std::int64_t end() const { return args_.weight.N; }
  __device__ std::int64_t apart() const { return apart_; }
  __device__ int rows() const { return rows_; }
  __device__ const T* left() const { return static_cast<const T*>(args_.left.data); }
  __device__ const T* low_rank() const { return static_cast<const T*>(args_.low_rank.data); }
  __device__ T* out() const { return static_cast<T*>(args_.out.data); }
  __device__ std::int64_t weights_before() const { return 0; }  // elements of other groups' weights
  __device__ std::int64_t biases_before() const { return 0; }

 private:
  const GemvArgs& args_;
  const std::int64_t apart_;
  const int rows_;
};

// Where there are groups: a share of the columns of all tiles of rows, tile after tile.
template <class T>
class GemvPart<T, true> {
 public:
  __device__ explicit GemvPart(const GemvArgs& args) : args_(args), of_tile_(ceil_div(args.cols, kGemvCols)) {
    const std::int64_t tiles = args.own_weights ? find_row_tile<kGemvRows>(args.groups, args.rows, kNoTile).before : 1;
    const std::int64_t all = tiles * of_tile_, share = all / grid_blocks(), rest = all % grid_blocks();
    const std::int64_t i = block_index();
    next_ = i * share + (i < rest ? i : rest);
    end_of_share_ = next_ + share + (i < rest ? 1 : 0);
  }
  // To the next tile that it has columns of, at first too: false where there is none.
  __device__ bool go_on() {
    if (next_ == end_of_share_) return false;
    tile_ = {{0, args_.rows}, 0};
    if (args_.own_weights) {
      tile_ = find_row_tile<kGemvRows>(args_.groups, args_.rows, static_cast<std::uint32_t>(next_ / of_tile_)).tile;
    }
    begin_ = next_ % of_tile_ * kGemvCols;
    const std::int64_t last = begin_ + (end_of_share_ - next_) * kGemvCols;
    end_ = last < args_.cols ? last : args_.cols;
    next_ += ceil_div(end_ - begin_, kGemvCols);
    rows_ = tile_.end - tile_.begin < kGemvRows ? static_cast<int>(tile_.end - tile_.begin) : kGemvRows;
    left_ = row0_of(args_.left);
    weights_before_ = args_.weight_of(tile_.group) * args_.elements_of_weight();
    return true;
  }

  __device__ const RowTile& tile() const { return tile_; }
  __device__ std::int64_t begin() const { return begin_; }
  __device__ std::int64_t end() const { return end_; }
  __device__ std::int64_t apart() const { return kGemvCols; }
  __device__ int rows() const { return rows_; }
  __device__ const T* left() const { return left_; }
  __device__ const T* low_rank() const { return row0_of(args_.low_rank); }
  __device__ T* out() const { return static_cast<T*>(args_.out.data) + tile_.begin * args_.out.stride; }
  __device__ std::int64_t weights_before() const { return weights_before_; }
  __device__ std::int64_t biases_before() const { return args_.weight_of(tile_.group) * args_.cols; }

 private:
  __device__ const T* row0_of(const ConstMatrix& matrix) const {
    return static_cast<const T*>(matrix.data) + tile_.begin * matrix.stride;
  }

  const GemvArgs& args_;
  const std::int64_t of_tile_;
  std::int64_t next_, end_of_share_;  // counted over all tiles
  std::int64_t begin_ = 0, end_ = 0;
  RowTile tile_{};
  int rows_ = 0;
  const T* left_ = nullptr;
  std::int64_t weights_before_ = 0;
};

template <class T, int kRows, int kBits, bool kAligned, bool kGroups>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<T, kRows>)
    gemv_kernel(const __grid_constant__ GemvArgs args) {
  using Rows = GemvRows<T, kRows>;
  const QuantizedWeightView& w = args.weight;
  GemvShared<kAligned>& shared = *dynamic_smem<GemvShared<kAligned>>();
  const ScaleReader<kAligned> scales(w, args.scales, shared.nested);
  const GemvLane lane;
  const std::int64_t K = w.K, rank = args.low_rank.cols;
  GemvPart<T, kGroups> part(args);
  if (kGroups && !part.go_on()) return;
  struct Turn {
    GemvChunk<kBits, kAligned> chunk[2];
    Rows x;
  } now, next;
  // The turn after this one, from column n0 of the result and from `k` on.
  const auto fetch = [&](std::int64_t n0, std::int64_t k) {
    const int count = left_of(K, k);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const std::int64_t n = n0 + lane.g + 8 * row, element = part.weights_before() + n * K + k;
      if constexpr (kAligned) {
        // What W has not is multiplied by zeros of x, or its sum is not stored: the last chunk will do.
        const auto chunk = static_cast<std::uint32_t>(static_cast<std::uint64_t>(element) / kChunk);
        next.chunk[row].fetch(w, scales, chunk < args.last_chunk ? chunk : args.last_chunk);
      } else {
        next.chunk[row].fetch(w, scales, element, n < w.N ? count : 0);
      }
    }
    next.x.template fetch<kAligned>(part.left() + k, args.left.stride, part.rows(), count, lane);
  };
  // Of the warp's turn, and of the lane's chunk in it.
  const std::int64_t first = lane.warp * kTurn, mine = lane.t * kChunk;
  const auto fetch_first = [&](std::int64_t n0) {
    if (n0 < part.end() && first < K) fetch(n0, first + mine);
  };

  // The first codes are on their way while the tables are filled, and later those of the next columns while the sums of
  // these are exchanged: not where scales ask a table on the way, nor where the sums of eight rows fill the registers.
  constexpr bool kEarly = kAligned && (kRows == 1 || !std::is_same_v<T, float>);
  if constexpr (kEarly) fetch_first(part.begin());
  if constexpr (kBits == 4) GemvTable::fill(shared.pairs, w.code);
  shared.nested.fill(w);
  sync_threads();
  const GemvTable table(shared.pairs);

  for (std::int64_t n0 = part.begin(); n0 < part.end(); n0 += part.apart()) {
    typename Rows::Sums sums;
    const std::int64_t n[2] = {n0 + lane.g, n0 + lane.g + 8};
    if constexpr (!kEarly) fetch_first(n0);
    for (std::int64_t k = first; k < K; k += kGemvWarps * kTurn) {
      now = next;
      const bool is_last = k + kGemvWarps * kTurn >= K;
      if constexpr (kEarly) {
        const std::int64_t next_n0 = is_last ? n0 + part.apart() : n0;
        if (next_n0 < part.end()) fetch(next_n0, (is_last ? first : k + kGemvWarps * kTurn) + mine);
      } else {
        if (!is_last) fetch(n0, k + kGemvWarps * kTurn + mine);
      }
      const ChunkScale<kAligned> units[2] = {now.chunk[0].unit(scales), now.chunk[1].unit(scales)};
#pragma unroll
      for (int i = 0; i < kChunk; i += kFour) {
        float decoded[2][kFour];
#pragma unroll
        for (int row = 0; row < 2; ++row) now.chunk[row].decode(decoded[row], i, units[row], table);
        Rows::add(sums, now.x.four_at(i), decoded);
      }
    }

    // The adapter: more of the same sums, with B in place of W. Four elements of U a lane. Of rows first ... last-1;
    // where there are several adapters, warps take turns at them too.
    const auto add_adapter = [&](int adapter, int first, int last) {
      const std::int64_t before = adapter * args.elements_of_right();
      const int warp = kGroups ? (lane.warp + adapter) % kGemvWarps : lane.warp;
#pragma unroll 1
      for (std::int64_t r0 = warp * kMmaInner; r0 < rank; r0 += kGemvWarps * kMmaInner) {
        const std::int64_t r = r0 + lane.t * kFour;
        float b[2][kFour];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
          for (int j = 0; j < kFour; ++j) {
            b[row][j] = 0.0f;
            if (n[row] < w.N && r + j < rank) {
              b[row][j] = rounded<T>(args.right_factor *
                                     load_as_f32(args.right, args.right_dtype, before + n[row] * rank + r + j));
            }
          }
        }
        const T* const u = part.low_rank() + r;
        Rows::add(sums, Rows::load_four(u, args.low_rank.stride, first, last, left_of(rank, r), lane), b);
      }
    };
    if constexpr (!kGroups) {
      add_adapter(0, 0, part.rows());
    } else {
      TileAdapters<kGemvRows> adapters(args, part.tile());
#pragma unroll 1
      while (adapters.next()) {
        const RowSpan span = adapters.rows();
        const std::int64_t first = span.begin - part.tile().begin, last = span.end - part.tile().begin;
        add_adapter(adapters.adapter(), first < 0 ? 0 : static_cast<int>(first),
                    last < part.rows() ? static_cast<int>(last) : part.rows());
      }
    }

    Rows::leave(sums, shared.sums[lane.warp], lane);
    sync_threads();
    const int m = thread_index() / kGemvCols, col = thread_index() % kGemvCols;
    if (m < part.rows() && n0 + col < w.N) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kGemvWarps; ++warp) sum += shared.sums[warp][m][col];
      if (args.bias != nullptr) sum += to_f32(static_cast<const T*>(args.bias)[part.biases_before() + n0 + col]);
      part.out()[m * args.out.stride + n0 + col] = from_f32<T>(sum);
    }
    sync_threads();  // before the sums are written again
    if constexpr (kGroups) {
      if (n0 + part.apart() >= part.end() && part.go_on()) {
        if constexpr (kEarly) fetch_first(part.begin());
        n0 = part.begin() - part.apart();
      }
    }
  }
}

}  // namespace

void multiply(const Product& product, const GemvConfig& config, const Stream& stream) {
  const QuantizedWeightView& w = product.weight;
  const GemvArgs args{product, scales_of(w), last_chunk_of(w)};
  const auto start = [&]<class T, int kRows, int kBits, bool kAligned>() {
    const LaunchShape shape = {config.blocks, kGemvThreads, sizeof(GemvShared<kAligned>)};
    if constexpr (kRows == kGemvRows && kAligned) {
      if (args.groups.count > 0) return launch<gemv_kernel<T, kRows, kBits, kAligned, true>>(shape, stream, args);
    }
    launch<gemv_kernel<T, kRows, kBits, kAligned, false>>(shape, stream, args);
  };
  const auto with_weight = [&]<class T, int kRows>() {
    if (w.bits == 4) {
      if (config.aligned) return start.template operator()<T, kRows, 4, true>();
      return start.template operator()<T, kRows, 4, false>();
    }
    if (config.aligned) return start.template operator()<T, kRows, 8, true>();
    return start.template operator()<T, kRows, 8, false>();
  };
  with_type(args.left.dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, float>) {
      if (args.left.rows == 1 && args.groups.count == 0) return with_weight.template operator()<T, 1>();
    }
    with_weight.template operator()<T, kGemvRows>();
  });
}

}  // namespace qlora_native::QLN_CUDA
