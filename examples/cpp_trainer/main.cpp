// QLoRA fine-tuning in C++ only: a 4-bit Llama, adapters beside its linear layers, and 8-bit AdamW.
//
//   trainer --model FOLDER --data FILE --out FOLDER [--steps 200] ...
//
// The model's FOLDER has bitsandbytes' 4-bit format (python -m qlora_native quantize). FILE is a text in which each
// byte is a token, for a model with a vocabulary of 256. With --token-ids FILE holds int32 token ids, for any other
// model. The last tenth of FILE is held out.
//
// --device cuda runs the products, the adapters' gradients and the optimizer on a GPU. Attention, norms, head and loss
// run on the host, in memory that both share, and wait for the device before they use its results. Because of these
// waits the CPU is the default. A faster trainer would run these parts as kernels on the same stream, without waiting,
// and keep activations in bf16 for the tensor cores.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <new>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "adapter.h"
#include "data.h"
#include "device.h"
#include "llama.h"
#include "qlora_native/qlora_native.h"

namespace qn = qlora_native;

namespace {

struct Options {
  std::string model, data, out, logits, device = "cpu";
  bool token_ids = false, help = false;
  std::int64_t steps = 200, warmup = 10, every = 50;
  trainer::Batches batches{.sequence = 128, .batch = 4, .held_out = 8};
  double lr = 1e-3, weight_decay = 0.0, clip = 1.0;
  trainer::LoraConfig lora;
  std::uint32_t seed = 1;
};

constexpr const char* kUsage =
    "trainer --model FOLDER --data FILE --out FOLDER\n"
    "  --device cpu|cuda (cpu)\n"
    "  --token-ids        FILE holds int32 token ids, not text\n"
    "  --steps N (200)  --batch N (4)  --sequence TOKENS (128)  --held-out BATCHES (8)  --every STEPS (50)\n"
    "  --rank R (8)  --alpha A (16)  --dropout P (0)\n"
    "  --lr LR (1e-3)  --warmup STEPS (10)  --weight-decay W (0)  --clip NORM (1)  --seed N (1)\n"
    "  --help             print this\n"
    "  --logits FILE      the trained model's logits of the first held-out sequence, as safetensors\n";

constexpr const char* kNoMemory = "trainer: there is too little memory: try a smaller --batch or --sequence\n";

Options parse(int count, char** arguments) {
  Options o;
  const auto text = [](std::string& out) { return [&out](const char* value) { out = value; }; };
  const auto number = [](auto& out, double least, double most) {
    using Value = std::remove_reference_t<decltype(out)>;
    return [&out, least, most](const char* value) {
      char* end = nullptr;
      const double parsed = std::strtod(value, &end);
      const bool is_whole = parsed == std::trunc(parsed);
      if (*value == '\0' || *end != '\0' || !(parsed >= least && parsed <= most) ||
          (std::is_integral_v<Value> && !is_whole)) {
        std::ostringstream message;
        message << "expected " << (std::is_integral_v<Value> ? "a whole number" : "a number") << " from " << least
                << " to " << most << ", got " << value;
        throw std::invalid_argument(message.str());
      }
      out = static_cast<Value>(parsed);
    };
  };
  constexpr double kMany = 1e9, kLongest = 65536;  // limits that keep products of two or three sizes below 2^63
  const std::map<std::string, std::function<void(const char*)>> options = {
      {"--model", text(o.model)},
      {"--data", text(o.data)},
      {"--out", text(o.out)},
      {"--logits", text(o.logits)},
      {"--device", text(o.device)},
      {"--steps", number(o.steps, 1, kMany)},
      {"--batch", number(o.batches.batch, 1, kLongest)},
      {"--sequence", number(o.batches.sequence, 1, kLongest)},
      {"--held-out", number(o.batches.held_out, 1, kLongest)},
      {"--every", number(o.every, 1, kMany)},
      {"--rank", number(o.lora.rank, 1, kLongest)},
      {"--alpha", number(o.lora.alpha, 0, kMany)},
      {"--dropout", number(o.lora.dropout, 0, 0.999)},
      {"--lr", number(o.lr, 0, kMany)},
      {"--warmup", number(o.warmup, 0, kMany)},
      {"--weight-decay", number(o.weight_decay, 0, kMany)},
      {"--clip", number(o.clip, 0, kMany)},
      {"--seed", number(o.seed, 0, std::numeric_limits<std::uint32_t>::max())},
  };
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--help" || name == "-h") {
      o.help = true;
      return o;
    }
    if (name == "--token-ids") {
      o.token_ids = true;
      continue;
    }
    const auto option = options.find(name);
    if (option == options.end()) throw std::invalid_argument("unknown option " + name);
    if (++i == count) throw std::invalid_argument(name + ": expected a value");
    try {
      option->second(arguments[i]);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(name + ": " + error.what());
    }
  }
  for (const auto& [name, value] : {std::pair{"--model", &o.model}, {"--data", &o.data}, {"--out", &o.out}})
    if (value->empty()) throw std::invalid_argument(std::string(name) + " is missing");
  return o;
}

class Trainer {
 public:
  explicit Trainer(const Options& o)
      : o_(o),
        model_(o.model, o.lora, o.seed),
        data_(o.data, o.token_ids, model_.config().vocabulary, o.batches, o.seed) {
    for (trainer::QloraLinear* linear : model_.linears())
      for (trainer::Parameter* parameter : {&linear->a(), &linear->b()}) {
        optimizer_.push_back(parameter->optimizer_view());
        parameters_.push_back(parameter);
        trainable_ += static_cast<std::int64_t>(parameter->value.size());
      }
  }

  void run() {
    std::printf("qlora_native %s on %s; %lld trainable parameters\n", qn::version().c_str(),
                trainer::device().name().c_str(), static_cast<long long>(trainable_));
    std::fflush(stdout);
    std::printf("held-out loss before: %.4f\n", held_out_loss());
    std::fflush(stdout);
    const bool terminal = isatty(STDOUT_FILENO) != 0;
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::seconds kBetweenLines(10);  // for a log file; a terminal shows every step on one line
    const auto start = Clock::now();
    auto last_line = start;
    double shown = 0.0;
    for (std::int64_t step = 1; step <= o_.steps; ++step) {
      const double loss = train(step);
      shown = step == 1 ? loss : 0.9 * shown + 0.1 * loss;
      const auto now = Clock::now();
      const std::chrono::duration<double> elapsed = now - start;
      const double rate = static_cast<double>(step * o_.batches.batch * o_.batches.sequence) / elapsed.count();
      const bool evaluate = step % o_.every == 0 && step != o_.steps;
      const bool is_due = step == 1 || now - last_line >= kBetweenLines;
      if (!terminal && !evaluate && !is_due) continue;
      last_line = now;
      std::printf("%sstep %lld/%lld  loss %.4f  %.0f tokens/s", terminal ? "\r" : "", static_cast<long long>(step),
                  static_cast<long long>(o_.steps), shown, rate);
      if (evaluate) std::printf("  held-out loss %.4f", held_out_loss());
      if (evaluate || !terminal) std::printf("\n");
      std::fflush(stdout);
    }
    std::printf("%sheld-out loss after: %.4f\n", terminal ? "\n" : "", held_out_loss());
    if (skipped_[0] > 0)
      std::printf("%lld steps skipped: a gradient was not finite\n", static_cast<long long>(skipped_[0]));
    trainer::save_adapter(o_.out, model_, o_.lora, o_.model);
    std::printf("adapter: %s\n", o_.out.c_str());
    if (!o_.logits.empty()) save_logits();
  }

 private:
  double train(std::int64_t step) {
    data_.training_batch();
    const std::span<float> logits = model_.forward(data_.inputs, o_.batches.sequence, static_cast<std::uint64_t>(step));
    const double loss = loss_of(logits);
    model_.backward(logits);
    scale_[0] = 1.0f;
    if (o_.clip > 0.0) {
      double squares = 0.0;
      for (const trainer::Parameter* parameter : parameters_)
        for (const float g : parameter->grad) squares += double{g} * double{g};
      scale_[0] = static_cast<float>(std::min(1.0, o_.clip / (std::sqrt(squares) + 1e-6)));
    }
    // The learning rate first rises linearly, then falls linearly to a tenth.
    const double progress = static_cast<double>(step) / static_cast<double>(o_.steps);
    const double warm = static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(o_.warmup, 1));
    const qn::Optimizer8bitGroup group{.lr = o_.lr * std::min(warm, 1.0 - 0.9 * progress),
                                       .weight_decay = o_.weight_decay};
    qn::optimizer_8bit_step({.tensors = optimizer_.data(),
                             .count = static_cast<std::int64_t>(optimizer_.size()),
                             .groups = &group,
                             .group_count = 1,
                             .inv_scale = scale_.data(),
                             .skipped = skipped_.data()},
                            trainer::device().stream());
    trainer::device().synchronize();
    return loss;
  }

  double held_out_loss() {
    double total = 0.0;
    for (std::int64_t i = 0; i < data_.held_out_batches(); ++i) {
      data_.held_out_batch(i);
      total += loss_of(model_.forward(data_.inputs, o_.batches.sequence, 0));
    }
    return total / static_cast<double>(data_.held_out_batches());
  }

  // Replaces the logits by their gradient.
  double loss_of(std::span<float> logits) {
    return trainer::cross_entropy(logits.data(), data_.targets.data(), static_cast<std::int64_t>(data_.targets.size()),
                                  model_.config().vocabulary);
  }

  void save_logits() {
    const std::int64_t length = o_.batches.sequence;
    data_.held_out_batch(0);
    const std::span<const std::int32_t> ids = std::span(data_.inputs).first(static_cast<std::size_t>(length));
    const std::span<float> logits = model_.forward(ids, length, 0);
    trainer::NewFile file(o_.logits);
    trainer::write_safetensors(
        file, {{"input_ids", {"I32", {1, length}, std::as_bytes(ids).data(), ids.size_bytes()}},
               {"logits",
                {"F32", {1, length, model_.config().vocabulary}, std::as_bytes(logits).data(), logits.size_bytes()}}});
    file.publish();
  }

  const Options& o_;
  trainer::Llama model_;
  trainer::Data data_;
  std::vector<qn::Optimizer8bitTensor> optimizer_;
  std::vector<const trainer::Parameter*> parameters_;
  std::int64_t trainable_ = 0;
  trainer::Floats scale_ = trainer::Floats(1);  // the factor of the gradients
  trainer::Shared<std::int64_t> skipped_ = trainer::Shared<std::int64_t>(1);
};

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = parse(count, arguments);
    if (options.help) {
      std::printf("%s", kUsage);
      return 0;
    }
    trainer::use_device(options.device);
    Trainer(options).run();
  } catch (const std::invalid_argument& error) {  // qlora_native::Error is one
    std::fprintf(stderr, "trainer: %s\n%s", error.what(), kUsage);
    return 2;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "%s", kNoMemory);
    return 1;
  } catch (const std::length_error&) {  // a vector would be larger than any memory
    std::fprintf(stderr, "%s", kNoMemory);
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "trainer: %s\n", error.what());
    return 1;
  }
  return 0;
}
