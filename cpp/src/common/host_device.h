// QLN_HOST_DEVICE marks inline functions that device code calls too. (constexpr functions need no mark, because nvcc is
// told to allow them.)
#pragma once

#ifdef __CUDACC__
#define QLN_HOST_DEVICE __host__ __device__
#else
#define QLN_HOST_DEVICE
#endif
