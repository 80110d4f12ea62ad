#include "cpu/runtime/processor.h"

#include <cstddef>

#if QLN_AMX
#include <cpuid.h>
#endif
#if QLN_AMX && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if QLN_ARM && defined(__linux__)
#include <sys/auxv.h>
#elif QLN_ARM && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qlora_native {

#if QLN_X86
// No test for F16C: older compilers do not know its name, and every processor with AVX2 has it.
bool has_avx2() {
  __builtin_cpu_init();  // a constructor of the program may call this before the C library has
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// All processors with BF16 have VBMI too, except Cooper Lake.
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif

#if QLN_AMX
bool has_amx_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0;
}
bool has_amx_fp16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxFp16 = 1u << 21;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAmxFp16) != 0;
}
#else
bool has_amx_bf16() { return false; }
bool has_amx_fp16() { return false; }
#endif

bool amx_is_permitted() {
#if QLN_AMX && defined(__linux__)
  // Linux grants tile registers on request, because they make each thread's saved state 8 KB larger.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

// False on a system that offers neither.
bool has_arm_bf16() {
#if QLN_ARM && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif QLN_ARM && defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

}  // namespace qlora_native
