// Guards the emulator of compute capability 9.0 (cuda/device/hopper.cuh): barriers, copies of tiles and products of a
// warpgroup follow PTX under each order of threads, and planted mistakes are found. A kernel that must end the process
// runs in a child, whose message is read.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "death_message.h"
#include "device/hopper.cuh"
#include "emulator.h"
#include "expect.h"
#include "qlora_native/error.h"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

// The kernel computes out[64, kCols] = a[64, kSteps * 64] . b[kCols, kSteps * 64]^T. One warp loads b into a ring of
// two stages; a is loaded to registers. These mistakes can be planted in it:
enum class Mistake {
  none,
  no_wait_for_b,
  wrong_parity_of_b,
  one_arrival_too_few,
  one_arrival_too_many,
  one_byte_too_few,
  stage_reused_too_soon,
  barrier_not_published,
  threads_do_not_meet,
  no_fence_of_registers,
  register_changed_in_flight,
  accumulators_read_before_the_wait,
  accumulators_changed_in_flight,
  no_wait_for_accumulators,
  wrong_stride_of_the_descriptor,
  wrong_step_along_the_descriptor,
  wrong_place_of_b,
};
constexpr int kCols = 64, kSteps = 5, kStep = 64, kStages = 2, kInner = kSteps * kStep;
constexpr int kStageBytes = kCols * kSwizzledRowBytes;

struct RingShared {
  std::byte b[kStages][kStageBytes];
  std::uint64_t full[kStages], empty[kStages];
};

template <Mistake kMistake, class T>
__global__ void ring_kernel(const __grid_constant__ TensorMap b, const T* a, float* out) {
  std::byte* const smem = dynamic_smem<std::byte>();
  // The shared memory of a block may begin 1024 bytes behind a multiple of 64 KB or at one; the ring begins at a
  // multiple of kSwizzledAlignment.
  const std::uint32_t beyond = shared_address(smem) % kSwizzledAlignment;
  auto& shared = *reinterpret_cast<RingShared*>(smem + (beyond == 0 ? 0 : kSwizzledAlignment - beyond));
  const int thread = thread_index(), warp = thread / kWarp;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], 4);
    }
    if constexpr (kMistake != Mistake::barrier_not_published) fence_mbarrier_init();
  }
  if constexpr (kMistake != Mistake::threads_do_not_meet) sync_threads();
  if (thread >= kWarpgroup) {
    decrease_max_registers<24>();
    if (thread > kWarpgroup) return;
    for (int step = 0; step < kSteps; ++step) {
      const int stage = step % kStages;
      if constexpr (kMistake != Mistake::stage_reused_too_soon) {
        mbarrier_wait(&shared.empty[stage], static_cast<std::uint32_t>(step / kStages + 1) & 1);
      }
      mbarrier_arrive_expect(&shared.full[stage], kStageBytes - (kMistake == Mistake::one_byte_too_few ? 1 : 0));
      tma_load_tile(shared.b[stage] + (kMistake == Mistake::wrong_place_of_b ? 64 : 0), b, 0, step * kStep,
                    &shared.full[stage]);
    }
    return;
  }
  increase_max_registers<232>();
  float d[kCols / 2] = {};
  const int lane = thread % kWarp, g = lane / 4, t = lane % 4;
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const auto parity = static_cast<std::uint32_t>(step / kStages) & 1;
    if constexpr (kMistake != Mistake::no_wait_for_b) {
      mbarrier_wait(&shared.full[stage], kMistake == Mistake::wrong_parity_of_b && step > 0 ? parity ^ 1 : parity);
    }
    std::uint32_t fragments[4][4];
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + g + i % 2 * 8, inner = step * kStep + 16 * k + 2 * t + i / 2 * 8;
        fragments[k][i] = a[row * kInner + inner].bits | std::uint32_t{a[row * kInner + inner + 1].bits} << 16;
      }
    if constexpr (kMistake != Mistake::no_fence_of_registers) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      const int step_bytes = kMistake == Mistake::wrong_step_along_the_descriptor ? 16 : 32;
      std::uint64_t descriptor =
          descriptor_of_swizzled_rows(shared_address(shared.b[stage]) + static_cast<std::uint32_t>(step_bytes * k));
      if constexpr (kMistake == Mistake::wrong_stride_of_the_descriptor) descriptor ^= std::uint64_t{96} << 32;
      wgmma<T, kCols>(d, fragments[k], descriptor);
    }
    wgmma_commit();
    if constexpr (kMistake == Mistake::register_changed_in_flight) ++fragments[2][1];
    if constexpr (kMistake == Mistake::accumulators_read_before_the_wait) out[thread] = d[0];
    if constexpr (kMistake == Mistake::accumulators_changed_in_flight) d[3] = 0.0f;
    if constexpr (kMistake == Mistake::no_wait_for_accumulators) {
      if (step == kSteps - 1) return;
    }
    wgmma_wait<0>();
    sync_warp();
    const int arrivals = kMistake == Mistake::one_arrival_too_few    ? warp < 3
                         : kMistake == Mistake::one_arrival_too_many ? (warp < 3 ? 1 : 2)
                                                                     : 1;
    for (int i = 0; lane == 0 && i < arrivals; ++i) mbarrier_arrive(&shared.empty[stage]);
  }
  if constexpr (kMistake == Mistake::accumulators_read_before_the_wait) return;
  for (int i = 0; i < kCols / 2; ++i) out[(16 * warp + g + i / 2 % 2 * 8) * kCols + i / 4 * 8 + 2 * t + i % 2] = d[i];
}

template <class T>
struct Operands {
  Managed<T> a = Managed<T>(kWgmmaRows * kInner), b = Managed<T>(kCols * kInner);
  Operands() {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = from_f32<T>(static_cast<float>(i * 7 % 31) - 15.0f);
    for (std::size_t i = 0; i < b.size(); ++i) b[i] = from_f32<T>(static_cast<float>(i * 5 % 29) - 14.0f);
  }
  TileSource source() const {
    return {.name = "x",
            .data = b.data(),
            .element_bytes = 2,
            .rows = kCols,
            .cols = kInner,
            .stride_bytes = kInner * 2,
            .box_rows = kCols,
            .box_cols = kStep,
            .swizzle = Swizzle::bytes_128};
  }
};

template <Mistake kMistake, class T = Bf16>
Managed<float> ring(const std::function<void(TileSource&)>& change = [](TileSource&) {}) {
  const Operands<T> operands;
  TileSource source = operands.source();
  change(source);
  Managed<float> out(kWgmmaRows * kCols);
  launch<ring_kernel<kMistake, T>>({1, kWarpgroup + kWarp, sizeof(RingShared) + kSwizzledAlignment}, {},
                                   TensorMap(source), operands.a.data(), out.data());
  for (float& value : out) value = std::isnan(value) ? -1.0e30f : value;  // so that results can be compared
  return out;
}

template <class T>
Managed<float> expected_ring() {
  const Operands<T> operands;
  Managed<float> out(kWgmmaRows * kCols);
  for (int i = 0; i < kWgmmaRows * kCols * kInner; ++i) {  // the numbers are whole, so the sum is exact in any order
    const int m = i / kInner / kCols, n = i / kInner % kCols, k = i % kInner;
    out[m * kCols + n] += to_f32(operands.a[m * kInner + k]) * to_f32(operands.b[n * kInner + k]);
  }
  return out;
}

template <class T>
void expect_product_under_each_schedule() {
  under_each_schedule([] { EXPECT((ring<Mistake::none, T>() == expected_ring<T>())); });
}
TEST(warpgroup_gives_the_product_under_each_schedule) {
  expect_product_under_each_schedule<Bf16>();
  expect_product_under_each_schedule<F16>();
}

// The message of the process under the first schedule that ends it, or "wrong" if a result is wrong.
template <Mistake kMistake>
std::string found(const std::function<void(TileSource&)>& change = [](TileSource&) {}) {
  const Managed<float> expected = expected_ring<Bf16>();
  std::string result;
  under_each_schedule([&] {
    if (!result.empty()) return;
    result = death_message([&] {
      if (ring<kMistake>(change) == expected) return;
      std::fprintf(stderr, "wrong");
      _exit(1);
    });
  });
  return result;
}

TEST(mistakes_are_found) {
  using M = Mistake;
  EXPECT(contains(found<M::no_wait_for_b>(), "more arrivals in a phase"));
  EXPECT(contains(found<M::wrong_parity_of_b>(), "a stale parity"));
  EXPECT(contains(found<M::one_arrival_too_few>(), "waits for an mbarrier at"));
  EXPECT(contains(found<M::one_arrival_too_many>(), "arrives twice in a phase"));
  EXPECT(contains(found<M::one_byte_too_few>(), "waits for an mbarrier at"));
  EXPECT(contains(found<M::stage_reused_too_soon>(), "more arrivals in a phase"));
  EXPECT(contains(found<M::barrier_not_published>(), "was not published"));
  EXPECT(contains(found<M::threads_do_not_meet>(), "have not met since another one has initialized it"));
  EXPECT(contains(found<M::no_fence_of_registers>(), "without wgmma_fence()"));
  EXPECT(contains(found<M::register_changed_in_flight>(), "a register of wgmma's a was changed"));
  EXPECT(contains(found<M::accumulators_read_before_the_wait>(), "wrong"));
  EXPECT(contains(found<M::accumulators_changed_in_flight>(), "wgmma's accumulators were changed"));
  EXPECT(contains(found<M::no_wait_for_accumulators>(), "has ended before the wait for its wgmma"));
  EXPECT(contains(found<M::wrong_stride_of_the_descriptor>(), "wrong"));
  EXPECT(contains(found<M::wrong_step_along_the_descriptor>(), "wrong"));
  EXPECT(contains(found<M::wrong_place_of_b>(), "no multiple of 128"));
  EXPECT(contains(found<M::none>([](TileSource& b) { b.swizzle = Swizzle::none; }), "wrong"));
  EXPECT(contains(found<M::none>([](TileSource& b) { b.box_rows = 32; }), "waits for an mbarrier"));
  EXPECT(contains(found<M::none>([](TileSource& b) { b.rows = 60; }), "wrong"));
}

// ---- tiles ----

TEST(map_of_tiles_needs_a_context_in_its_thread) {
  const Operands<Bf16> operands;
  const auto message_of = [&](bool binds) {
    return death_message([&] {
      std::thread([&] {
        if (binds) bind_context({});
        const TensorMap map(operands.source());
      }).join();
    });
  };
  EXPECT(message_of(true).empty());
  EXPECT(contains(message_of(false), "cuTensorMapEncodeTiled in a thread without a context"));
}

TEST(operand_that_a_driver_refuses_is_named) {
  const Operands<Bf16> operands;
  const auto message_of = [&](const std::function<void(TileSource&)>& change) -> std::string {
    TileSource source = operands.source();
    change(source);
    try {
      const TensorMap map(source);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT(message_of([](TileSource&) {}).empty());
  EXPECT(contains(message_of([](TileSource& x) { x.data = static_cast<const std::byte*>(x.data) + 2; }),
                  "x: expected an operand of which TMA can load tiles, got its address is no multiple of 16"));
  EXPECT(contains(message_of([](TileSource& x) { x.stride_bytes = 520; }), "its stride is no multiple of 16 bytes"));
  EXPECT(contains(message_of([](TileSource& x) { x.box_cols = 128; }), "longer than the span of its swizzle"));
  EXPECT(contains(message_of([](TileSource& x) { x.box_rows = 257; }), "1 ... 256"));
  EXPECT(contains(message_of([](TileSource& x) { x.rows = 0; }), "no rows"));
}

__global__ void end_before_the_tile_kernel(const __grid_constant__ TensorMap map) {
  auto* const barrier = reinterpret_cast<std::uint64_t*>(dynamic_smem<std::byte>() + 8192);
  if (thread_index() != 0) return;
  mbarrier_init(barrier, 1);
  fence_mbarrier_init();
  tma_load_tile(dynamic_smem<std::byte>(), map, 0, 0, barrier);
}

TEST(block_that_ends_before_its_tile_is_found) {
  const Operands<Bf16> operands;
  const std::string message =
      death_message([&] { launch<end_before_the_tile_kernel>({1, kWarp, 8200}, {}, TensorMap(operands.source())); });
  EXPECT(contains(message, "a block has ended before a tile that TMA loads was there"));
}

// ---- the asynchronous proxy ----

// The threads of a warpgroup write the 32 rows of b by ordinary stores.
template <bool kFence>
__global__ void stored_kernel(float* out) {
  std::byte* const smem = dynamic_smem<std::byte>();
  const std::uint32_t beyond = shared_address(smem) % kSwizzledAlignment;
  std::byte* const b = smem + (beyond == 0 ? 0 : kSwizzledAlignment - beyond);
  const int thread = thread_index();
  for (int i = thread; i < 32 * 8; i += kWarpgroup) {
    store_shared(SharedAddress(b + i * 16), Vector<std::uint32_t, 4>{{0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80}});
  }
  if constexpr (kFence) fence_proxy_async();
  sync_threads();
  float d[16] = {};
  const std::uint32_t a[4] = {0x40003F80, 0, 0, 0};  // 1 and 2, in the first eight rows of each warp
  wgmma_fence();
  wgmma<Bf16, 32>(d, a, descriptor_of_swizzled_rows(shared_address(b)));
  wgmma_commit();
  wgmma_wait_for(d);
  out[thread] = d[0] + d[2];
}

TEST(stores_reach_wgmma_through_a_fence) {
  constexpr std::size_t kBytes = 2 * 4096;
  under_each_schedule([&] {
    Managed<float> out(kWarpgroup);
    launch<stored_kernel<true>>({1, kWarpgroup, kBytes}, {}, out.data());
    for (const float value : out) EXPECT(value == 4 * 3.0f);
    const std::string message =
        death_message([&] { launch<stored_kernel<false>>({1, kWarpgroup, kBytes}, {}, out.data()); });
    EXPECT(contains(message, "wgmma reads what thread") && contains(message, "not published by fence_proxy_async()"));
  });
}

// ---- registers and barriers of some threads ----

template <int kCount>
__global__ void registers_kernel() {
  increase_max_registers<kCount>();
}
TEST(registers_of_a_block_fit_an_sm) {
  EXPECT(death_message([] { launch<registers_kernel<168>>({1, 3 * kWarpgroup}, {}); }).empty());
  EXPECT(contains(death_message([] { launch<registers_kernel<176>>({1, 3 * kWarpgroup}, {}); }), "67584 registers"));
  EXPECT(contains(death_message([] { launch<registers_kernel<100>>({1, kWarpgroup}, {}); }), "setmaxnreg of 100"));
}

// The first two warps meet; the third takes no part.
template <bool kMeet>
__global__ void some_threads_kernel(int* out) {
  int* const shared = dynamic_smem<int>();
  const int thread = thread_index();
  if (thread >= 2 * kWarp) return;
  shared[thread] = thread;
  if constexpr (kMeet) sync_named_barrier<1>(2 * kWarp);
  out[thread] = shared[2 * kWarp - 1 - thread];
}
TEST(some_threads_meet_without_the_others) {
  bool differs = false;
  under_each_schedule([&] {
    Managed<int> out(2 * kWarp), wrong(2 * kWarp);
    launch<some_threads_kernel<true>>({1, 3 * kWarp, 64 * sizeof(int)}, {}, out.data());
    launch<some_threads_kernel<false>>({1, 3 * kWarp, 64 * sizeof(int)}, {}, wrong.data());
    for (int i = 0; i < 2 * kWarp; ++i) EXPECT(out[i] == 2 * kWarp - 1 - i);
    differs |= wrong != out;
  });
  EXPECT(differs);
}

template <bool kRegisters>
__global__ void part_of_a_warp_kernel() {
  if (thread_index() % kWarp >= kWarp / 2) return;
  if constexpr (kRegisters) {
    increase_max_registers<168>();
  } else {
    sync_named_barrier<1>(kWarp);
  }
}
TEST(lanes_of_a_warp_that_miss_an_aligned_instruction_are_caught) {
  const std::string barrier = death_message([] { launch<part_of_a_warp_kernel<false>>({1, 2 * kWarp}, {}); });
  EXPECT(contains(barrier, "deadlock") && contains(barrier, "for its warp"));
  const std::string registers = death_message([] { launch<part_of_a_warp_kernel<true>>({1, 2 * kWarp}, {}); });
  EXPECT(contains(registers, "deadlock") && contains(registers, "for its warp"));
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() {
  qlora_native::cuda_emulated::bind_context({});  // for maps of tiles
  return run_tests();
}
