// Guards the layout of shared memory in the tensor-core GEMM, for each of its tiles: the threads load and decode every
// element of a step once, ldmatrix gives each lane the operand of its mma, and no eight lanes use the same bank.
#include <algorithm>
#include <map>
#include <vector>

#include "expect.h"
#include "product/gemm/operands.cuh"
#include "product/gemm/small_m.cuh"

namespace qlora_native::cuda_emulated {
namespace {

constexpr unsigned kThreads = kGemmThreads;

// A place in shared memory outside of any block: only its distance from `base` matters.
alignas(256) std::byte base[1];
SharedAddress place_at(unsigned bytes) { return SharedAddress(base).at(bytes); }
unsigned offset_of(const SharedAddress& place) { return static_cast<unsigned>(place.address - base); }

// Whether some of N vectors of 128 / N bytes each, which a warp loads at once, use the same banks. If none do, they use
// all of the 32 banks.
template <unsigned N>
bool meet(const unsigned (&offsets)[N]) {
  std::uint64_t banks = 0;
  for (const unsigned offset : offsets) banks |= std::uint64_t{1} << offset / (128 / N) % N;
  return banks != (std::uint64_t{1} << N) - 1;
}

struct Element {
  unsigned inner, i;  // its index along the inner dimension, and its row or column in the result
  bool operator==(const Element&) const = default;
};

// The contents of shared memory: the element at each offset.
using Memory = std::map<unsigned, Element>;
void put(Memory& memory, unsigned offset, const Element& element) { EXPECT(memory.emplace(offset, element).second); }

// The j-th of the two elements that ldmatrix loads into register r of a lane, from the four matrices that the lanes'
// addresses point at.
template <bool kTransposed>
Element loaded(const Memory& memory, const unsigned (&rows)[kWarp], unsigned lane, unsigned r, unsigned j) {
  const unsigned g = lane / 4, pair = 2 * (lane % 4) + j;
  const auto found = memory.find(rows[8 * r + (kTransposed ? pair : g)] + 2 * (kTransposed ? g : pair));
  return found == memory.end() ? Element{~0u, ~0u} : found->second;
}

bool rows_meet(const unsigned (&rows)[kWarp]) {
  bool result = false;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    unsigned eight[8];
    std::copy_n(rows + 8 * matrix, 8, eight);
    result |= meet(eight);
  }
  return result;
}

// Expects that ldmatrix, with the lanes' addresses `place(lane)`, loads `expected(lane, r, j)`, by no bank twice at
// once.
template <bool kTransposed, class Place, class Expected>
void expect_operands(const Memory& memory, const Place& place, const Expected& expected) {
  unsigned rows[kWarp];
  for (unsigned lane = 0; lane < kWarp; ++lane) rows[lane] = offset_of(place(lane));
  EXPECT(!rows_meet(rows));
  for (unsigned lane = 0; lane < kWarp; ++lane)
    for (unsigned r = 0; r < 4; ++r)
      for (unsigned j = 0; j < 2; ++j) {
        EXPECT(loaded<kTransposed>(memory, rows, lane, r, j) == expected(lane, r, j));
      }
}

template <class Tile>
void each_lane_gets_its_part_of_x() {
  using X = XStage<Bf16, Tile>;
  Memory memory;
  for (unsigned place = 0; place < Tile::kRows * X::kVectors; ++place) {
    const unsigned row = place / X::kVectors, vector = X::vector_at(place);
    EXPECT(X::place(row, vector) == place);
    for (unsigned j = 0; j < 8; ++j) put(memory, place * kVectorBytes + 2 * j, {8 * vector + j, row});
  }
  for (unsigned warp = 0; warp < kGemmWarps; ++warp)
    for (unsigned k = 0; k < kGemmStep / kMmaInner; ++k)
      for (unsigned i = 0; i < Tile::kRowFragments; ++i) {
        expect_operands<false>(
            memory,
            [&](unsigned lane) { return X::operand(place_at(X::first_operand(Lane(warp * kWarp + lane))), k, i); },
            [&](unsigned lane, unsigned r, unsigned j) {  // a[r] is r % 2 * 8 rows and r / 2 * 8 inner elements on
              const Lane owner(warp * kWarp + lane);
              return Element{kMmaInner * k + r / 2 * 8 + 2 * owner.t + j,
                             owner.template row<Tile>() + kMmaRows * i + r % 2 * 8};
            });
      }
}

template <class Tile, class Weights>
void weight_is_decoded_to_where_it_is_read() {
  constexpr bool kTransposed = !Weights::kForward;
  Memory memory;
  for (unsigned thread = 0; thread < kThreads; ++thread)
    for (unsigned v = 0; v < Tile::kThreadChunks * kChunkVectors; ++v) {
      const unsigned offset = offset_of(place_at(Weights::first_place(thread)).xor_swizzled(v * kVectorBytes));
      EXPECT(offset % kLineBytes + kVectorBytes <= kLineVectors * kVectorBytes);  // not in the table's part of a line
      EXPECT(offset < Tile::kCols * kLineBytes);
      for (unsigned j = 0; j < 8; ++j) {
        const unsigned byte = Weights::byte_of_chunk(v % kChunkVectors, j / 2);
        const unsigned along = v / kChunkVectors * kChunk + 2 * byte + j % 2;  // counted from the thread's first code
        const unsigned inner = Weights::inner_of(thread), col = Weights::col_of(thread);
        put(memory, offset + 2 * j, Weights::kForward ? Element{inner + along, col} : Element{inner, col + along});
      }
    }
  EXPECT(memory.size() == std::size_t{kGemmStep} * Tile::kCols);  // no place was written twice, so all were written
  for (unsigned first = 0; first < kThreads; first += 8) {
    unsigned eight[8];
    for (unsigned i = 0; i < 8; ++i) eight[i] = Weights::first_place(first + i);
    EXPECT(!meet(eight));  // nor do they if all offsets are xor-swizzled alike
  }

  for (unsigned warp = 0; warp < kGemmWarps; ++warp)
    for (unsigned k = 0; k < kGemmStep / kMmaInner; ++k)
      for (unsigned p = 0; p < Tile::kColFragments / 2; ++p) {
        expect_operands<kTransposed>(
            memory,
            [&](unsigned lane) {
              return Weights::operands(place_at(Weights::first_operand(Lane(warp * kWarp + lane))), k, p);
            },
            [&](unsigned lane, unsigned r, unsigned j) {  // b of two fragments; b[r] is r % 2 * 8 inner elements on
              // Column g of the mma belongs to the lanes with t = g / 2. Such a lane owns adjacent columns of the
              // tile, two of them in each fragment.
              const Lane owner(warp * kWarp + lane);
              const unsigned fragment = 2 * p + r / 2, t = owner.g / 2;
              const unsigned col = Lane(warp * kWarp + t).template col<Tile>() +
                                   fragment / Tile::kGroupFragments * Tile::kGroupCols +
                                   fragment % Tile::kGroupFragments * 2 + owner.g % 2;
              return Element{kMmaInner * k + r % 2 * 8 + 2 * owner.t + j, col};
            });
      }
}

bool all_once(const std::vector<int>& counts) {
  return std::all_of(counts.begin(), counts.end(), [](int count) { return count == 1; });
}

template <class Tile>
void each_element_of_the_tile_has_one_lane() {
  std::vector<int> owners(Tile::kRows * Tile::kCols);
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    const Lane lane(thread);
    for (unsigned i = 0; i < 2 * Tile::kRowFragments; ++i)
      for (unsigned group = 0; group < Tile::kFragmentGroups; ++group)
        for (unsigned j = 0; j < Tile::kLaneCols; ++j) {
          const unsigned row = lane.template row<Tile>() + 8 * i;
          ++owners[row * Tile::kCols + lane.template col<Tile>() + group * Tile::kGroupCols + j];
        }
  }
  EXPECT(all_once(owners));
}

template <int kRows, int kCols>
void check() {
  using Tile = GemmTile<kRows, kCols, true>;
  each_lane_gets_its_part_of_x<Tile>();
  weight_is_decoded_to_where_it_is_read<Tile, DecodedRows<Tile>>();
  weight_is_decoded_to_where_it_is_read<Tile, DecodedColumns<Tile>>();
  each_element_of_the_tile_has_one_lane<Tile>();
}

template <int kRows>
void check_small_m() {
  using Tile = SmallMTile<kRows>;
  using X = XStage<Bf16, Tile>;
  using Codes = SmallMCodes<Tile>;
  constexpr unsigned kPlaces = kGemmThreads * Codes::kThreadChunks;
  for (unsigned place = 0; place < kPlaces; ++place) {
    EXPECT(Codes::place(Codes::col_at(place), Codes::chunk_at(place)) == place);
  }
  // The second chunk of a thread has the same place in a later row.
  for (unsigned place = kGemmThreads; place < kPlaces; ++place) {
    const unsigned before = place - kGemmThreads;
    EXPECT(Codes::chunk_at(place) == Codes::chunk_at(before));
    EXPECT(Codes::col_at(place) == Codes::col_at(before) + Tile::kCols / Codes::kThreadChunks);
  }
  for (unsigned place = 0; place < kRows * X::kVectors; ++place) {
    EXPECT(X::place(place / X::kVectors, X::vector_at(place)) == place);
  }
  std::vector<int> codes(Tile::kCols * Tile::kStep / 8), accumulators(kRows * Tile::kCols);
  for (unsigned warp = 0; warp < kGemmWarps; ++warp) {
    for (unsigned c = 0; c < Tile::kHalf / kChunk; ++c) {
      for (unsigned i = 0; i < Tile::kColFragments; ++i)
        for (unsigned row = 0; row < 2; ++row) {
          unsigned words[kWarp];
          for (unsigned thread = 0; thread < kWarp; ++thread) {
            const SmallMLane<Tile> lane(warp * kWarp + thread);
            const unsigned chunk = lane.half() * (Tile::kHalf / kChunk) + c;
            words[thread] = Codes::place(lane.col(i) + row, chunk) * kVectorBytes + lane.t * 4;
            ++codes[words[thread] / 4];
          }
          EXPECT(!meet(words));
        }
      for (unsigned first = 0; first < kWarp; first += 8) {  // the lanes of a quarter of a warp load at once
        unsigned vectors[8];
        for (unsigned k = 0; k < 8; ++k) {
          const SmallMLane<Tile> lane(warp * kWarp + first + k);
          const unsigned vector = lane.half() * (Tile::kHalf / X::kVector) + c * (kChunk / X::kVector) + lane.t;
          vectors[k] = X::place(lane.loaded_row(), vector) * kVectorBytes;
        }
        EXPECT(!meet(vectors));
      }
    }
    for (unsigned thread = 0; thread < kWarp; ++thread) {
      const SmallMLane<Tile> lane(warp * kWarp + thread);
      for (unsigned part = 0; part < 4; ++part) {
        for (unsigned f = 0; f < Tile::kRowFragments; ++f) {
          const unsigned row = f * kMmaCols + lane.row(part % 2), col = lane.col(lane.half()) + part / 2;
          ++accumulators[row * Tile::kCols + col];
        }
        // Column 2t + j of the mma is the row that the lanes with g = 2t + j have loaded.
        const SmallMLane<Tile> owner(warp * kWarp + 4 * (2 * lane.t + part % 2));
        EXPECT(owner.loaded_row() == lane.row(part % 2));
      }
    }
  }
  EXPECT(all_once(codes) && all_once(accumulators));
}

TEST(operands_of_gemm_are_laid_out_for_ldmatrix) {
  check<16, kTileCols>();
  check<64, kTileCols>();
  check<128, kTileCols>();
  check<128, 256>();
  check<256, kTileCols>();
}
TEST(operands_of_small_m_are_laid_out_for_their_lanes) {
  check_small_m<16>();
  check_small_m<32>();
  check_small_m<64>();
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() { return run_tests(); }
