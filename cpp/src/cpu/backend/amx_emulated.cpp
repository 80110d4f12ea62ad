// The tiles of AMX-BF16 in plain C++, for tests on machines without it: the same algorithms, the same bits and the same
// choice of panels. Tiles also multiply what vectors multiply on the processor.
#define QLN_ISA amx_emulated

#include "cpu/backend/isa.h"

#include "cpu/isa/portable/dot_bf16.h"

#include "cpu/isa/amx/tile_emulated.h"

#include "cpu/backend/backend_tiled-inl.h"

namespace qlora_native {

const CpuBackend& amx_emulated_backend() {
  static const CpuBackend backend = amx_emulated::TiledBackend<reference_backend, nullptr>::backend();
  return backend;
}

}  // namespace qlora_native
