// A thread pool for tests, with a number of threads that a test chooses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#include "qlora_native/runtime.h"

inline int pool_threads = 1;
inline thread_local bool in_body = false;
inline void use_pool(int threads) {
  pool_threads = threads;
  qlora_native::set_thread_pool(
      [](std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
        if (in_body) std::abort();  // runtime.h: a body does not call the pool again
        const auto run = [=](std::int64_t task) {
          in_body = true;
          body(context, task, task + 1);
          in_body = false;
        };
        std::vector<std::thread> threads;
        for (std::int64_t task = 1; task < tasks; ++task) threads.emplace_back(run, task);
        run(0);
        for (std::thread& thread : threads) thread.join();
      },
      [] { return pool_threads; });
}
