// What the C++ tests share: EXPECT(condition) prints what does not hold and goes on; end with `return report();`.
#pragma once

#include <cstdio>

inline int failures = 0;

// Flushed at once: a later crash would take what is only buffered with it.
#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::fflush(stdout);                                                \
      ++failures;                                                         \
    }                                                                     \
  } while (false)

// The exit status of a test.
inline int report() {
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
