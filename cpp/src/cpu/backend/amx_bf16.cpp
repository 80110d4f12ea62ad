// The backend for AMX-BF16: bfloat16 products by tiles, the rest as with AVX-512 BF16.
#define QLN_ISA amx_bf16

#include "cpu/backend/isa.h"

#include "cpu/isa/avx512/table_vbmi.h"

#include "cpu/isa/avx512/dot_bf16_as_f32.h"

#include "cpu/isa/amx/tile.h"

#include "cpu/backend/backend_tiled-inl.h"
#include "cpu/product/forward_small_m-inl.h"

namespace qlora_native {
namespace amx_bf16 {
namespace {

std::unique_ptr<Job> forward_small_m(const LinearForwardArgs& args, const WeightRows& part) {
  return make_job<ForwardSmallM, DotBf16AsF32>(args, part);
}

}  // namespace
}  // namespace amx_bf16

const CpuBackend& amx_bf16_backend() {
  using namespace amx_bf16;
  static const CpuBackend backend = TiledBackend<avx512_bf16_backend, forward_small_m>::backend();
  return backend;
}

}  // namespace qlora_native
