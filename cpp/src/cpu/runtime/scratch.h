// Memory that is needed for the time of a call, and that its thread keeps for the next one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlora_native {

// Memory of the calling thread, aligned to 64 bytes and uninitialized. It is valid until this thread requests the
// same slot again. It grows and is kept, so that a call costs no page faults.
//   Slot::call    what one call shares among its threads; requested by the calling thread
//   Slot::thread  what one task needs for itself
enum class Slot { call, thread };
std::byte* scratch(Slot slot, std::size_t bytes);
float* scratch_floats(Slot slot, std::int64_t count);

}  // namespace qlora_native
