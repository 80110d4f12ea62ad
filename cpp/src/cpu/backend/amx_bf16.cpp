// The backend for AMX-BF16: bfloat16 products by tiles, the rest as with AVX-512 BF16.
#define QLN_ISA amx_bf16

#include "cpu/backend/isa.h"

#include "cpu/isa/avx512/table_vbmi.h"

#include "cpu/isa/avx512/dot_bf16.h"

#include "cpu/isa/amx/tile.h"

#include "cpu/backend/backend_tiled-inl.h"

namespace qlora_native {

const CpuBackend& amx_bf16_backend() {
  static const CpuBackend backend = amx_bf16::TiledBackend<avx512_bf16_backend, true>::backend();
  return backend;
}

}  // namespace qlora_native
