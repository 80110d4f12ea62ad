// The check that a call throws an Error about one of its arguments.
#pragma once

#include <cstdio>
#include <functional>
#include <string>

#include "expect.h"
#include "qlora_native/error.h"

inline void expect_refused(const std::string& argument, const std::function<void()>& call) {
  std::string named, message;
  try {
    call();
  } catch (const qlora_native::Error& error) {
    named = error.argument(), message = error.what();
  }
  EXPECT(named == argument && message.rfind(argument + ": expected ", 0) == 0);
  if (named != argument) std::printf("  expected an error about %s\n", argument.c_str());
}
