// EXPECT(condition) prints a condition that does not hold, and goes on. A test ends with `return report();`. With
// QLN_STOP_AT_FAILURE=1 the first failure ends the test, for programs that only need to know whether there is one.
#pragma once

#include <cstdio>
#include <cstdlib>

inline int failures = 0;

// Flushed at once, because a later crash would lose buffered output.
#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::fflush(stdout);                                                \
      ++failures;                                                         \
      if (std::getenv("QLN_STOP_AT_FAILURE") != nullptr) std::_Exit(1);   \
    }                                                                     \
  } while (false)

constexpr int kSkipped = 77;  // the exit status of a test that cannot run here, ctest's SKIP_RETURN_CODE
// The exit status of a test that has run.
inline int report() {
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
