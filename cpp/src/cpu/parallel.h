// Tasks over the thread pool.
#pragma once

#include <cstdint>
#include <type_traits>

namespace qlora_native {

// Calls body(context, task) for every task in [0, tasks). Idle threads take the next task, so tasks may differ in
// length; a result must therefore not depend on which thread ran a task.
void run_tasks(std::int64_t tasks, void (*body)(void* context, std::int64_t task), void* context);

template <class Body>
void parallel_for(std::int64_t tasks, Body&& body) {
  run_tasks(
      tasks, [](void* context, std::int64_t task) { (*static_cast<std::remove_reference_t<Body>*>(context))(task); },
      &body);
}

}  // namespace qlora_native
