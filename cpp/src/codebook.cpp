// The tables of common/codebook.h and common/microscaling.h, by their names.
#include "qlora_native/codebook.h"

#include <string>

#include "common/codebook.h"
#include "common/microscaling.h"
#include "qlora_native/error.h"

namespace qlora_native {

const std::array<float, 16>& codebook(std::string_view format) {
  if (format == "nf4") return kNf4;
  if (format == "fp4") return kFp4;
  if (format == "int4") return kInt4;
  if (format == "mxfp4" || format == "nvfp4") return kE2m1;
  throw Error("format", "nf4, fp4, int4, mxfp4 or nvfp4", std::string(format));
}

const std::array<float, 256>& dynamic_map(bool is_signed) { return is_signed ? kDynamicMap : kUnsignedDynamicMap; }

}  // namespace qlora_native
