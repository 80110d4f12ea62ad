// Maps of matrices whose tiles TMA loads. The driver makes them; the runtime finds the driver's function, so that the
// library needs no libcuda.
#include <string>

#include "device/hopper.cuh"
#include "qlora_native/error.h"
#include "runtime/check.h"

namespace qlora_native::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encode_of_driver() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  constexpr unsigned kCuda12 = 12000;
  QLN_CHECK_CUDA(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kCuda12, cudaEnableDefault, &result));
#else
  QLN_CHECK_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled: expected one of CUDA 12.0 or later");
  }
  return reinterpret_cast<Encode>(function);
}

CUtensorMapSwizzle swizzle_of(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::none:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
    case Swizzle::bytes_32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::bytes_64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::bytes_128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
  }
  return CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace

TensorMap::TensorMap(const TileSource& source) {
  static const Encode encode = encode_of_driver();
  // The innermost dimension comes first. TMA copies bits, so that UINT16 serves every 16-bit type.
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(source.cols), static_cast<cuuint64_t>(source.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(source.stride_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(source.box_cols), static_cast<cuuint32_t>(source.box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  // Tiles that follow each other along a row lie in the same one or two ranges of 256 bytes.
  const CUresult result =
      encode(&map_, source.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
             const_cast<void*>(source.data), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle_of(source.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return;
  const char* fault = source.fault();
  throw Error(source.name, "an operand of which TMA can load tiles",
              *fault != '\0' ? fault : "the driver's error " + std::to_string(static_cast<int>(result)));
}

}  // namespace qlora_native::cuda
