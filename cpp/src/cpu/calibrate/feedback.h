// This header declares the error of quantize_with_feedback, which is compiled once for all instruction sets.
#pragma once

#include <cstdint>

namespace qlora_native {

// Throws the error for a strip of the weight whose elements have become infinite on the way: `factor` is that of a
// matrix which is nearly singular.
[[noreturn]] void fail_of_overflow(std::int64_t first_row);

}  // namespace qlora_native
