// QLoRA fine-tuning in C++ alone: a Llama in 4 bits, adapters beside its linear layers, and 8-bit AdamW.
//
//   trainer MODEL TOKENS OUT [--steps 200] [--lr 1e-3] ...
//
// MODEL is a folder of transformers, in 16 or 32 bits: config.json and *.safetensors. TOKENS is a file of int32 token
// ids, whose last tenth is held out. A line of Python makes it of a text:
//
//   numpy.array(AutoTokenizer.from_pretrained(MODEL)(text).input_ids, dtype="int32").tofile(TOKENS)
//
// OUT is a new folder for the adapter, which PEFT loads.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "llama.h"

namespace {

constexpr std::int64_t kHeldOutBatches = 8, kStepsPerLine = 10;
constexpr double kMaxGradientNorm = 1.0;

struct Option {
  double value, min, max;
  bool is_whole = true;
};
using Options = std::map<std::string, Option>;

constexpr double kMany = 1e9, kMaxSize = 65536;  // so that products of two or three sizes stay below 2^63
const Options kDefaults = {{"--steps", {200, 1, kMany}},       {"--batch", {4, 1, kMaxSize}},
                           {"--sequence", {128, 1, kMaxSize}}, {"--rank", {8, 1, kMaxSize}},
                           {"--alpha", {16, 0, kMany, false}}, {"--dropout", {0, 0, 0.999, false}},
                           {"--lr", {1e-3, 0, kMany, false}},  {"--seed", {1, 0, 4294967295}}};

Options parse(int count, char** arguments) {
  Options options = kDefaults;
  for (int i = 0; i < count; i += 2) {
    const std::string name = arguments[i], text = i + 1 < count ? arguments[i + 1] : "";
    if (!options.contains(name)) throw std::invalid_argument("unknown option " + name);
    auto& [value, min, max, is_whole] = options.at(name);
    char* end = nullptr;
    value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0' || !(value >= min && value <= max) || (is_whole && value != std::trunc(value)))
      throw std::invalid_argument(name + ": expected a " + (is_whole ? "whole " : "") + "number from " + text_of(min) +
                                  " to " + text_of(max) + ", got " + text);
  }
  return options;
}

std::vector<std::int32_t> read_tokens(const std::string& path, std::int64_t vocabulary) {
  const std::int64_t bytes = size_of_file(path);
  if (bytes % 4 != 0) fail(path, "expected int32 token ids, got " + std::to_string(bytes) + " bytes");
  auto tokens = read_file<std::int32_t>(path, 0, bytes / 4);
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocabulary)
      fail(path, "expected tokens below the model's vocabulary of " + std::to_string(vocabulary) + ", got " +
                     std::to_string(tokens[i]) + " at " + std::to_string(i));
  return tokens;
}

void write(const std::filesystem::path& path, const std::string& contents) {
  std::ofstream file(path, std::ios::binary);
  file << contents << std::flush;
  if (!file) fail(path.string(), "cannot be written");
}

// PEFT's files, in a folder that appears when they are complete.
void save_adapter(const std::filesystem::path& out, const std::string& base, const LoraConfig& lora, Llama& model) {
  Json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const Parameter* parameter : model.parameters()) {
    const Matrix& matrix = parameter->value;
    const std::size_t begin = data.size();
    data.append(reinterpret_cast<const char*>(matrix.row(0)), matrix.values.size() * sizeof(float));
    header["base_model.model." + parameter->name] = {
        {"dtype", "F32"}, {"shape", {matrix.rows, matrix.cols}}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  const Json config = {
      {"peft_type", "LORA"},
      {"task_type", "CAUSAL_LM"},
      {"base_model_name_or_path", base},
      {"r", lora.rank},
      {"lora_alpha", lora.alpha},
      {"lora_dropout", lora.dropout},
      {"target_modules", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}}};
  const std::filesystem::path partial = out.string() + ".partial";
  std::filesystem::create_directories(partial);
  write(partial / "adapter_model.safetensors", std::string(reinterpret_cast<const char*>(&length), 8) + text + data);
  write(partial / "adapter_config.json", config.dump(2) + "\n");
  std::filesystem::rename(partial, out);
}

void train(const std::string& folder, const std::string& data, const std::filesystem::path& out, const Options& o) {
  const auto integer = [&](const char* name) { return static_cast<std::int64_t>(o.at(name).value); };
  const std::int64_t steps = integer("--steps"), batch = integer("--batch"), length = integer("--sequence");
  const LoraConfig lora{integer("--rank"), float(o.at("--alpha").value), float(o.at("--dropout").value)};
  if (std::filesystem::exists(out)) fail(out.string(), "expected a new folder, it exists");
  std::mt19937 random(static_cast<std::uint32_t>(integer("--seed")));
  Llama model(folder, lora, length, random());
  const std::vector<std::int32_t> tokens = read_tokens(data, model.config.vocabulary);
  const std::int64_t count = static_cast<std::int64_t>(tokens.size()), training = count * 9 / 10;
  const std::int64_t windows = (count - training) / (length + 1);  // held out
  if (windows < 1) fail(data, "expected a tenth of " + std::to_string(length + 1) + " tokens or more");

  // The loss of a batch of windows of tokens, which begin at start(0), start(1), ...
  const auto loss_of = [&](auto start, std::uint64_t seed) {
    std::vector<std::int32_t> inputs, targets;
    for (std::int64_t i = 0; i < batch; ++i) {
      const auto first = tokens.begin() + start(i);
      inputs.insert(inputs.end(), first, first + length);
      targets.insert(targets.end(), first + 1, first + 1 + length);
    }
    return model.loss(inputs, targets, seed);
  };
  const auto print_held_out_loss = [&](const char* when) {
    double total = 0.0;
    for (std::int64_t j = 0; j < kHeldOutBatches; ++j)
      total += loss_of([&](std::int64_t i) { return training + (j * batch + i) % windows * (length + 1); }, 0);
    std::printf("held-out loss %s: %.6f\n", when, total / kHeldOutBatches);
  };

  std::vector<qn::Optimizer8bitTensor> tensors;
  for (Parameter* parameter : model.parameters()) tensors.push_back(parameter->optimizer_view());
  std::int64_t skipped = 0;  // steps, because a gradient was not finite
  const qn::Optimizer8bitGroup group{.lr = o.at("--lr").value, .weight_decay = 0.0};
  std::printf("qlora_native %s on %s\n", qn::version().c_str(), qn::current_isa().c_str());
  print_held_out_loss("before");
  const auto started = std::chrono::steady_clock::now();
  for (std::int64_t step = 1; step <= steps; ++step) {
    const auto random_start = [&](std::int64_t) {
      return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(training - length));
    };
    const double loss = loss_of(random_start, static_cast<std::uint64_t>(step));
    model.backward();
    double squares = 0.0;
    for (const Parameter* parameter : model.parameters())
      for (const float g : parameter->grad.values) squares += double{g} * double{g};
    const auto scale = static_cast<float>(std::min(1.0, kMaxGradientNorm / std::sqrt(squares)));
    qn::optimizer_8bit_step({.tensors = tensors.data(),
                             .count = static_cast<std::int64_t>(tensors.size()),
                             .groups = &group,
                             .group_count = 1,
                             .inv_scale = &scale,
                             .skipped = &skipped});
    if (skipped > 0) fail("step " + std::to_string(step), "the gradient is not finite; try a lower --lr");
    if (step != 1 && step % kStepsPerLine != 0) continue;
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - started;
    std::printf("step %d of %d: loss %.4f, %.0f tokens/s\n", int(step), int(steps), loss,
                double(step * batch * length) / elapsed.count());
  }
  print_held_out_loss("after");
  save_adapter(out, folder, lora, model);
  std::printf("adapter: %s\n", out.c_str());
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 4) throw std::invalid_argument("expected MODEL TOKENS OUT [--steps 200] ...; main.cpp has all options");
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);   // a log file gets each line at once
  const std::filesystem::path out = arguments[3];  // without a name where it ends in a slash
  train(arguments[1], arguments[2], out.has_filename() ? out : out.parent_path(), parse(count - 4, arguments + 4));
} catch (const std::bad_alloc&) {
  std::fprintf(stderr, "trainer: there is too little memory; try a smaller --batch or --sequence\n");
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "trainer: %s\n", error.what());
  return 1;
}
