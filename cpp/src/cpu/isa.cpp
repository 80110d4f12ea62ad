#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>

#include "cpu/way.h"
#include "qlora_native/error.h"
#include "qlora_native/runtime.h"

#if QLN_AMX
#include <cpuid.h>
#endif
#if QLN_AMX && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora_native {
namespace {

// Why an instruction set cannot be used here.
constexpr const char* kNotInBuild = "is not in this build";
constexpr const char* kNotInProcessor = "is not in this processor";
constexpr const char* kNotPermitted = "is not permitted by the operating system, which grants no tile registers";

// What the processor has, and the operating system lets a program use. Each is empty, or says why it cannot be used.
struct Processor {
  std::string avx2 = kNotInBuild, avx512 = kNotInBuild, avx512_bf16 = kNotInBuild, amx_bf16 = kNotInBuild;
  bool amx_fp16 = false;  // and amx_bf16
};

#if QLN_AMX
// Linux lets a process use tile registers once it has asked, for they make each thread's saved state 8 KB larger.
std::string ask_for_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
#endif
  return kNotPermitted;
}
#endif

#if QLN_X86
Processor find_processor() {
  __builtin_cpu_init();
  Processor p;
  const auto found = [](bool is) { return std::string(is ? "" : kNotInProcessor); };
  // No test for F16C: older compilers do not know its name, and every processor with AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Of the processors with BF16 only Cooper Lake lacks VBMI.
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  p.avx2 = found(avx2);
  p.avx512 = found(avx512);
  p.avx512_bf16 = found(bf16);
#if QLN_AMX
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxFp16 = 1u << 21;
  p.amx_bf16 = found(bf16 && (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0);
  if (p.amx_bf16.empty()) p.amx_bf16 = ask_for_tiles();
  if (p.amx_bf16.empty() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) p.amx_fp16 = (eax & kAmxFp16) != 0;
#endif
  return p;
}
#else
Processor find_processor() { return {}; }
#endif

const Processor& processor() {
  static const Processor found = find_processor();
  return found;
}

struct Isa {
  const char* name;
  const Backend& (*backend)();
  std::string missing;  // why it cannot be used here; empty if it can
};

// All that there are, best first; those after `scalar` are for tests and never chosen by themselves.
std::vector<Isa> find_isas() {
  const Processor& has = processor();
  return {
      {"amx_bf16", amx_bf16_backend, has.amx_bf16},
      {"avx512_bf16", avx512_bf16_backend, has.avx512_bf16},
      {"avx512", avx512_backend, has.avx512},
      {"avx2", avx2_backend, has.avx2},
      {"scalar", reference_backend, ""},
      {"amx_emulated", amx_emulated_backend, ""},
  };
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

const Isa& choose() {
  const char* forced = std::getenv("QLN_FORCE_ISA");
  const std::string name = forced == nullptr ? "" : forced;
  std::string names, why = "is not known";
  for (const Isa& isa : isas()) {
    if (name == isa.name) {
      if (isa.missing.empty()) return isa;
      why = isa.missing;
    }
    if (!isa.missing.empty()) continue;
    if (name.empty()) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw Unavailable("QLN_FORCE_ISA: \"" + name + "\" " + why + "; this machine has " + names);
}

const Isa& current() {
  static const Isa& chosen = choose();  // tried again at the next call if it throws
  return chosen;
}

}  // namespace

const Backend& cpu_backend() { return current().backend(); }

std::string current_isa() { return current().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.missing.empty()) names.emplace_back(isa.name);
  return names;
}

bool dense_product_has_tiles(DType dtype) {
  if (current_isa() != "amx_bf16") return false;
  return dtype == DType::bf16 || (dtype == DType::f16 && processor().amx_fp16);
}

}  // namespace qlora_native
