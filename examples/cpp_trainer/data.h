// The text that is trained on, as windows of tokens: random ones of its first nine tenths, and the same ones of its
// last tenth every time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <random>
#include <vector>

namespace trainer {

struct Batches {
  std::int64_t sequence, batch, held_out;  // tokens of a sequence, sequences of a batch, batches that are held out
};

class Data {
 public:
  // A file of bytes, or with is_token_ids of int32. Throws std::runtime_error where it is too short, or where a token
  // is not below `vocabulary`.
  Data(const std::filesystem::path& file, bool is_token_ids, std::int64_t vocabulary, const Batches& batches,
       std::uint32_t seed);

  void training_batch();
  void held_out_batch(std::int64_t index);
  std::int64_t held_out_batches() const { return held_out_batches_; }

  std::vector<std::int32_t> inputs, targets;  // of the last batch, each [batch, sequence]

 private:
  template <class Start>
  void fill(Start&& start);

  std::int64_t sequence_, batch_, training_ = 0, held_out_batches_ = 0;
  std::mt19937 random_;
  std::vector<std::int32_t> tokens_;
};

}  // namespace trainer
