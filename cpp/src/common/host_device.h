// For inline functions that device code calls too. (constexpr functions need no mark: nvcc is told to let them pass.)
#pragma once

#ifdef __CUDACC__
#define QLN_HOST_DEVICE __host__ __device__
#else
#define QLN_HOST_DEVICE
#endif
