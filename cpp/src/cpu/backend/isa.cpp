#include "cpu/backend/isa.h"

#include <cstdlib>

#include "cpu/runtime/processor.h"
#include "qlora_native/error.h"

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

// All instruction sets that the library knows, best first. Those after `scalar`, which is always usable, are for tests.
std::vector<Isa> find_isas() {
  std::vector<Isa> isas;
  const auto add = [&](const char* name, const CpuBackend& (*backend)(), bool in_processor) {
    isas.push_back({name, backend, in_processor ? nullptr : kNotInProcessor});
  };
  const auto add_not_built = [&](const char* name) { isas.push_back({name, nullptr, kNotBuilt}); };
  if constexpr (QLN_AMX) {
    add("amx_bf16", amx_bf16_backend, has_avx512_bf16() && has_amx_bf16());
    if (isas.back().missing == nullptr && !amx_is_permitted()) isas.back().missing = kNotPermitted;
  } else {
    add_not_built("amx_bf16");
  }
  if constexpr (QLN_X86 && QLN_AVX512) {
    add("avx512_bf16", avx512_bf16_backend, has_avx512_bf16());
    add("avx512", avx512_backend, has_avx512());
  } else {
    add_not_built("avx512_bf16");
    add_not_built("avx512");
  }
  if constexpr (QLN_X86 && QLN_AVX2)
    add("avx2", avx2_backend, has_avx2());
  else
    add_not_built("avx2");
  if constexpr (QLN_ARM) {
    add("neon_bf16", neon_bf16_backend, has_arm_bf16());
    add("neon", neon_backend, true);  // every 64-bit Arm processor has it
  } else {
    add_not_built("neon_bf16");
    add_not_built("neon");
  }
  add("scalar", reference_backend, true);
  if constexpr (QLN_AMX_EMULATED)
    add("amx_emulated", amx_emulated_backend, true);
  else
    add_not_built("amx_emulated");
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

}  // namespace qlora_native
