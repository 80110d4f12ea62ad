#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

#include "qlora_native/runtime.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace qlora_native {
namespace {

// The pool of a build on its own: OpenMP's, or without it the calling thread.
#ifdef _OPENMP
void default_parallel_for(std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
#pragma omp parallel for schedule(static, 1)
  for (std::int64_t task = 0; task < tasks; ++task) body(context, task, task + 1);
}
int default_threads() { return omp_get_max_threads(); }
#else
void default_parallel_for(std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
  body(context, 0, tasks);
}
int default_threads() { return 1; }
#endif

struct Pool {
  ParallelFor parallel_for = default_parallel_for;
  int (*threads)() = default_threads;
};
Pool pool;

// One call of run_tasks, shared by its workers.
struct Run {
  std::int64_t tasks;
  void (*body)(void*, std::int64_t);
  void* context;
  std::atomic<std::int64_t> next{0};
  std::atomic_flag failed{};
  std::exception_ptr error{};  // written by the one that set `failed`
};

void work(Run& run) {
  try {
    for (;;) {
      const std::int64_t task = run.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= run.tasks) return;
      run.body(run.context, task);
    }
  } catch (...) {  // an exception must not leave a thread of the pool
    if (!run.failed.test_and_set()) run.error = std::current_exception();
    run.next.store(run.tasks);
  }
}

}  // namespace

void set_thread_pool(ParallelFor parallel_for, int (*threads)()) { pool = {parallel_for, threads}; }

int num_threads() { return std::max(1, pool.threads()); }

void run_tasks(std::int64_t tasks, void (*body)(void* context, std::int64_t task), void* context) {
  const std::int64_t workers = std::min<std::int64_t>(tasks, tasks > 1 ? num_threads() : 1);
  if (workers <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  Run run{.tasks = tasks, .body = body, .context = context};
  // A worker stays until no task is left, so it does not matter into how many pieces the pool cuts [0, workers).
  pool.parallel_for(workers, [](void* shared, std::int64_t, std::int64_t) { work(*static_cast<Run*>(shared)); }, &run);
  if (run.error) std::rethrow_exception(run.error);
}

}  // namespace qlora_native
