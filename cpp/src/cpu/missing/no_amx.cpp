// AMX in a build for another architecture, or by an assembler that does not know it. isa.cpp never chooses it.
#include "cpu/isa.h"

#include "qlora_native/error.h"

namespace qlora_native {

const Backend& amx_bf16_backend() { throw Unavailable("amx_bf16 is not in this build"); }

}  // namespace qlora_native
