// The one exception of the library.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace qlora_native {

// A bad argument: which one, what was expected, what came. Thrown before anything is written.
class Error : public std::invalid_argument {
 public:
  Error(const std::string& argument, const std::string& expected, const std::string& got)
      : std::invalid_argument(argument + ": expected " + expected + ", got " + got), argument_(argument) {}
  const std::string& argument() const { return argument_; }

 private:
  std::string argument_;
};

// What was asked for is not in this build or not possible on this machine.
class Unavailable : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error unless `ok`. `expected` and `got` are texts, numbers, or functions that return a text: they are
// formatted where it is thrown alone, since checks run on every call.
template <class Expected, class Got>
void check(bool ok, const char* argument, const Expected& expected, const Got& got) {
  if (ok) [[likely]]
    return;
  const auto text = [](const auto& value) -> std::string {
    using Value = std::remove_cvref_t<decltype(value)>;
    if constexpr (std::is_arithmetic_v<Value>)
      return std::to_string(value);
    else if constexpr (std::is_invocable_v<Value>)
      return value();
    else
      return value;
  };
  throw Error(argument, text(expected), text(got));
}

}  // namespace qlora_native
