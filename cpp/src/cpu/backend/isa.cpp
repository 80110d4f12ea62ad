#include "cpu/backend/isa.h"

#include <cstdint>
#include <cstdlib>

#include "cpu/product/config.h"
#include "qlora_native/error.h"

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
namespace {

// Why an instruction set cannot be used here.
constexpr const char* kNotBuilt = "is not in this build";
constexpr const char* kNotInProcessor = "is not in this processor";
constexpr const char* kNotPermitted = "is not permitted by the operating system, which grants no tile registers";

struct Isa {
  const char* name;
  const CpuBackend& (*backend)();
  const char* missing;  // one of the reasons above, or null: it can be used
};

constexpr const char* unless(bool usable, const char* reason) { return usable ? nullptr : reason; }

#if QLN_AMX
// Linux lets a process use tile registers once it has asked, for they make each thread's saved state 8 KB larger.
bool tiles_are_permitted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
const char* amx_missing(bool has_avx512_bf16) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!has_avx512_bf16 || (edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return kNotInProcessor;
  static const bool permitted = tiles_are_permitted();  // asked once
  return unless(permitted, kNotPermitted);
}
bool has_amx_fp16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxFp16 = 1u << 21;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAmxFp16) != 0;
}
#else
bool has_amx_fp16() { return false; }
#endif

#if QLN_ARM
// On a system that cannot be asked in one of these ways the answer is no.
bool has_arm_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

// All instruction sets that the library knows, best first. Those after `scalar`, which is always usable, are for tests.
std::vector<Isa> find_isas() {
  std::vector<Isa> isas;
#if QLN_X86
  __builtin_cpu_init();
  // No test for F16C: older compilers do not know its name, and every processor with AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                       __builtin_cpu_supports("avx512vl");
  // All processors with BF16 have VBMI too, but for Cooper Lake.
  [[maybe_unused]] const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
#if QLN_AMX
  isas.push_back({"amx_bf16", amx_bf16_backend, amx_missing(bf16)});
#else
  isas.push_back({"amx_bf16", nullptr, kNotBuilt});
#endif
#if QLN_AVX512
  isas.push_back({"avx512_bf16", avx512_bf16_backend, unless(bf16, kNotInProcessor)});
  isas.push_back({"avx512", avx512_backend, unless(avx512, kNotInProcessor)});
#else
  for (const char* name : {"avx512_bf16", "avx512"}) isas.push_back({name, nullptr, kNotBuilt});
#endif
  isas.push_back({"avx2", avx2_backend, unless(avx2, kNotInProcessor)});
#else
  for (const char* name : {"amx_bf16", "avx512_bf16", "avx512", "avx2"}) isas.push_back({name, nullptr, kNotBuilt});
#endif
#if QLN_ARM
  isas.push_back({"neon_bf16", neon_bf16_backend, unless(has_arm_bf16(), kNotInProcessor)});
  isas.push_back({"neon", neon_backend, nullptr});  // of every 64-bit Arm processor
#else
  for (const char* name : {"neon_bf16", "neon"}) isas.push_back({name, nullptr, kNotBuilt});
#endif
  isas.push_back({"scalar", reference_backend, nullptr});
#if QLN_AMX_EMULATED
  isas.push_back({"amx_emulated", amx_emulated_backend, nullptr});
#else
  isas.push_back({"amx_emulated", nullptr, kNotBuilt});
#endif
  return isas;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

const Isa& choose() {
  const char* variable = std::getenv("QLN_FORCE_ISA");
  const std::string forced = variable == nullptr ? "" : variable;
  std::string names, reason = "is not known";
  for (const Isa& isa : isas()) {
    const bool usable = isa.missing == nullptr;
    if (usable && (forced.empty() || forced == isa.name)) return isa;
    if (usable) names += (names.empty() ? "" : ", ") + std::string(isa.name);
    if (!usable && forced == isa.name) reason = isa.missing;
  }
  throw Unavailable("QLN_FORCE_ISA: \"" + forced + "\" " + reason + "; this machine has " + names);
}

const Isa& current() {
  static const Isa& chosen = choose();  // tried again at the next call if it throws
  return chosen;
}

}  // namespace

const Backend& cpu_backend() { return current().backend().table; }

std::string cpu_isa() { return current().name; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.missing == nullptr) names.emplace_back(isa.name);
  return names;
}

bool dense_product_has_tiles(DType dtype) {
  static const bool in_use = cpu_isa() == "amx_bf16", fp16 = has_amx_fp16();
  return in_use && (dtype == DType::bf16 || (dtype == DType::f16 && fp16));
}
bool dense_product_is_ahead(DType dtype) {
  static const bool in_use = cpu_isa() == "avx512";
  return in_use && dtype == DType::f32;
}

}  // namespace qlora_native
