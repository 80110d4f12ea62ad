#include "cpu/calibrate/feedback.h"

#include "common/checks.h"

namespace qlora_native {

void fail_of_overflow(std::int64_t first_row) {
  fail("factor", "one that keeps the weight finite; damp the gram more",
       [&] { return "NaN or infinity in the rows from " + std::to_string(first_row) + " on"; });
}

}  // namespace qlora_native
