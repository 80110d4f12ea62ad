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

enum class Mistake { none, reads_before_the_wait, writes_before_the_wait, no_wait };

template <Mistake kMistake>
__global__ void add_one_kernel(const int* doubled, int* in, int* out) {
  const int i = kCount - 1 - element(), early = doubled[i];
  if constexpr (kMistake == Mistake::writes_before_the_wait) in[element()] = 0;
  if constexpr (kMistake != Mistake::no_wait) griddepcontrol_wait();
  out[element()] = (kMistake == Mistake::reads_before_the_wait ? early : doubled[i]) + 1;
}

const LaunchShape kFirst = {.blocks = kBlocks, .threads = kThreads, .next_programmatic_launch = true};
const LaunchShape kSecond = {.blocks = kBlocks, .threads = kThreads, .programmatic_launch = true};

// Three kernels, of which the second and the third are dependent, and one of the two has a mistake. A write of the
// third before its wait is to what the first reads.
template <Mistake kSecondMistake, Mistake kThirdMistake>
Managed<int> doubled_plus_two() {
  Managed<int> in(kCount), doubled(kCount, -1), more(kCount, -1), out(kCount);
  for (int i = 0; i < kCount; ++i) in[i] = i;
  const LaunchShape between = {
      .blocks = kBlocks, .threads = kThreads, .programmatic_launch = true, .next_programmatic_launch = true};
  launch<double_kernel>(kFirst, {}, in.data(), doubled.data());
  launch<add_one_kernel<kSecondMistake>>(between, {}, doubled.data(), in.data(), more.data());
  launch<add_one_kernel<kThirdMistake>>(kSecond, {}, more.data(), in.data(), out.data());
  return out;
}
template <Mistake kSecondMistake, Mistake kThirdMistake>
bool is_right_under_all_schedules() {
  Managed<int> expected(kCount);
  for (int i = 0; i < kCount; ++i) expected[i] = 2 * i + 2;
  return right_schedules(doubled_plus_two<kSecondMistake, kThirdMistake>, expected) == kAll;
}

TEST(kernel_that_waits_sees_what_the_previous_one_has_written) {
  EXPECT((is_right_under_all_schedules<Mistake::none, Mistake::none>()));
}
TEST(access_before_the_wait_is_caught) {
  EXPECT((!is_right_under_all_schedules<Mistake::reads_before_the_wait, Mistake::none>()));
  EXPECT((!is_right_under_all_schedules<Mistake::none, Mistake::reads_before_the_wait>()));
  EXPECT((!is_right_under_all_schedules<Mistake::writes_before_the_wait, Mistake::none>()));
  EXPECT((!is_right_under_all_schedules<Mistake::none, Mistake::writes_before_the_wait>()));
}
TEST(dependent_kernel_without_a_wait_is_caught) {
  under_each_schedule([] {
    const std::string words = death_message([] { doubled_plus_two<Mistake::no_wait, Mistake::none>(); });
    EXPECT(contains(words, "no block of a dependent kernel has waited"));
  });
}

// Code of compute_80 has no griddepcontrol, and so its kernels must not overlap.
TEST(kernels_without_griddepcontrol_run_one_after_the_other) {
  setenv("QLN_EMULATED_PTX", "80", 1);
  EXPECT((is_right_under_all_schedules<Mistake::none, Mistake::none>()));
  Managed<int> in(kCount, 1), doubled(kCount), out(kCount);
  const std::string words = death_message([&] {
    launch<double_kernel>(kFirst, {}, in.data(), doubled.data());
    launch_kernel<add_one_kernel<Mistake::none>>(kSecond, {}, doubled.data(), in.data(), out.data());
  });
  EXPECT(contains(words, "a dependent kernel whose code has no griddepcontrol"));
  unsetenv("QLN_EMULATED_PTX");
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

// What the process says if `between` happens between two kernels that overlap.
template <class F>
std::string message_of(const F& between) {
  Managed<int> in(kCount, 1), out(kCount);
  return death_message([&] {
    const DeviceMemory doubled = allocate_workspace(kCount * sizeof(int), {});
    launch<double_kernel>(kFirst, {}, in.data(), static_cast<int*>(doubled.data));
    between(doubled);
    launch<add_one_kernel<Mistake::none>>(kSecond, {}, static_cast<int*>(doubled.data), in.data(), out.data());
    release_workspace(doubled, {});
  });
}

TEST(whatever_comes_between_two_kernels_that_overlap_is_caught) {
  EXPECT(message_of([](const DeviceMemory&) {}).empty());
  EXPECT(contains(message_of([](const DeviceMemory& memory) { release_workspace(memory, {}); }),
                  "memory is released before the dependent kernel is launched"));
  EXPECT(contains(message_of([](const DeviceMemory&) { allocate_workspace(8, {}); }),
                  "memory is allocated before the dependent kernel is launched"));
  EXPECT(contains(message_of([](const DeviceMemory& memory) { fill_bytes(memory.data, 0, 8, {}); }),
                  "a dependent kernel that does not follow another one at once"));
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
