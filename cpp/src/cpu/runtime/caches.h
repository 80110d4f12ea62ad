// The caches of this machine that products are cut for.
#pragma once

#include <cstdint>

namespace qlora_native {

// Bytes. These are common sizes, for where the system does not say.
struct Caches {
  std::int64_t second = 512 << 10;  // of a core, or of a few together
  std::int64_t last = 8 << 20;      // of all cores; the second level where there is no third
};

// The caches of the first core, as the system describes it. They are read once.
const Caches& caches();

}  // namespace qlora_native
