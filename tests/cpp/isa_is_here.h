// Whether a test of an instruction set can run here.
#pragma once

#include <cstdio>

#include "qlora_native/error.h"
#include "qlora_native/runtime.h"

// Whether the instruction set that QLN_FORCE_ISA names can run here. Prints which one is in use, or why it cannot; the
// test then returns kSkipped (expect.h).
inline bool isa_is_here() {
  try {
    std::printf("qlora_native %s on %s, %d threads\n", qlora_native::version().c_str(),
                qlora_native::current_isa().c_str(), qlora_native::num_threads());
    return true;
  } catch (const qlora_native::Unavailable& error) {
    std::printf("skipped: %s\n", error.what());
    return false;
  }
}
