#include "qlora_native/runtime.h"

#include "backend.h"
#include "common/codebook.h"
#include "qlora_native/codebook.h"
#include "qlora_native/error.h"

namespace qlora_native {

std::string version() { return QLN_VERSION; }

const Backend& backend_for(const Stream& stream) {
  return stream.device == Device::cuda ? cuda_backend() : cpu_backend();
}

const std::array<float, 16>& codebook(std::string_view format) {
  if (format == "nf4") return kNf4;
  if (format == "fp4") return kFp4;
  if (format == "int4") return kInt4;
  throw Error("format", "nf4, fp4 or int4", std::string(format));
}

const std::array<float, 256>& dynamic_map(bool is_signed) { return is_signed ? kDynamicMap : kUnsignedDynamicMap; }

}  // namespace qlora_native
