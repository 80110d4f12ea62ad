// Guards NearestCodes, by which the CUDA kernels quantize to 4 bits: it agrees with nearest_code(), which compares with
// every midpoint. A code can change only at a midpoint or at the border of a bucket, so the floats around all of these
// are tested for many codebooks, and for the named codebooks also every 16-bit float.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "emulator.h"
#include "quantize/nearest_code.cuh"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

constexpr int kThreads = 64;
constexpr float kLargest = 1.0f + 0x1p-22f;  // the largest scaled element of a block, with rounding errors

__global__ void encode_kernel(const float* code, const float* t, std::int64_t vectors, std::uint32_t* codes) {
  NearestCodes::Table& table = *dynamic_smem<NearestCodes::Table>();
  table.fill(code);
  const NearestCodes nearest(table);
  for (std::int64_t i = thread_index(); i < vectors; i += kThreads) {
    float vector[kVecSize];
    for (int j = 0; j < kVecSize; ++j) vector[j] = t[kVecSize * i + j];
    codes[i] = nearest.codes_of_vec8(vector);
  }
}

std::int64_t wrong_codes(const char* name, const float* code, std::vector<float> t) {
  while (t.size() % kVecSize != 0) t.push_back(0.0f);
  const auto vectors = static_cast<std::int64_t>(t.size()) / kVecSize;
  const Managed<float> code_on_device(code, code + 16), t_on_device(t.begin(), t.end());
  Managed<std::uint32_t> codes(t.size() / kVecSize);
  launch<encode_kernel>({1, kThreads, sizeof(NearestCodes::Table)}, Stream{}, code_on_device.data(), t_on_device.data(),
                        vectors, codes.data());
  const SortedCodebook sorted = sort_codebook(code);
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < t.size(); ++i) {
    const std::uint32_t byte = codes[i / kVecSize] >> (8 * (i % kVecSize / 2)) & 0xFF;
    const std::uint32_t found = i % 2 == 0 ? byte >> 4 : byte & 15, expected = nearest_code(sorted, t[i]);
    if (found != expected && ++wrong <= 5)
      std::printf("%s, %a: expected code %u, got %u\n", name, t[i], expected, found);
  }
  return wrong;
}

// Adds a float and those on both sides of it, as far as they can be scaled elements of a block.
void add_around(std::vector<float>& t, float value) {
  float below = value, above = value;
  for (int i = 0; i < 4; ++i) {
    for (const float v : {below, above}) {
      if (std::fabs(v) <= kLargest) t.push_back(v);
    }
    below = std::nextafter(below, -2.0f);
    above = std::nextafter(above, 2.0f);
  }
}

std::vector<float> borders(const float* code) {
  std::vector<float> t;
  for (const float midpoint : sort_codebook(code).midpoint) add_around(t, midpoint);
  for (int bucket = 0; bucket <= CodebookBuckets::kCount; ++bucket) {
    add_around(t, (static_cast<float>(bucket) - 16.5f) / CodebookBuckets::kPerUnit);
  }
  for (const float value : {0.0f, -1.0f, 1.0f, -kLargest, kLargest}) add_around(t, value);
  for (int c = 0; c < 16; ++c) add_around(t, code[c]);
  return t;
}

void add_16bit_floats(std::vector<float>& t) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    for (const float value : {to_f32(Bf16{half}), to_f32(F16{half})}) {
      if (std::fabs(value) <= kLargest) t.push_back(value);
    }
  }
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() {
  using namespace qlora_native::cuda_emulated;
  std::int64_t wrong = 0;
  const auto check_named = [&](const char* name, const std::array<float, 16>& code) {
    std::vector<float> t = borders(code.data());
    add_16bit_floats(t);
    wrong += wrong_codes(name, code.data(), t);
  };
  check_named("nf4", qlora_native::kNf4);
  check_named("fp4", qlora_native::kFp4);
  check_named("int4", qlora_native::kInt4);
  check_named("all equal", {});
  check_named("all in a bucket", {0.01f, 0.02f, 0.011f, 0.03f, 0.012f, -0.01f, -0.02f, -0.011f, 1e-45f, -1e-45f, 1e-38f,
                                  0.0f, -0.0f, 0.0f, 1e-20f, -1e-20f});
  check_named("beyond [-1, 1]", {-3e38f, -3e38f, -1e6f, -30.0f, -2.0f, -1.5f, -1.0f, -1.0f, 1.0f, 1.0f, 1.1f, 2.0f,
                                 1e5f, 3e38f, 3e38f, 3e38f});

  std::mt19937 random(0);
  std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
  for (int i = 0; i < 2000; ++i) {
    // The values are spread out, or close together around a point; some occur twice.
    const float center = unit(random), spread = std::exp2(-30.0f * static_cast<float>(i % 20) / 19.0f);
    std::array<float, 16> code;
    for (int c = 0; c < 16; ++c) {
      code[c] = c > 0 && random() % 8 == 0 ? code[random() % static_cast<unsigned>(c)]
                                           : (i % 2 == 0 ? 0.0f : center) + spread * unit(random);
    }
    wrong += wrong_codes("random", code.data(), borders(code.data()));
  }
  std::printf("%lld wrong codes\n", static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
