// Replaces libFuzzer if the compiler has none, with the same command line:
//
//   fuzz_x [-runs=N] [-max_total_time=SECONDS] [-seed=N] [-artifact_prefix=FOLDER/] FOLDER|FILE...
//
// It changes the inputs of the folders at random. It does not see which code they reach, only how they end: an input
// with a new outcome is kept and changed further. A file is run unchanged. Each input is written to crash-<seed> before
// it runs, in case it ends the program.
#include <sanitizer/common_interface_defs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

#include "fuzz.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kMaxInput = 1 << 16, kMaxOutcomes = 4096;
constexpr unsigned kSecondsOfAnInput = 20;

Bytes current;
std::string crash_file;

void save_current() {
  std::ofstream(crash_file, std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
  std::fprintf(stderr, "the input is in %s\n", crash_file.c_str());
}

void end(int signal) {
  std::fprintf(stderr, signal == SIGALRM ? "an input takes too long\n" : "aborted\n");
  save_current();
  std::_Exit(1);
}

void run(const Bytes& input) {
  current = input;
  alarm(kSecondsOfAnInput);
  outcome = "ok";
  LLVMFuzzerTestOneInput(current.data(), current.size());
  alarm(0);
}

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::size_t below(std::size_t n) { return n == 0 ? 0 : random_() % n; }

  Bytes mutate(const std::vector<Bytes>& corpus) {
    Bytes bytes = corpus[below(corpus.size())];
    for (std::size_t changes = 1 + below(6); changes > 0; --changes) change(bytes, corpus);
    bytes.resize(std::min(bytes.size(), kMaxInput));
    return bytes;
  }

 private:
  void change(Bytes& bytes, const std::vector<Bytes>& corpus) {
    const std::size_t at = below(bytes.size() + 1), length = std::min(bytes.size() - at, 1 + below(16));
    const auto from = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    const auto to = from + static_cast<std::ptrdiff_t>(length);
    const auto replace = [&](const auto& with) {
      bytes.insert(bytes.erase(from, to), std::begin(with), std::end(with));
    };
    switch (below(5)) {
      case 0:  // another byte
        if (length > 0) *from ^= static_cast<std::uint8_t>(below(4) == 0 ? random_() : 1u << below(8));
        break;
      case 1:  // fewer bytes, or more
        replace(Bytes(below(2) * below(8), static_cast<std::uint8_t>(random_())));
        break;
      case 2: {  // a part of this or another input
        const Bytes& other = corpus[below(corpus.size())];
        const std::size_t first = below(other.size()), count = std::min(other.size() - first, 1 + below(64));
        replace(Bytes(other.begin() + static_cast<std::ptrdiff_t>(first),
                      other.begin() + static_cast<std::ptrdiff_t>(first + count)));
        break;
      }
      case 3: {  // an integer
        const std::int64_t value = kNumbers[below(kNumbers.size())];
        const auto* const first = reinterpret_cast<const std::uint8_t*>(&value);
        std::copy_n(first, std::min(std::size_t{1} << below(4), bytes.size() - at), from);
        break;
      }
      default:  // an adjacent number
        if (length > 0) *from = static_cast<std::uint8_t>(*from + 1 - 2 * below(2));
    }
  }

  static constexpr std::array<std::int64_t, 18> kNumbers = {
      1,   2,    3,     16,        31,        32,        48,        64,        255,
      256, 4096, 65536, 1LL << 24, 1LL << 31, 1LL << 32, 1LL << 53, 1LL << 60, -(1LL << 62)};

  std::mt19937_64 random_;
};

// What an error says, without what is new every time: what it got, and numbers.
std::string kind_of(const std::string& text) {
  const std::string says = text.substr(0, text.find(", got "));
  std::string kind;
  std::copy_if(says.begin(), says.end(), std::back_inserter(kind), [](char c) { return c < '0' || c > '9'; });
  return kind;
}

}  // namespace

// GCC's library of UndefinedBehaviorSanitizer does not know of that callback: it is to raise a signal.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }

int main(int count, char** arguments) {
  std::uint64_t runs = ~std::uint64_t{0}, seconds = ~std::uint64_t{0}, seed = std::random_device{}();
  std::string prefix;  // of the names of files that are written
  std::vector<std::filesystem::path> files;
  bool is_folder = false;
  for (const std::string& argument : std::vector<std::string>(arguments + 1, arguments + count)) {
    const auto value_of = [&](const std::string& option, std::uint64_t& value) {
      if (argument.starts_with(option)) value = std::strtoull(argument.c_str() + option.size(), nullptr, 10);
    };
    value_of("-runs=", runs), value_of("-max_total_time=", seconds), value_of("-seed=", seed);
    const std::string artifact_prefix = "-artifact_prefix=";
    if (argument.starts_with(artifact_prefix)) prefix = argument.substr(artifact_prefix.size());
    if (argument.starts_with("-")) continue;  // other options of libFuzzer have no meaning here
    if (std::filesystem::is_directory(argument)) {
      is_folder = true;
      for (const auto& entry : std::filesystem::directory_iterator(argument)) files.push_back(entry.path());
    } else {
      files.emplace_back(argument);
    }
  }
  std::sort(files.begin(), files.end());
  if (files.empty()) {
    std::fprintf(stderr, "expected files, or folders with some\n");
    return 2;
  }

  crash_file = prefix + "crash-" + std::to_string(seed);
  __sanitizer_set_death_callback(save_current);
  std::signal(SIGALRM, end);
  std::signal(SIGABRT, end);
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  std::vector<Bytes> corpus;
  std::unordered_set<std::string> outcomes;
  const auto try_input = [&](const Bytes& input, bool is_kept) {
    run(input);
    const bool is_new = outcomes.size() < kMaxOutcomes && outcomes.insert(kind_of(outcome)).second;
    if (is_new || is_kept) corpus.push_back(input);
  };
  for (const auto& file : files) try_input(read(file), true);
  std::uint64_t done = files.size();
  Mutator mutator(seed);
  for (; is_folder && done < runs && elapsed() < static_cast<double>(seconds); ++done)
    try_input(mutator.mutate(corpus), false);
  std::printf("%llu inputs in %.0f s, seed %llu: %zu outcomes, no crash\n", static_cast<unsigned long long>(done),
              elapsed(), static_cast<unsigned long long>(seed), outcomes.size());
  return 0;
}
