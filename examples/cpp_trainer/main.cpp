// QLoRA fine-tuning in C++ alone: a 4-bit Llama, adapters beside its linear layers, 8-bit AdamW.
//
//   trainer --model FOLDER --data FILE --out FOLDER [--steps 200] ...
//
// FOLDER holds a model in bitsandbytes' 4-bit format (python -m qlora_native quantize). FILE is a text, one token a
// byte, for a model with a vocabulary of 256; or with --token-ids the text as int32 token ids, for any other. Its last
// tenth is held out.
//
// --device cuda: the products, the adapters' gradients and the optimizer run on a GPU. Attention, norms, head and loss
// stay on the host, in the memory that both see, and wait for the device where they use what it wrote. A faster trainer
// goes on from there: those parts as kernels on the same stream, which ends the waiting, and activations in bf16, whose
// products are for the tensor cores. So the cpu is the default.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "adapter.h"
#include "device.h"
#include "llama.h"
#include "qlora_native/qlora_native.h"

namespace qn = qlora_native;

namespace {

struct Options {
  std::string model, data, out, logits, device = "cpu";
  bool token_ids = false;
  std::int64_t steps = 200, sequence = 128, batch = 4, warmup = 10, held_out_batches = 8, every = 50;
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
    "  --logits FILE      the trained model's logits of the first held-out sequence, as safetensors\n";

Options parse(int count, char** arguments) {
  Options o;
  const auto text = [](std::string& out) { return [&out](const char* value) { out = value; }; };
  const auto number = [](auto& out, double least) {
    return [&out, least](const char* value) {
      char* end = nullptr;
      const double parsed = std::strtod(value, &end);
      if (*value == '\0' || *end != '\0' || !(parsed >= least))
        throw std::invalid_argument("expected a number of at least " + std::to_string(least) + ", got " + value);
      out = static_cast<std::remove_reference_t<decltype(out)>>(parsed);
    };
  };
  const std::map<std::string, std::function<void(const char*)>> options = {
      {"--model", text(o.model)},
      {"--data", text(o.data)},
      {"--out", text(o.out)},
      {"--logits", text(o.logits)},
      {"--device", text(o.device)},
      {"--steps", number(o.steps, 1)},
      {"--batch", number(o.batch, 1)},
      {"--sequence", number(o.sequence, 1)},
      {"--held-out", number(o.held_out_batches, 1)},
      {"--every", number(o.every, 1)},
      {"--rank", number(o.lora.rank, 1)},
      {"--alpha", number(o.lora.alpha, 0)},
      {"--dropout", number(o.lora.dropout, 0)},
      {"--lr", number(o.lr, 0)},
      {"--warmup", number(o.warmup, 0)},
      {"--weight-decay", number(o.weight_decay, 0)},
      {"--clip", number(o.clip, 0)},
      {"--seed", number(o.seed, 0)},
  };
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
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

// Windows of a text: random ones of its first nine tenths, and the same ones of its last tenth every time.
class Data {
 public:
  Data(const Options& o) : sequence_(o.sequence), batch_(o.batch), random_(o.seed) {
    const trainer::MappedFile file(o.data);
    const std::size_t width = o.token_ids ? sizeof(std::int32_t) : 1;
    tokens_.resize(file.size() / width);
    if (o.token_ids)
      std::memcpy(tokens_.data(), file.data(), tokens_.size() * width);
    else
      std::transform(file.data(), file.data() + tokens_.size(), tokens_.begin(),
                     [](std::byte byte) { return std::to_integer<std::int32_t>(byte); });
    training_ = static_cast<std::int64_t>(tokens_.size()) * 9 / 10;
    const std::int64_t held_out = static_cast<std::int64_t>(tokens_.size()) - training_;
    if (held_out < sequence_ + 1)
      throw std::runtime_error(o.data + ": too short: a tenth of it must hold " + std::to_string(sequence_ + 1) +
                               " tokens");
    held_out_batches_ = std::min(o.held_out_batches, std::max<std::int64_t>(1, held_out / (batch_ * (sequence_ + 1))));
  }

  // Inputs and targets, each [batch, sequence].
  void training_batch() {
    fill([&](std::int64_t) {
      return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(training_ - sequence_));
    });
  }
  void held_out_batch(std::int64_t index) {
    const std::int64_t windows = (static_cast<std::int64_t>(tokens_.size()) - training_) / (sequence_ + 1);
    fill([&](std::int64_t i) { return training_ + (index * batch_ + i) % windows * (sequence_ + 1); });
  }
  std::int64_t held_out_batches() const { return held_out_batches_; }

  std::vector<std::int32_t> inputs, targets;

 private:
  template <class Start>
  void fill(Start&& start) {
    inputs.clear();
    targets.clear();
    for (std::int64_t i = 0; i < batch_; ++i) {
      const auto first = tokens_.begin() + start(i);
      inputs.insert(inputs.end(), first, first + sequence_);
      targets.insert(targets.end(), first + 1, first + 1 + sequence_);
    }
  }

  std::int64_t sequence_, batch_, training_ = 0, held_out_batches_ = 0;
  std::mt19937 random_;
  std::vector<std::int32_t> tokens_;
};

class Trainer {
 public:
  explicit Trainer(const Options& o) : o_(o), model_(o.model, o.lora, o.seed), data_(o) {
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
    std::printf("held-out loss before: %.4f\n", held_out_loss());
    const bool terminal = isatty(STDOUT_FILENO) != 0;
    const auto start = std::chrono::steady_clock::now();
    double shown = 0.0;
    for (std::int64_t step = 1; step <= o_.steps; ++step) {
      const double loss = train(step);
      shown = step == 1 ? loss : 0.9 * shown + 0.1 * loss;
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      const double rate = static_cast<double>(step * o_.batch * o_.sequence) / elapsed.count();
      const bool evaluate = step % o_.every == 0 && step != o_.steps;
      if (terminal || evaluate)
        std::printf("%sstep %lld/%lld  loss %.4f  %.0f tokens/s", terminal ? "\r" : "", static_cast<long long>(step),
                    static_cast<long long>(o_.steps), shown, rate);
      if (evaluate) std::printf("  held-out loss %.4f\n", held_out_loss());
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
    const std::span<float> logits = model_.forward(data_.inputs, o_.sequence, static_cast<std::uint64_t>(step));
    const double loss = loss_of(logits);
    model_.backward(logits);
    scale_[0] = 1.0f;
    if (o_.clip > 0.0) {
      double squares = 0.0;
      for (const trainer::Parameter* parameter : parameters_)
        for (const float g : parameter->grad) squares += double{g} * double{g};
      scale_[0] = static_cast<float>(std::min(1.0, o_.clip / (std::sqrt(squares) + 1e-6)));
    }
    // A linear warm-up, then linearly down to a tenth.
    const double progress = static_cast<double>(step) / static_cast<double>(o_.steps);
    const double warm = static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(o_.warmup, 1));
    const qn::AdamW8bitGroup group{.lr = o_.lr * std::min(warm, 1.0 - 0.9 * progress), .weight_decay = o_.weight_decay};
    qn::adamw_8bit_step({.tensors = optimizer_.data(),
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
      total += loss_of(model_.forward(data_.inputs, o_.sequence, 0));
    }
    return total / static_cast<double>(data_.held_out_batches());
  }

  // The logits become the gradient.
  double loss_of(std::span<float> logits) {
    return trainer::cross_entropy(logits.data(), data_.targets.data(), static_cast<std::int64_t>(data_.targets.size()),
                                  model_.config().vocabulary);
  }

  void save_logits() {
    data_.held_out_batch(0);
    const std::span<const std::int32_t> ids = std::span(data_.inputs).first(static_cast<std::size_t>(o_.sequence));
    const std::span<float> logits = model_.forward(ids, o_.sequence, 0);
    trainer::write_safetensors(
        o_.logits,
        {{"input_ids", {"I32", {1, o_.sequence}, std::as_bytes(ids).data(), ids.size_bytes()}},
         {"logits",
          {"F32", {1, o_.sequence, model_.config().vocabulary}, std::as_bytes(logits).data(), logits.size_bytes()}}});
  }

  const Options& o_;
  trainer::Llama model_;
  Data data_;
  std::vector<qn::AdamW8bitTensor> optimizer_;
  std::vector<const trainer::Parameter*> parameters_;
  std::int64_t trainable_ = 0;
  trainer::Floats scale_ = trainer::Floats(1);  // of the gradients
  trainer::Shared<std::int64_t> skipped_ = trainer::Shared<std::int64_t>(1);
};

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = parse(count, arguments);
    trainer::use_device(options.device);
    Trainer(options).run();
  } catch (const std::invalid_argument& error) {  // qlora_native::Error is one
    std::fprintf(stderr, "trainer: %s\n%s", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "trainer: %s\n", error.what());
    return 1;
  }
  return 0;
}
