// The one exception of the library.
#pragma once

#include <stdexcept>
#include <string>

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

}  // namespace qlora_native
