// Guards how the emulator runs a kernel that begins before the one before it has ended, and the last block to arrive:
// right kernels have one result under each schedule, and planted mistakes are found.
#include <cstdlib>
#include <string>
#include <vector>

#include "death_message.h"
#include "device/simt.cuh"
#include "emulator.h"
#include "expect.h"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

constexpr int kBlocks = 9, kThreads = 64, kCount = kBlocks * kThreads;

// Under how many schedules `run` returns what it should.
template <class Run, class Result>
int right_schedules(const Run& run, const Result& expected) {
  int right = 0;
  under_each_schedule([&] { right += run() == expected ? 1 : 0; });
  return right;
}
const int kAll = static_cast<int>(kSchedules.size());

// ---- programmatic dependent launch ----

int element() { return static_cast<int>(block_index()) * block_threads() + thread_index(); }

__global__ void double_kernel(const int* in, int* out) {
  griddepcontrol_launch_dependents();
  sync_threads();
  out[element()] = 2 * in[element()];
}

enum class Mistake { none, reads_before_the_wait, writes_before_the_wait };

template <Mistake kMistake>
__global__ void add_one_kernel(const int* doubled, int* in, int* out) {
  if constexpr (kMistake == Mistake::writes_before_the_wait) in[element()] = 0;
  if constexpr (kMistake != Mistake::reads_before_the_wait) griddepcontrol_wait();
  out[element()] = doubled[kCount - 1 - element()] + 1;
}

const LaunchShape kFirst = {.blocks = kBlocks, .threads = kThreads, .next_programmatic_launch = true};
const LaunchShape kSecond = {.blocks = kBlocks, .threads = kThreads, .programmatic_launch = true};

// Three kernels, of which the second and the third are dependent, and one of the two has a mistake.
template <Mistake kSecondMistake, Mistake kThirdMistake>
Managed<int> doubled_plus_two() {
  Managed<int> in(kCount), doubled(kCount, -1), more(kCount, -1), out(kCount);
  for (int i = 0; i < kCount; ++i) in[i] = i;
  const LaunchShape between = {
      .blocks = kBlocks, .threads = kThreads, .programmatic_launch = true, .next_programmatic_launch = true};
  launch<double_kernel>(kFirst, {}, in.data(), doubled.data());
  launch<add_one_kernel<kSecondMistake>>(between, {}, doubled.data(), in.data(), more.data());
  launch<add_one_kernel<kThirdMistake>>(kSecond, {}, more.data(), doubled.data(), out.data());
  return out;
}
// Each launch overlaps another kernel in some of the calls, whatever the schedule is.
template <Mistake kSecondMistake, Mistake kThirdMistake>
bool is_right_in_all_of_many_calls() {
  constexpr int kCalls = 8;
  Managed<int> expected(kCount);
  for (int i = 0; i < kCount; ++i) expected[i] = 2 * i + 2;
  int right = 0;
  for (int i = 0; i < kCalls; ++i) right += right_schedules(doubled_plus_two<kSecondMistake, kThirdMistake>, expected);
  return right == kCalls * kAll;
}

TEST(kernel_that_waits_sees_what_the_previous_one_has_written) {
  EXPECT((is_right_in_all_of_many_calls<Mistake::none, Mistake::none>()));
}
TEST(access_before_the_wait_is_caught) {
  EXPECT((!is_right_in_all_of_many_calls<Mistake::reads_before_the_wait, Mistake::none>()));
  EXPECT((!is_right_in_all_of_many_calls<Mistake::none, Mistake::reads_before_the_wait>()));
  EXPECT((!is_right_in_all_of_many_calls<Mistake::writes_before_the_wait, Mistake::none>()));
}

TEST(launched_kernel_runs_before_anything_else_in_its_stream) {
  Managed<int> in(kCount, 1), doubled(kCount);
  Managed<int> filled(1);
  launch<double_kernel>(kFirst, {}, in.data(), doubled.data());
  fill_bytes(filled.data(), 0, sizeof(int), {});
  EXPECT(doubled == Managed<int>(kCount, 2));
  launch<double_kernel>(kFirst, {}, doubled.data(), in.data());
  launch<double_kernel>({kBlocks, kThreads}, {}, in.data(), doubled.data());  // which is not dependent
  EXPECT(doubled == Managed<int>(kCount, 8));
}

TEST(memory_released_between_two_kernels_that_overlap_is_caught) {
  Managed<int> in(kCount, 1), out(kCount);
  const std::string words = death_message([&] {
    const DeviceMemory doubled = allocate_workspace(kCount * sizeof(int), {});
    launch<double_kernel>(kFirst, {}, in.data(), static_cast<int*>(doubled.data));
    release_workspace(doubled, {});
    launch<double_kernel>(kSecond, {}, in.data(), out.data());
  });
  EXPECT(contains(words, "memory is released before the dependent kernel is launched"));
}

// ---- the last block to arrive ----

template <bool kOneTooEarly>
__global__ void last_block_kernel(int* parts, std::uint32_t* arrived, int* sum, int* last_blocks) {
  store_vector<int, 1>(parts + element(), {{element()}});
  if (!is_last_to_arrive(arrived, kOneTooEarly ? kBlocks - 1 : kBlocks)) return;
  if (thread_index() > 0) return;
  ++*last_blocks;
  for (int i = 0; i < kCount; ++i) *sum += load_vector<int, 1>(parts + i).at[0];
}

template <bool kOneTooEarly>
bool is_right_under_each_schedule() {
  const auto run = [] {
    Managed<int> parts(kCount, -1), sum(1), last_blocks(1);
    Managed<std::uint32_t> arrived(1);
    launch<last_block_kernel<kOneTooEarly>>({kBlocks, kThreads}, {}, parts.data(), arrived.data(), sum.data(),
                                            last_blocks.data());
    return std::vector<int>{sum[0], last_blocks[0]};
  };
  return right_schedules(run, std::vector<int>{kCount * (kCount - 1) / 2, 1}) == kAll;
}

TEST(last_block_to_arrive_sees_what_all_have_stored) {
  EXPECT(is_right_under_each_schedule<false>() && !is_right_under_each_schedule<true>());
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() { return run_tests(); }
