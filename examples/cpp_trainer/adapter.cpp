#include "adapter.h"

#include "files.h"
#include "json.h"
#include "safetensors.h"

namespace trainer {
namespace {

Tensor tensor_of(const Floats& values, std::int64_t rows) {
  return {.dtype = "F32",
          .shape = {rows, static_cast<std::int64_t>(values.size()) / rows},
          .data = reinterpret_cast<const std::byte*>(values.data()),
          .bytes = values.size() * sizeof(float)};
}

}  // namespace

void save_adapter(const std::filesystem::path& folder, Llama& model, const LoraConfig& lora, const std::string& base) {
  std::map<std::string, Tensor> tensors;
  for (QloraLinear* linear : model.linears()) {
    const std::string prefix = "base_model.model." + linear->name();
    tensors[prefix + ".lora_A.weight"] = tensor_of(linear->a().value, lora.rank);
    tensors[prefix + ".lora_B.weight"] = tensor_of(linear->b().value, linear->out());
  }
  std::filesystem::create_directories(folder);
  NewFile weights(folder / "adapter_model.safetensors"), config(folder / "adapter_config.json");
  write_safetensors(weights, tensors);
  config.write(
      "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n  \"bias\": \"none\",\n"
      "  \"base_model_name_or_path\": " +
      json_string(base) + ",\n  \"r\": " + std::to_string(lora.rank) +
      ",\n  \"lora_alpha\": " + std::to_string(lora.alpha) + ",\n  \"lora_dropout\": " + std::to_string(lora.dropout) +
      ",\n  \"target_modules\": [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"gate_proj\", \"up_proj\", "
      "\"down_proj\"]\n}\n");
  // An earlier adapter stays until both new files are on the disk. Then its config is removed first, and the new config
  // is published last. PEFT does not take a folder without a config for an adapter, so an interrupted run never leaves
  // a mixture of two adapters.
  weights.sync();
  config.sync();
  remove_file(folder / "adapter_config.json");
  weights.publish();
  config.publish();
}

}  // namespace trainer
