// The exceptions of the library: Error for a bad argument, and Unavailable.
#pragma once

#include <stdexcept>
#include <string>

#include "qlora_native/types.h"

namespace qlora_native {

// A bad argument. The message says which one, what was expected and what came. Every operation checks its arguments
// before anything is written. `weighted_scales` alone may find out later, when its scales would be infinite; they must
// not be used then.
class QLN_API Error : public std::invalid_argument {
 public:
  Error(const std::string& argument, const std::string& expected, const std::string& got)
      : std::invalid_argument(argument + ": expected " + expected + ", got " + got), argument_(argument) {}
  const std::string& argument() const { return argument_; }

 private:
  std::string argument_;
};

// Something that this build does not have, or that is not possible on this machine. Every operation throws this if the
// backend of its device has no kernel for it.
class QLN_API Unavailable : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace qlora_native
