// The algorithms of the optimizers by their names in Python.
#pragma once

#include <string>

#include "common/checks.h"
#include "qlora_native/optimizer.h"

namespace qlora_native {

inline Algorithm algorithm_of(const std::string& name) {
  if (name == "adamw") return Algorithm::adamw;
  if (name == "lion") return Algorithm::lion;
  check(name == "ademamix", "algorithm", "adamw, lion or ademamix", name);
  return Algorithm::ademamix;
}

}  // namespace qlora_native
