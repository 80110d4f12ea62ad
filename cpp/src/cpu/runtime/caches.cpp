#include "cpu/runtime/caches.h"

#include <cstdio>
#include <cstdlib>
#include <string>

#ifdef __linux__
#include <unistd.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace qlora_native {
namespace {

// Returns the bytes of the second or third level, or 0 where the system does not say.
#if defined(__linux__)
std::int64_t size_of_level(int level) {
  for (int index = 0;; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const auto first_line = [&](const char* name) {
      char line[64] = "";
      if (std::FILE* file = std::fopen((folder + name).c_str(), "r")) {
        if (std::fgets(line, sizeof(line), file) == nullptr) line[0] = '\0';
        std::fclose(file);
      }
      return std::string(line);
    };
    const std::string found = first_line("level");
    if (found.empty()) break;
    long kibibytes = 0;
    if (std::atoi(found.c_str()) == level && first_line("type").rfind("Instruction", 0) != 0 &&
        std::sscanf(first_line("size").c_str(), "%ldK", &kibibytes) == 1)
      return kibibytes << 10;
  }
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 0;
}
#elif defined(__APPLE__)
std::int64_t size_of_level(int level) {
  const char* name = level == 2 ? "hw.perflevel0.l2cachesize" : "hw.perflevel0.l3cachesize";
  std::int64_t bytes = 0;
  std::size_t size = sizeof(bytes);
  return sysctlbyname(name, &bytes, &size, nullptr, 0) == 0 ? bytes : 0;
}
#else
std::int64_t size_of_level(int) { return 0; }
#endif

Caches read_caches() {
  Caches found;
  const std::int64_t second = size_of_level(2), third = size_of_level(3);
  if (second != 0) found.second = second;
  if (third != 0 || second != 0) found.last = third != 0 ? third : second;
  return found;
}

}  // namespace

const Caches& caches() {
  static const Caches found = read_caches();
  return found;
}

}  // namespace qlora_native
