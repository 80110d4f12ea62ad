// Guards the emulator: it computes what a device would, and finds planted mistakes. A kernel that must end the process
// runs in a child process, whose message is read. The test is compiled a second time with AddressSanitizer, which finds
// reads and writes out of bounds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "death_message.h"
#include "device/simt.cuh"
#include "emulator.h"
#include "emulator/call_memory.h"
#include "expect.h"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

template <class Result>
std::vector<Result> results_of_schedules(const std::function<Result()>& run,
                                         const std::vector<std::string>& schedules = kSchedules) {
  std::vector<Result> results;
  under_each_schedule([&] { results.push_back(run()); }, schedules);
  return results;
}

template <class Result>
bool all_equal(const std::vector<Result>& results, const Result& expected) {
  return std::count(results.begin(), results.end(), expected) == static_cast<std::ptrdiff_t>(results.size());
}

std::string here(int line) { return std::string(__FILE__) + ":" + std::to_string(line); }

// ---- barriers ----

// Rounds with one buffer: without the first barrier a thread may read before the others have written, and without the
// second one write for the next round before the others have read.
enum class Barriers { both, first, second };
template <Barriers kBarriers>
__global__ void rounds_kernel(int* out) {
  int* shared = dynamic_smem<int>();
  const int t = thread_index(), n = block_threads();
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    shared[t] = t + round * 1000;
    if constexpr (kBarriers != Barriers::second) sync_threads();
    sum = sum * 3 + shared[(t + 37) % n];
    if constexpr (kBarriers != Barriers::first) sync_threads();
  }
  out[t] = sum;
}

template <Barriers kBarriers>
Managed<int> rounds() {
  Managed<int> out(96);
  launch<rounds_kernel<kBarriers>>({1, 96, 96 * sizeof(int)}, {}, out.data());
  return out;
}

TEST(missing_barrier_is_found_by_the_schedule) {
  Managed<int> expected(96);
  for (int t = 0; t < 96; ++t)
    for (int round = 0; round < 3; ++round) expected[t] = expected[t] * 3 + (t + 37) % 96 + round * 1000;
  EXPECT(all_equal(results_of_schedules<Managed<int>>(rounds<Barriers::both>), expected));
  EXPECT(!all_equal(results_of_schedules<Managed<int>>(rounds<Barriers::first>), expected));
  EXPECT(!all_equal(results_of_schedules<Managed<int>>(rounds<Barriers::second>), expected));
}

__global__ void two_barriers_kernel(int) {
  if (thread_index() < 32) {
    sync_threads();
  } else {
    sync_threads();
  }
}
const int kTwoBarriersLine = __LINE__ - 3;

__global__ void missed_barrier_kernel(int) {
  if (thread_index() != 40) sync_threads();
}
const int kMissedBarrierLine = __LINE__ - 2;

TEST(barriers_that_not_all_reach_end_the_process) {
  const std::string two = death_message([] { launch<two_barriers_kernel>({1, 64}, {}, 0); });
  EXPECT(contains(two, "different barriers: " + here(kTwoBarriersLine - 2)) && contains(two, here(kTwoBarriersLine)));
  const std::string missed = death_message([] { launch<missed_barrier_kernel>({1, 64}, {}, 0); });
  EXPECT(contains(missed, "deadlock") && contains(missed, here(kMissedBarrierLine)));
  EXPECT(contains(missed, "thread 40 and on of block 0 has ended"));
}

// ---- warps ----

__global__ void lanes_part_kernel(int* out) {
  if (thread_index() % 2 == 0) {
    out[0] = shfl(1, 0);
  } else {
    out[0] = shfl(2, 0);
  }
}
const int kLanesPartLine = __LINE__ - 3;

TEST(lanes_of_a_warp_that_meet_at_different_calls_are_caught) {
  Managed<int> out(1);
  const std::string words = death_message([&] { launch<lanes_part_kernel>({1, 32}, {}, out.data()); });
  EXPECT(contains(words, "lanes of a warp meet at different calls"));
  EXPECT(contains(words, here(kLanesPartLine - 2)) && contains(words, here(kLanesPartLine)));
}

// ---- asynchronous copies ----

// A sum over in[4][32] through a ring of two buffers; kInFlight groups may still be in flight when a buffer is read.
template <int kInFlight>
__global__ void ring_kernel(const float* in, float* out) {
  float* ring = dynamic_smem<float>();
  const int t = thread_index();
  const auto fetch = [&](int step) {
    if (step < 4) cp_async<4>(ring + step % 2 * 32 + t, in + step * 32 + t);
    cp_async_commit();
  };
  fetch(0);
  float sum = 0.0f;
  for (int step = 0; step < 4; ++step) {
    fetch(step + 1);
    cp_async_wait<kInFlight>();
    sync_threads();
    sum += ring[step % 2 * 32 + (t + 1) % 32];
    sync_threads();
  }
  out[t] = sum;
}

template <int kInFlight>
Managed<float> ring() {
  Managed<float> in(128), out(32);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i * i % 97);
  launch<ring_kernel<kInFlight>>({1, 32, 64 * sizeof(float)}, {}, in.data(), out.data());
  for (float& value : out) value = std::isnan(value) ? -1.0f : value;
  return out;
}

TEST(missing_wait_is_found) {
  Managed<float> expected(32);
  for (int i = 0; i < 128; ++i) expected[(i + 31) % 32] += static_cast<float>(i * i % 97);
  EXPECT(all_equal(results_of_schedules<Managed<float>>(ring<1>), expected));
  for (const auto& result : results_of_schedules<Managed<float>>(ring<2>)) EXPECT(result != expected);
}

__global__ void misaligned_load_kernel() { load_shared<float>(SharedAddress(dynamic_smem<float>()).at(2)); }
__global__ void misaligned_copy_kernel(const float* in) { cp_async<8>(dynamic_smem<float>() + 1, in); }

template <bool kStores>
__global__ void beyond_shared_kernel() {
  const SharedAddress beyond = SharedAddress(dynamic_smem<float>()).at(64);
  if constexpr (kStores) {
    store_shared(beyond, 1.0f);
  } else {
    load_shared<float>(beyond);
  }
}
__global__ void copy_beyond_shared_kernel(const float* in) { cp_async<8>(dynamic_smem<float>() - 2, in); }

TEST(access_beyond_shared_memory_is_caught) {
  const Managed<float> in(4);
  const char* const expected = "an access beyond the shared memory of a block";
  EXPECT(contains(death_message([] { launch<beyond_shared_kernel<false>>({1, kWarp, 64}, {}); }), expected));
  EXPECT(contains(death_message([] { launch<beyond_shared_kernel<true>>({1, kWarp, 64}, {}); }), expected));
  EXPECT(contains(death_message([&] { launch<copy_beyond_shared_kernel>({1, kWarp, 64}, {}, in.data()); }), expected));
}

TEST(misaligned_access_is_caught) {
  const Managed<float> in(4);
  EXPECT(contains(death_message([&] { launch<misaligned_copy_kernel>({1, 32, 16}, {}, in.data()); }), "misaligned"));
  EXPECT(contains(death_message([] { launch<misaligned_load_kernel>({1, kWarp, 64}, {}); }), "a misaligned load"));
}

// ---- between blocks ----

// Blocks add to a running sum in the order of their tickets; or in the order of their indices, which is a mistake,
// because blocks begin in any order.
template <bool kTickets>
__global__ void in_order_kernel(std::uint32_t* ticket, std::uint32_t* next, float* sum) {
  std::uint32_t& order = *dynamic_smem<std::uint32_t>();
  if (thread_index() == 0) {
    order = static_cast<std::uint32_t>(kTickets ? take_ticket(ticket) : block_index());
    wait_for(next, order);
  }
  sync_threads();
  if (thread_index() == 0) {
    *sum = *sum * 0.5f + static_cast<float>(order);
    signal(next, order + 1);
  }
}

// Blocks pass partial sums to another block, as in stream-K: each block but the last stores its partial sums and raises
// a flag, and the last one adds all of them in order. Each Mistake is a planted one.
enum class Mistake {
  none,
  flag_before_stores,      // the flag is raised before the partial sums are stored
  flag_without_release,    // the flag is written by an ordinary store
  flag_without_barrier,    // no barrier between the stores of all threads and the flag
  loads_before_flag,       // the partial sums are read before the wait for the flag
  loads_without_barrier,   // no barrier between the thread that waits and the other threads
  flags_that_stay_raised,  // the flags are not reset between two launches
};
constexpr int kBlocks = 4, kElements = 64 * 4;  // the blocks, and the partial sums of each: four in a thread

template <Mistake kMistake>
__global__ void partial_sums_kernel(const float* in, float* partial_sums, std::uint32_t* flags, float* out) {
  const int t = thread_index();
  const std::int64_t block = block_index();
  if (block < kBlocks - 1) {
    const auto raise = [&] {
      if (t != 0) return;
      if constexpr (kMistake == Mistake::flag_without_release) {
        store_vector<std::uint32_t, 1>(flags + block, {{1}});
      } else {
        signal(flags + block, 1);
      }
    };
    if constexpr (kMistake == Mistake::flag_before_stores) raise();
    for (int i = 4 * t; i < kElements; i += 4 * block_threads()) {
      store_vector<float, 4>(partial_sums + block * kElements + i, load_vector<float, 4>(in + block * kElements + i));
    }
    if constexpr (kMistake != Mistake::flag_without_barrier) sync_threads();
    if constexpr (kMistake != Mistake::flag_before_stores) raise();
    return;
  }
  auto total = load_vector<float, 4>(in + block * kElements + 4 * t);
  for (int other = 0; other < kBlocks - 1; ++other) {
    const auto wait = [&] {
      if (t == 0) wait_for(flags + other, 1);
      if constexpr (kMistake != Mistake::loads_without_barrier) sync_threads();
    };
    if constexpr (kMistake != Mistake::loads_before_flag) wait();
    const auto partial = load_vector<float, 4>(partial_sums + other * kElements + 4 * t);
    if constexpr (kMistake == Mistake::loads_before_flag) wait();
    for (int i = 0; i < 4; ++i) total.at[i] += partial.at[i];
  }
  store_vector<float, 4>(out + 4 * t, total);
}

// Two launches use the same memory; the second has other numbers.
template <Mistake kMistake>
Managed<float> totals() {
  Managed<float> in(kBlocks * kElements), partial_sums(kBlocks * kElements);
  Managed<std::uint32_t> flags(kBlocks);
  Managed<float> results;
  fill_bytes(partial_sums.data(), 0xFF, partial_sums.size() * sizeof(float), {});
  for (int round = 0; round < 2; ++round) {
    Managed<float> out(kElements);
    for (int i = 0; i < kBlocks * kElements; ++i) in[i] = static_cast<float>(i % 101 + 1000 * round);
    if (round == 0 || kMistake != Mistake::flags_that_stay_raised)
      fill_bytes(flags.data(), 0, flags.size() * sizeof(flags[0]), {});
    launch<partial_sums_kernel<kMistake>>({kBlocks, 64}, {}, in.data(), partial_sums.data(), flags.data(), out.data());
    results.insert(results.end(), out.begin(), out.end());
  }
  for (float& value : results) value = std::isnan(value) ? -1.0f : value;
  return results;
}

Managed<float> expected_totals() {
  Managed<float> expected(2 * kElements);
  for (int i = 0; i < 2 * kElements; ++i) {
    const int round = i / kElements;
    for (int block = 0; block < kBlocks; ++block) {
      expected[i] += static_cast<float>((block * kElements + i % kElements) % 101 + 1000 * round);
    }
  }
  return expected;
}

// Whether more than half of the seeds find the mistake. With some seeds a block may be late enough by chance; but a
// seed always gives the same result.
template <Mistake kMistake>
bool is_caught() {
  const auto results = results_of_schedules<Managed<float>>(totals<kMistake>, kConcurrent);
  return 2 * std::count(results.begin(), results.end(), expected_totals()) < std::ssize(results);
}

TEST(partial_sums_pass_from_block_to_block_under_each_schedule) {
  EXPECT(all_equal(results_of_schedules<Managed<float>>(totals<Mistake::none>), expected_totals()));
  EXPECT(is_caught<Mistake::flag_before_stores>());
  EXPECT(is_caught<Mistake::flag_without_release>());
  EXPECT(is_caught<Mistake::flag_without_barrier>());
  EXPECT(is_caught<Mistake::loads_before_flag>());
  EXPECT(is_caught<Mistake::loads_without_barrier>());
  EXPECT(is_caught<Mistake::flags_that_stay_raised>());
}

TEST(seed_is_one_interleaving) {
  const auto run = [] { return totals<Mistake::flag_before_stores>(); };
  const auto results = results_of_schedules<Managed<float>>(run, {"concurrent:1", "concurrent:1", "concurrent:2"});
  EXPECT(results[0] == results[1]);
  EXPECT(results[0] != results[2]);
}

TEST(workspace_begins_as_nan_or_as_raised_flags) {
  setenv("QLN_SCHEDULE", "concurrent:1", 1);
  int nan = 0, flags = 0;
  for (int i = 0; i < 100; ++i) {
    Managed<std::uint32_t> words(2);
    poison(words.data(), words.size() * sizeof(words[0]));
    nan += words[0] == 0xFFFFFFFF && words[1] == 0xFFFFFFFF;
    flags += words[0] == 1 && words[1] == 1;
  }
  EXPECT(nan + flags == 100 && nan >= 40 && flags >= 40);
  unsetenv("QLN_SCHEDULE");
}

// The place of a table of 256 rows depends on the address at which the shared memory of a block begins.
__global__ void rows_kernel(std::uint32_t* bytes_to_rows) {
  if (thread_index() > 0) return;
  bytes_to_rows[block_index()] =
      static_cast<std::uint32_t>(dynamic_smem_for_rows<std::byte>() - dynamic_smem<std::byte>());
}

TEST(shared_memory_begins_at_either_of_two_addresses) {
  Managed<std::uint32_t> bytes_to_rows(2);
  launch<rows_kernel>({2, kWarp, 1024}, {}, bytes_to_rows.data());
  EXPECT(bytes_to_rows[0] == 0 && bytes_to_rows[1] == kRowsBegin);
}

TEST(blocks_wait_for_each_other) {
  const auto run = [] {
    Managed<std::uint32_t> ticket(1), next(1);
    Managed<float> sum(1);
    launch<in_order_kernel<true>>({7, 64, 128}, {}, ticket.data(), next.data(), sum.data());
    return sum[0];
  };
  EXPECT(all_equal(results_of_schedules<float>(run), 10.03125f));
  Managed<std::uint32_t> ticket(1), next = {9};
  Managed<float> sum(1);
  const std::string words =
      death_message([&] { launch<in_order_kernel<true>>({2, 32, 128}, {}, ticket.data(), next.data(), sum.data()); });
  EXPECT(contains(words, "waits for another block"));
}

TEST(wait_for_a_block_that_has_not_begun_is_caught) {
  setenv("QLN_SCHEDULE", "concurrent:1", 1);
  Managed<std::uint32_t> ticket(1), next(1);
  Managed<float> sum(1);
  // There are more blocks than the device holds at once.
  const std::string words =
      death_message([&] { launch<in_order_kernel<false>>({50, 32, 128}, {}, ticket.data(), next.data(), sum.data()); });
  EXPECT(contains(words, "deadlock") && contains(words, "waits for another block"));
  unsetenv("QLN_SCHEDULE");
}

// ---- memory ----

__global__ void beyond_the_end_kernel(float* out, int index) { *out = dynamic_smem<float>()[index]; }

TEST(shared_memory_begins_as_nan_and_has_the_requested_size) {
  Managed<float> out(1);
  launch<beyond_the_end_kernel>({1, 32, 32 * sizeof(float)}, {}, out.data(), 31);
  EXPECT(std::isnan(out[0]));
#ifdef __SANITIZE_ADDRESS__
  const std::string words =
      death_message([&] { launch<beyond_the_end_kernel>({1, 32, 32 * sizeof(float)}, {}, out.data(), 32); });
  EXPECT(contains(words, "heap-buffer-overflow") && contains(words, "beyond_the_end_kernel"));
#endif
  EXPECT(contains(death_message([] { launch<missed_barrier_kernel>({1, 32, emulator::max_smem_bytes() + 1}, {}, 0); }),
                  "shared memory"));
}

// ---- memory of the device and of the host ----

struct Twice {
  int padded;  // four bytes of padding follow
  const float* from;
  float* to;
};
__global__ void twice_kernel(const Twice args) {
  const int t = thread_index();
  args.to[t] = 2.0f * args.from[t];
}

TEST(memory_of_the_host_is_caught_in_the_arguments_of_a_kernel) {
  std::vector<float> host(kWarp);
  Managed<float> both(kWarp);
  const auto words = [](const Twice& args) {
    return death_message([&] { launch<twice_kernel>({1, kWarp}, {}, args); });
  };
  EXPECT(words({1, both.data(), both.data()}).empty());
  const std::string read = words({1, host.data(), both.data()});
  EXPECT(contains(read, "twice_kernel: argument 1 has at byte 8 an address of the host's memory"));
  EXPECT(contains(words({1, both.data(), host.data()}), "twice_kernel: argument 1 has at byte 16 an address"));
  float on_the_stack = 0.0f;
  EXPECT(contains(words({1, both.data(), &on_the_stack}), "at byte 16 an address"));
  EXPECT(contains(death_message([&] { fill_bytes(host.data(), 0, 4, {}); }), "fill_bytes: argument 1"));
}

TEST(memory_of_the_device_is_reached_by_kernels_alone) {
  const Managed<float> in(kWarp, 3.0f);
  Managed<float> out(kWarp);
  std::byte* const memory = emulator::allocate_on_device(kWarp * sizeof(float), "planted");
  auto* const device = reinterpret_cast<float*>(memory);
  launch<twice_kernel>({1, kWarp}, {}, Twice{1, in.data(), device});
  launch<twice_kernel>({1, kWarp}, {}, Twice{1, device, out.data()});
  for (const float value : out) EXPECT(value == 12.0f);
  constexpr char kSentence[] = "the host reads or writes memory of the device while no kernel runs: planted";
  EXPECT(contains(death_message([&] { out[0] = device[0]; }), kSentence));
  EXPECT(contains(death_message([&] { device[0] = 1.0f; }), kSentence));
  {
    const DeviceWork work;
    EXPECT(device[0] == 6.0f);
  }
  EXPECT(contains(death_message([&] { out[0] = device[0]; }), kSentence));
  emulator::release_on_device(memory);
}

// The arguments of a call with tensors that overlap and whose rows have gaps.
struct Scaled {
  ConstMatrix x;
  Matrix y;
};
void add_tensors(CallMemory& memory, Scaled& args) {
  memory.add(args.x);
  memory.add(args.y);
}
__global__ void scaled_kernel(const Scaled args, bool spoils_x) {
  for (std::int64_t i = thread_index(); i < args.x.rows * args.x.cols; i += block_threads()) {
    const std::int64_t row = i / args.x.cols, col = i % args.x.cols;
    const float value = static_cast<const float*>(args.x.data)[row * args.x.stride + col];
    static_cast<float*>(args.y.data)[row * args.y.stride + col] = 2.0f * value;
    if (spoils_x) static_cast<float*>(const_cast<void*>(args.x.data))[row * args.x.stride + col] = 0.0f;
  }
}

TEST(tensors_of_a_call_are_on_the_device_while_it_runs) {
  // x is columns 1 ... 3 of 5 rows of 10 elements, y is columns 5 ... 7 of the same rows.
  std::vector<float> host(50, 1.0f);
  const Scaled args = {.x = {host.data() + 1, DType::f32, 5, 3, 10}, .y = {host.data() + 5, DType::f32, 5, 3, 10}};
  const auto run = [&](bool spoils_x) {
    with_device_tensors(args, [&](const Scaled& on_device) {
      EXPECT(on_device.x.data != args.x.data && emulator::is_reachable(on_device.x.data));
      const auto between = static_cast<const float*>(on_device.y.data) - static_cast<const float*>(on_device.x.data);
      EXPECT(between == 4);
      launch<scaled_kernel>({1, kWarp}, {}, on_device, spoils_x);
    });
  };
  run(false);
  for (int i = 0; i < 50; ++i) EXPECT(host[i] == (i % 10 >= 5 && i % 10 < 8 ? 2.0f : 1.0f));
  EXPECT(contains(death_message([&] { run(true); }), "has written a tensor that its call only reads"));
  const std::string words = death_message([&] {
    with_device_tensors(args, [&](const Scaled& on_device) {
      host[0] = *static_cast<const float*>(on_device.x.data);  // as a check on the host might read it
    });
  });
  EXPECT(contains(words, "the host reads or writes memory of the device while no kernel runs: a tensor of a call"));
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() { return run_tests(); }
