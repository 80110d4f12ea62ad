#include "cpu/runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

#include "hooks.h"

#ifdef _OPENMP
#include "cpu/runtime/openmp_pool.h"
#endif

namespace qlora_native {
namespace {

// The pool if the application has set none: OpenMP's, or without OpenMP the calling thread.
void default_parallel_for(std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
#ifdef _OPENMP
  openmp_parallel_for(tasks, body, context);
#else
  body(context, 0, tasks);
#endif
}

// How often a thread checks whether a stage has ended before it sleeps. That takes some 50 us, which is longer than the
// last task of a stage usually takes, and short beside the time slice of a thread that waits for a core.
constexpr int kSpins = 1000;
inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// One call of run_stages, shared by its workers.
struct Run {
  const StageView* stages;
  int count;
  struct Progress {
    std::atomic<std::int64_t> next{0}, done{0};
    std::atomic<bool> ended{false};
  };
  Progress progress[kMaxStages];
  std::atomic_flag failed{};
  std::exception_ptr error{};  // written by the one that set `failed`

  void work() {
    for (int i = 0; i < count; ++i) {
      take_tasks(stages[i], progress[i]);
      if (i + 1 < count) wait_for_end(stages[i], progress[i]);
    }
  }

 private:
  void take_tasks(const StageView& stage, Progress& current) {
    for (;;) {
      const std::int64_t task = current.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= stage.tasks) return;
      try {
        // After a failure tasks are counted and not run, so that nobody waits for ever.
        if (!failed.test(std::memory_order_relaxed)) stage.body(stage.context, task);
      } catch (...) {  // an exception must not leave a thread of the pool
        if (!failed.test_and_set()) error = std::current_exception();
      }
      if (current.done.fetch_add(1, std::memory_order_acq_rel) + 1 == stage.tasks) {
        current.ended.store(true, std::memory_order_release);
        current.ended.notify_all();
      }
    }
  }
  static void wait_for_end(const StageView& stage, Progress& current) {
    if (stage.tasks == 0) return;
    for (int i = 0; i < kSpins; ++i) {
      if (current.ended.load(std::memory_order_acquire)) return;
      pause_briefly();
    }
    current.ended.wait(false, std::memory_order_acquire);
  }
};

}  // namespace

int default_threads() {
#ifdef _OPENMP
  return openmp_threads();
#else
  return 1;
#endif
}

void run_stages(const StageView* stages, int count) {
  std::int64_t max_tasks = 0;
  for (int i = 0; i < count; ++i) max_tasks = std::max(max_tasks, stages[i].tasks);
  const std::int64_t workers = std::min<std::int64_t>(max_tasks, max_tasks > 1 ? num_threads() : 1);
  if (workers <= 1) {
    for (int i = 0; i < count; ++i)
      for (std::int64_t task = 0; task < stages[i].tasks; ++task) stages[i].body(stages[i].context, task);
    return;
  }
  Run run{.stages = stages, .count = count};
  // A worker stays until no task is left, so it does not matter into how many pieces the pool cuts [0, workers).
  const ParallelFor pool = hooks().parallel_for != nullptr ? hooks().parallel_for : default_parallel_for;
  pool(workers, [](void* shared, std::int64_t, std::int64_t) { static_cast<Run*>(shared)->work(); }, &run);
  if (run.error) std::rethrow_exception(run.error);
}

}  // namespace qlora_native
