// Runs tasks on the thread pool.
#pragma once

#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

namespace qlora_native {

// A stage of an operation calls body(context, task) for every task in [0, tasks). Idle threads take the next task, so
// tasks may differ in length, and no result may depend on which thread ran a task.
struct StageView {
  std::int64_t tasks;
  void (*body)(void* context, std::int64_t task);
  void* context;
};
constexpr int kMaxStages = 5;

// Runs the stages one after another. Each begins when all tasks of the one before have ended. They share one use of the
// pool, because at the end of each use a pool waits for all of its threads, and on a busy machine some may not even
// have begun.
void run_stages(const StageView* stages, int count);

template <class Body>
struct Stage {
  std::int64_t tasks;
  Body body;
};
template <class Body>
Stage(std::int64_t, Body) -> Stage<Body>;

template <class... Bodies>
void parallel_stages(Stage<Bodies>... stages) {
  static_assert(sizeof...(Bodies) <= kMaxStages);
  const StageView views[] = {{stages.tasks,
                              [](void* context, std::int64_t task) { (*static_cast<Bodies*>(context))(task); },
                              &stages.body}...};
  run_stages(views, static_cast<int>(std::size(views)));
}

template <class Body>
void parallel_for(std::int64_t tasks, Body&& body) {
  const StageView stage{
      tasks, [](void* context, std::int64_t task) { (*static_cast<std::remove_reference_t<Body>*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&body))};
  run_stages(&stage, 1);
}

}  // namespace qlora_native
