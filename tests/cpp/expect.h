// What the C++ tests share: EXPECT(condition) prints what does not hold and goes on; end with `return report();`. With
// QLN_STOP_AT_FAILURE=1 the first one ends the test, for who only wants to know whether there is any.
#pragma once

#include <cstdio>
#include <cstdlib>

inline int failures = 0;

// Flushed at once: a later crash would take what is only buffered with it.
#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::fflush(stdout);                                                \
      ++failures;                                                         \
      if (std::getenv("QLN_STOP_AT_FAILURE") != nullptr) std::_Exit(1);   \
    }                                                                     \
  } while (false)

// The exit status of a test.
inline int report() {
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
