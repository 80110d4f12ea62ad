// Tasks over the thread pool, and scratch memory that stays with its thread.
#pragma once

#include <cstddef>
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

// Memory of the calling thread, aligned to 64 bytes, uninitialized, valid until this thread asks for the same slot
// again. Grows and is kept, so that a call costs no page faults.
//   Slot::call    what one call shares among its threads; asked for by the calling thread
//   Slot::thread  what one task needs for itself
enum class Slot { call, thread };
std::byte* scratch(Slot slot, std::size_t bytes);

}  // namespace qlora_native
