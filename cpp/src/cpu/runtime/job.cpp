#include "cpu/runtime/job.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/layout.h"
#include "cpu/runtime/blocking.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "qlora_native/runtime.h"

namespace qlora_native {
namespace {

constexpr std::int64_t kAlignment = 64;

// The cost of a product is counted in rows: decoding its weight costs as much as multiplying so many.
constexpr double kRowsOfDecoding = 16.0;
double cost(const Job& job) { return static_cast<double>(job.rows()) + kRowsOfDecoding; }

// One stage of all jobs. Its tasks are those of the first job, then those of the second, and so on.
struct SharedStage {
  const std::vector<std::unique_ptr<Job>>* jobs;
  int stage;
  std::vector<std::int64_t> ends;  // the number of the task after each job's last one

  void run(std::int64_t task) const {
    const auto job = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const std::int64_t first = job == 0 ? 0 : ends[static_cast<std::size_t>(job - 1)];
    (*jobs)[static_cast<std::size_t>(job)]->run(stage, task - first);
  }
};

}  // namespace

// Not in the header: each instruction set would compile its own, and the linker keep any one of them.
Job::~Job() = default;
bool Job::runs_alone() const { return false; }

void Jobs::add(std::unique_ptr<Job> job) {
  if (job->runs_alone()) {
    run();
    job->run(0, 0);
    return;
  }
  const std::int64_t bytes = round_up(job->bytes(), kAlignment);
  if (bytes_ + bytes > kPackedBytes) run();
  bytes_ += bytes;
  jobs_.push_back(std::move(job));
}

void Jobs::run() {
  const std::vector<std::unique_ptr<Job>> jobs = std::exchange(jobs_, {});
  const std::int64_t bytes = std::exchange(bytes_, 0), threads = num_threads();
  if (jobs.empty()) return;
  std::byte* memory = scratch(Slot::call, static_cast<std::size_t>(bytes));
  if (jobs.size() == 1) {
    Job& job = *jobs.front();
    job.cut(threads);
    job.prepare(memory);
    const auto run = [&job](int stage) {
      return Stage{job.tasks(stage), [&job, stage](std::int64_t task) { job.run(stage, task); }};
    };
    static_assert(Job::kStages == 4);
    return parallel_stages(run(0), run(1), run(2), run(3));
  }

  double all = 0.0;
  for (const auto& job : jobs) all += cost(*job);
  std::vector<std::byte*> begins;
  SharedStage shared[Job::kStages];
  for (int stage = 0; stage < Job::kStages; ++stage) shared[stage] = {&jobs, stage, {}};
  for (const auto& job : jobs) {
    job->cut(std::max<std::int64_t>(1, std::llround(static_cast<double>(threads) * cost(*job) / all)));
    begins.push_back(memory);
    memory += round_up(job->bytes(), kAlignment);
    for (int stage = 0; stage < Job::kStages; ++stage) {
      auto& ends = shared[stage].ends;
      ends.push_back((ends.empty() ? 0 : ends.back()) + job->tasks(stage));
    }
  }
  const auto run = [&](int stage) {
    return Stage{shared[stage].ends.back(), [&of = shared[stage]](std::int64_t task) { of.run(task); }};
  };
  const auto prepare = [&](std::int64_t job) {
    jobs[static_cast<std::size_t>(job)]->prepare(begins[static_cast<std::size_t>(job)]);
  };
  parallel_stages(Stage{static_cast<std::int64_t>(jobs.size()), prepare}, run(0), run(1), run(2), run(3));
}

}  // namespace qlora_native
