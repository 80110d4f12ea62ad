#include "cpu/isa.h"

#include <cstdlib>

#include "qlora_native/error.h"
#include "qlora_native/runtime.h"

namespace qlora_native {
namespace {

struct Isa {
  const char* name;
  const Backend& (*backend)();
};

// What this machine and its operating system run, best first.
std::vector<Isa> find_isas() {
  std::vector<Isa> isas;
#if QLN_X86
  __builtin_cpu_init();
  // No test for F16C: older compilers do not know its name, and every processor with AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Of the processors with BF16 only Cooper Lake lacks VBMI.
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (bf16) isas.push_back({"avx512_bf16", avx512_bf16_backend});
  if (avx512) isas.push_back({"avx512", avx512_backend});
  if (avx2) isas.push_back({"avx2", avx2_backend});
#endif
  isas.push_back({"scalar", reference_backend});
  return isas;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

const Isa& choose() {
  const char* forced = std::getenv("QLN_FORCE_ISA");
  if (forced == nullptr || *forced == '\0') return isas().front();
  std::string names;
  for (const Isa& isa : isas()) {
    if (std::string(forced) == isa.name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw Unavailable("QLN_FORCE_ISA: \"" + std::string(forced) + "\" is not in this build or not on this machine, " +
                    "which has " + names);
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
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  return names;
}

}  // namespace qlora_native
