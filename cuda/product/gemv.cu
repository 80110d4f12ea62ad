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
#include "product/gemv_part.cuh"
#include "product/gemv_rows.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

// As many as lanes that shared memory serves at once: each of them has banks of its own.
using GemvTable = PairTable<16>;

template <bool kAligned>
struct GemvShared {
  GemvTable::Pair pairs[GemvTable::kPairs];
  typename ScaleReader<kAligned>::Nested nested;
  float sums[kGemvWarps][kGemvRows][kGemvCols];
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
