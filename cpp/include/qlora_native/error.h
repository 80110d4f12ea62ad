// The exceptions of the library: Error for a bad argument, and Unavailable.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "qlora_native/export.h"

namespace qlora_native {

// A bad argument. The message says which one, what was expected and what came. It is thrown before anything is written.
class QLN_API Error : public std::invalid_argument {
 public:
  Error(const std::string& argument, const std::string& expected, const std::string& got)
      : std::invalid_argument(argument + ": expected " + expected + ", got " + got), argument_(argument) {}
  const std::string& argument() const { return argument_; }

 private:
  std::string argument_;
};

// Something that this build does not have, or that is not possible on this machine.
class QLN_API Unavailable : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error. Each part of its message is a text, a number, or a function that returns a text.
template <class Argument, class Expected, class Got>
[[noreturn]] void fail(const Argument& argument, const Expected& expected, const Got& got) {
  const auto text = [](const auto& value) -> std::string {
    using Value = std::remove_cvref_t<decltype(value)>;
    if constexpr (std::is_arithmetic_v<Value>)
      return std::to_string(value);
    else if constexpr (std::is_invocable_v<Value>)
      return value();
    else
      return value;
  };
  throw Error(text(argument), text(expected), text(got));
}

// Throws Error unless `ok`. Checks run on every call, so pass a function where the text has yet to be composed.
template <class Argument, class Expected, class Got>
void check(bool ok, const Argument& argument, const Expected& expected, const Got& got) {
  if (!ok) [[unlikely]]
    fail(argument, expected, got);
}

}  // namespace qlora_native
