// Tests: TEST(name) { ... } is one, and a program runs all of its own by run_tests(), in the order of the file.
// EXPECT(condition) prints a condition that does not hold, and goes on. With QLN_STOP_AT_FAILURE=1 the first failure
// ends the program, for callers that only need to know whether there is one.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

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

inline std::vector<void (*)()> tests;
#define TEST(name)                                                                     \
  static void name();                                                                  \
  [[maybe_unused]] static const bool name##_is_listed = (tests.push_back(name), true); \
  static void name()

constexpr int kSkipped = 77;  // the exit status of a test that cannot run here, ctest's SKIP_RETURN_CODE
// Returns the exit status.
inline int run_tests() {
  for (const auto test : tests) test();
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
