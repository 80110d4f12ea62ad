// The adapter as PEFT keeps it: adapter_model.safetensors and adapter_config.json.
#pragma once

#include <filesystem>
#include <string>

#include "llama.h"

namespace trainer {

// Writes the adapter whole or not at all, and replaces an earlier one. Throws std::runtime_error if it cannot be
// written.
void save_adapter(const std::filesystem::path& folder, Llama& model, const LoraConfig& lora, const std::string& base);

}  // namespace trainer
