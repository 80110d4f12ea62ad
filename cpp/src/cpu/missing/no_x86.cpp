// The instruction sets of x86-64 in a build for another architecture. isa.cpp never chooses one of them.
#include "cpu/isa.h"

#include "qlora_native/error.h"

namespace qlora_native {

const Backend& avx2_backend() { throw Unavailable("avx2 is not in this build"); }
const Backend& avx512_backend() { throw Unavailable("avx512 is not in this build"); }
const Backend& avx512_bf16_backend() { throw Unavailable("avx512_bf16 is not in this build"); }

}  // namespace qlora_native
