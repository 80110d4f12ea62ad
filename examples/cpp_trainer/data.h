// The text as windows of tokens: random windows of its first nine tenths for training, and the same windows of its last
// tenth at every evaluation.
#pragma once

#include <cstdint>
#include <filesystem>
#include <random>
#include <vector>

namespace trainer {

struct Batches {
  std::int64_t sequence, batch, held_out;  // tokens in a sequence, sequences in a batch, batches that are held out
};

class Data {
 public:
  // Reads a file of bytes, or of int32 if is_token_ids. Throws std::runtime_error if it is too short, or if a token is
  // not below `vocabulary`.
  Data(const std::filesystem::path& file, bool is_token_ids, std::int64_t vocabulary, const Batches& batches,
       std::uint32_t seed);

  void training_batch();
  void held_out_batch(std::int64_t index);
  std::int64_t held_out_batches() const { return held_out_batches_; }

  std::vector<std::int32_t> inputs, targets;  // the last batch, each [batch, sequence]

 private:
  template <class Start>
  void fill(Start&& start);

  std::int64_t sequence_, batch_, training_ = 0, held_out_batches_ = 0;
  std::mt19937 random_;
  std::vector<std::int32_t> tokens_;
};

}  // namespace trainer
