// Guards what each emulated instruction computes, by its definition in the PTX ISA: expectations are written from the
// definition alone, because kernels that share a misreading with the emulator would give the right results in it.
// test_emulator_hopper.cpp has wgmma, and test_emulator_cluster.cpp what blocks of a cluster do to each other.
#include <algorithm>
#include <cstdint>

#include "death_message.h"
#include "device/hopper.cuh"
#include "emulator.h"
#include "expect.h"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

using Word = std::uint32_t;

// ---- lanes of a warp ----

// "shfl.sync": with .idx a lane receives the value of the lane that it names, with .bfly that of lane ^ mask.
__global__ void shuffle_kernel(int* from_named, int* from_xor, Word* max) {
  const int t = thread_index(), lane = t % kWarp;
  from_named[t] = shfl(t, (5 * lane + 3) % kWarp);
  from_xor[t] = shfl_xor(t, 20);
  max[t] = max_of_warp(static_cast<Word>(t / kWarp * 100 + (lane ^ 7)));
}

TEST(lanes_receive_values_of_other_lanes) {
  under_each_schedule([] {
    constexpr int kThreads = 2 * kWarp;
    Managed<int> from_named(kThreads), from_xor(kThreads);
    Managed<Word> max(kThreads);
    launch<shuffle_kernel>({1, kThreads}, {}, from_named.data(), from_xor.data(), max.data());
    for (int t = 0; t < kThreads; ++t) {
      const int lane = t % kWarp, first = t - lane;
      EXPECT(from_named[t] == first + (5 * lane + 3) % kWarp && from_xor[t] == first + (lane ^ 20));
      EXPECT(max[t] == static_cast<Word>(t / kWarp * 100 + 31));
    }
  });
}

// ---- numbers in registers ----

__global__ void load_pair_kernel(std::uint64_t* out) {
  auto* const pair = dynamic_smem<Vector<float, 2>>();
  *pair = {{1.0f, -2.0f}};
  *out = load_shared<std::uint64_t>(SharedAddress(pair));
}

TEST(first_of_a_pair_is_in_the_low_half) {
  EXPECT(pack_pair<Bf16>(1.0f, -2.0f) == 0xC0003F80);
  EXPECT(pack_pair<F16>(1.0f, -2.0f) == 0xC0003C00);
  Managed<std::uint64_t> loaded(1);
  launch<load_pair_kernel>({1, kWarp, sizeof(Vector<float, 2>)}, {}, loaded.data());
  EXPECT(loaded[0] == 0xC00000003F800000);
}

// "prmt": digit i of the third operand names the byte, of the eight of both words, that becomes byte i.
TEST(bytes_are_counted_from_the_lowest) {
  for (Word i = 0; i < 4; ++i) EXPECT(byte_of(0x33221100, i) == 0x11 * i);
  EXPECT(pick_bytes(0x33221100, 0x77665544, 0x0527) == 0x00552277);
}

// ---- tensor cores ----

// "ldmatrix": lanes 8i ... 8i + 7 have the addresses of the rows of matrix i. With g = lane / 4 and t = lane % 4,
// register i of a lane receives columns 2t and 2t + 1 of row g, the first in the low half; with .trans they are those
// of the transposed matrix. The rows lie in reversed order here.
__global__ void ldmatrix_kernel(const std::uint16_t* matrices, Word* plain, Word* transposed) {
  const int lane = thread_index();
  auto* const row = dynamic_smem<std::uint16_t>() + (kWarp - 1 - lane) * 8;
  std::copy_n(matrices + (kWarp - 1 - lane) * 8, 8, row);
  sync_threads();
  Word r[4], of_transposed[4];
  ldmatrix_x4(r, row);
  ldmatrix_x4_transposed(of_transposed, row);
  std::copy_n(r, 4, plain + 4 * lane);
  std::copy_n(of_transposed, 4, transposed + 4 * lane);
}

TEST(ldmatrix_gives_each_lane_two_elements_of_each_matrix) {
  Managed<Vector<std::uint16_t, 8>> rows(kWarp);
  for (int i = 0; i < 256; ++i) rows[i / 8].at[i % 8] = static_cast<std::uint16_t>(1000 + i);
  Managed<Word> plain(4 * kWarp), transposed(4 * kWarp);
  launch<ldmatrix_kernel>({1, kWarp, kWarp * sizeof(rows[0])}, {}, &rows[0].at[0], plain.data(), transposed.data());
  const auto element = [&](int matrix, int row, int col) -> Word { return rows[31 - 8 * matrix - row].at[col]; };
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4, t = lane % 4;
      EXPECT(plain[4 * lane + i] == (element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16));
      EXPECT(transposed[4 * lane + i] == (element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16));
    }
}

// "mma.m16n8k16", matrix fragments: with g = lane / 4 and t = lane % 4, element i of a lane is
//   a: row g, and g + 8 for i in {2, 3, 6, 7};  column 2t + i % 2, and 8 more for i >= 4
//   b: row 2t + i % 2, and 8 more for i >= 2;   column g
//   c: row g, and g + 8 for i >= 2;             column 2t + i % 2
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  const int lane = thread_index(), g = lane / 4, t = lane % 4;
  T a_elements[8], b_elements[4];
  for (int i = 0; i < 8; ++i) a_elements[i] = a[(g + i / 2 % 2 * 8) * 16 + 2 * t + i % 2 + i / 4 * 8];
  for (int i = 0; i < 4; ++i) b_elements[i] = b[(2 * t + i % 2 + i / 2 * 8) * 8 + g];
  Word a_words[4], b_words[2];
  for (int i = 0; i < 4; ++i) a_words[i] = a_elements[2 * i].bits | Word{a_elements[2 * i + 1].bits} << 16;
  for (int i = 0; i < 2; ++i) b_words[i] = b_elements[2 * i].bits | Word{b_elements[2 * i + 1].bits} << 16;
  const auto place = [&](int i) { return (g + i / 2 * 8) * 8 + 2 * t + i % 2; };
  float c_words[4];
  for (int i = 0; i < 4; ++i) c_words[i] = c[place(i)];
  mma_16x8x16<T>(c_words, a_words, b_words);
  for (int i = 0; i < 4; ++i) c[place(i)] = c_words[i];
}

template <class T>
void expect_mma_to_add_the_product() {
  Managed<T> a(16 * 16), b(16 * 8);
  Managed<float> c(16 * 8), expected(16 * 8);
  for (int i = 0; i < 256; ++i) a[i] = from_f32<T>(static_cast<float>(i * 7 % 31 - 15));
  for (int i = 0; i < 128; ++i) b[i] = from_f32<T>(static_cast<float>(i * 5 % 29 - 14));
  for (int i = 0; i < 128; ++i) c[i] = expected[i] = static_cast<float>(i * 3 % 23);
  for (int i = 0; i < 128; ++i)  // the numbers are whole, so the sum is exact in any order
    for (int k = 0; k < 16; ++k) expected[i] += to_f32(a[i / 8 * 16 + k]) * to_f32(b[k * 8 + i % 8]);
  launch<mma_kernel<T>>({1, kWarp}, {}, a.data(), b.data(), c.data());
  EXPECT(c == expected);
}
TEST(mma_adds_the_product) {
  expect_mma_to_add_the_product<Bf16>();
  expect_mma_to_add_the_product<F16>();
}

// ---- shared memory ----

// "cp.async": bytes of cp-size beyond src-size are zeros.
template <int kBytes>
__global__ void partial_copy_kernel(const std::uint8_t* in, std::uint8_t* out, int valid) {
  cp_async<kBytes>(dynamic_smem<std::uint8_t>(), in, valid);
  cp_async_commit();
  cp_async_wait<0>();
  std::copy_n(dynamic_smem<std::uint8_t>(), kBytes, out);
}

// The first four words of `in` go before the second four, which count as missing.
__global__ void copies_or_zeros_kernel(const Word* in, Word* out) {
  const SharedAddress second = SharedAddress(dynamic_smem<Word>()).at(48);
  cp_async_or_zeros(second.xor_swizzled(16), in, 4);
  cp_async_or_zeros(second, in + 4, 0);
  cp_async_commit();
  cp_async_wait<0>();
  std::copy_n(dynamic_smem<Word>() + 8, 8, out);
}

template <int kBytes>
void expect_zeros_after_the_valid_bytes() {
  const Managed<Vector<Word, 4>> in = {{{0x04030201, 0x08070605, 0x0C0B0A09, 0x100F0E0D}}};
  for (int valid = 0; valid <= kBytes; valid += 2) {
    Managed<std::uint8_t> out(kBytes);
    launch<partial_copy_kernel<kBytes>>({1, kWarp, 16}, {}, reinterpret_cast<const std::uint8_t*>(in.data()),
                                        out.data(), valid);
    for (int i = 0; i < kBytes; ++i) EXPECT(out[i] == (i < valid ? i + 1 : 0));
  }
}
TEST(cp_async_fills_with_zeros) {
  expect_zeros_after_the_valid_bytes<4>();
  expect_zeros_after_the_valid_bytes<8>();
  expect_zeros_after_the_valid_bytes<16>();
  const Managed<Word> in = {1, 2, 3, 4, 5, 6, 7, 8};
  Managed<Word> out(8);
  launch<copies_or_zeros_kernel>({1, kWarp, 80}, {}, in.data(), out.data());
  EXPECT(out == (Managed<Word>{1, 2, 3, 4, 0, 0, 0, 0}));
}

// Fills a table of 256 rows of 256 bytes, which begins at kRowsBegin. Lane i reads its word of the row that byte i % 4
// of `word` names.
__global__ void rows_kernel(Word word, Word* out) {
  auto* const table = dynamic_smem_for_rows<Word>();
  const int lane = thread_index();
  for (int row = 0; row < 256; ++row) table[row * kRowBytes / 4 + lane] = row * kWarp + lane;
  sync_warp();
  out[block_index() * kWarp + lane] = load_shared<Word>(SharedAddress(table + lane).row_of_byte(word, lane % 4));
}

TEST(rows_of_a_table_have_the_addresses_that_are_read) {
  constexpr int kBlocks = 2;  // their shared memory begins at different addresses
  Managed<Word> out(kBlocks * kWarp);
  launch<rows_kernel>({kBlocks, kWarp, kRowsBegin + 256 * kRowBytes}, {}, 0xFF800A00u, out.data());
  const int rows[] = {0x00, 0x0A, 0x80, 0xFF};
  for (int i = 0; i < kBlocks * kWarp; ++i) EXPECT(out[i] == static_cast<Word>(rows[i % 4] * kWarp + i % kWarp));
}

// ---- global memory ----

// A thread sees its own store at once, the warp sees it after sync_warp(), and the block after a barrier.
__global__ void store_kernel(Word* memory, Word* seen) {
  const int t = thread_index(), n = block_threads();
  const auto store = [&](Word value) { store_vector<Word, 1>(memory + t, {{value}}); };
  const auto load = [&](int i) { return load_vector<Word, 1>(memory + i).at[0]; };
  store(static_cast<Word>(t));
  seen[t] = load(t);
  sync_threads();
  seen[n + t] = load((t + 1) % n);
  sync_threads();
  store(static_cast<Word>(100 + t));
  sync_warp();
  seen[2 * n + t] = load(t ^ 1);
}

TEST(block_sees_its_own_stores) {
  constexpr Word kThreads = 64;
  under_each_schedule([] {
    Managed<Word> memory(kThreads), seen(3 * kThreads);
    launch<store_kernel>({1, kThreads}, {}, memory.data(), seen.data());
    for (Word t = 0; t < kThreads; ++t) {
      EXPECT(seen[t] == t && seen[kThreads + t] == (t + 1) % kThreads && seen[2 * kThreads + t] == 100 + (t ^ 1));
      EXPECT(memory[t] == 100 + t);
    }
  });
}

// ---- barriers in shared memory ----

// "mbarrier": a phase completes when no arrivals and no bytes are pending. "mbarrier.test_wait" with a parity waits for
// the phase of this parity, the current one or the one before, which is complete.
__global__ void arrivals_kernel(int arrivals, int waits, Word parity) {
  auto* const barrier = dynamic_smem<std::uint64_t>();
  if (thread_index() == 0) mbarrier_init(barrier, 2);
  sync_threads();
  if (thread_index() > 0 && thread_index() < arrivals) mbarrier_arrive(barrier);
  if (thread_index() != 0) return;
  mbarrier_arrive_expect(barrier, 16);  // these bytes never arrive
  for (int i = 0; i < waits; ++i) mbarrier_wait(barrier, parity);
}

TEST(mbarrier_counts_arrivals_and_waits) {
  const auto message = [](int arrivals, int waits, Word parity = 1) {
    return death_message([&] { launch<arrivals_kernel>({1, kWarp, 64}, {}, arrivals, waits, parity); });
  };
  EXPECT(message(2, 1).empty());
  EXPECT(contains(message(2, 1, 0), "waits for an mbarrier at"));
  EXPECT(contains(message(3, 0), "more arrivals in a phase"));
  EXPECT(contains(message(1, 2), "a stale parity"));
}

// ---- tiles ----

// Loads the tile of a matrix that begins in row 2, column 32.
__global__ void tile_kernel(const __grid_constant__ TensorMap map, std::uint8_t* out, int bytes) {
  // A swizzle is a function of the address, and repeats with kSwizzledAlignment.
  auto* const smem = dynamic_smem<std::uint8_t>();
  auto* const tile = smem + (kSwizzledAlignment - shared_address(smem) % kSwizzledAlignment) % kSwizzledAlignment;
  auto* const barrier = reinterpret_cast<std::uint64_t*>(tile + bytes);
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(barrier, static_cast<Word>(bytes));  // bytes beyond the matrix count, too
    tma_load_tile(tile, map, 2, 32, barrier);
  }
  sync_threads();
  mbarrier_wait(barrier, 0);
  for (int i = thread_index(); i < bytes; i += kWarp) out[i] = tile[i];
}

// "Tensors": elements beyond the matrix are zeros. A swizzle of 128 bytes changes bits 4 ... 6 of an address by an XOR
// with bits 7 ... 9, one of 64 bytes bits 4 and 5 by an XOR with bits 7 and 8.
TEST(tile_beyond_its_matrix_is_zeros_and_its_vectors_are_swizzled) {
  constexpr int kBoxRows = 16, kRows = 15;
  const auto expect = [&](Swizzle swizzle, int box_cols, int swizzled_bits) {
    const int cols = box_cols + 16, bytes = kBoxRows * box_cols;
    Managed<std::uint8_t> matrix(kRows * cols), out(bytes);
    for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<std::uint8_t>(i % 251 + 1);
    const TileSource source = {.name = "codes",
                               .data = matrix.data(),
                               .element_bytes = 1,
                               .rows = kRows,
                               .cols = cols,
                               .stride_bytes = cols,
                               .box_rows = kBoxRows,
                               .box_cols = box_cols,
                               .swizzle = swizzle};
    launch<tile_kernel>({1, kWarp, static_cast<std::size_t>(bytes + 8 + kSwizzledAlignment)}, {}, TensorMap(source),
                        out.data(), bytes);
    for (int i = 0; i < bytes; ++i) {
      const int row = 2 + i / box_cols, col = 32 + i % box_cols;
      const int expected = row < kRows && col < cols ? matrix[row * cols + col] : 0;
      EXPECT(out[i ^ (i >> 7 & swizzled_bits) << 4] == expected);
    }
  };
  expect(Swizzle::none, 64, 0);
  expect(Swizzle::bytes_64, 64, 3);
  expect(Swizzle::bytes_128, 128, 7);
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() { return run_tests(); }
