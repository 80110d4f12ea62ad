// Reads a config.json, a byte 0 and a safetensors file from the input, with the readers of the C++ trainer. A model
// that they accept takes a step, in which no size may lead out of its memory.
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "fuzz.h"
#include "json.h"
#include "llama.h"
#include "safetensors.h"

namespace {

void take_step(const trainer::LlamaConfig& config, const trainer::Checkpoint& checkpoint) {
  trainer::Llama model(config, checkpoint, {.rank = 2}, 1);
  const auto last = static_cast<std::int32_t>(config.vocabulary - 1);
  const std::vector<std::int32_t> tokens = {0, last, last, 0, 0, last};  // two sequences
  const std::span<float> logits = model.forward(tokens, 3, 1);
  trainer::cross_entropy(logits.data(), tokens.data(), static_cast<std::int64_t>(tokens.size()), config.vocabulary);
  model.backward(logits);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t end = std::min(input.find('\0'), size);
  // Memory of their own, with nothing beside them.
  const std::vector<char> text(input.begin(), input.begin() + static_cast<std::ptrdiff_t>(end));
  const std::string_view after = input.substr(std::min(end + 1, size));
  const std::vector<char> file(after.begin(), after.end());
  try {
    const auto json = trainer::Json::parse({text.data(), text.size()}, "config.json");
    const auto config = trainer::LlamaConfig::parse(json);
    const trainer::Checkpoint checkpoint({file.data(), file.size()}, "model.safetensors");
    take_step(config, checkpoint);
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    outcome = text.substr(text.find_last_of(':', text.find(", got ")) + 1);  // tensors may have any name
  }
  return 0;
}
