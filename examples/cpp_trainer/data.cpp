#include "data.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

#include "files.h"

namespace trainer {

Data::Data(const std::filesystem::path& path, bool is_token_ids, std::int64_t vocabulary, const Batches& batches,
           std::uint32_t seed)
    : sequence_(batches.sequence), batch_(batches.batch), random_(seed) {
  const MappedFile file(path);
  const auto expect = [&](bool ok, const std::string& what) {
    if (!ok) throw std::runtime_error(path.string() + ": " + what);
  };
  constexpr std::int64_t kBytes = 256;
  expect(is_token_ids || vocabulary == kBytes,
         "a text's tokens are its bytes, for a vocabulary of 256, and the model's is " + std::to_string(vocabulary) +
             ": tokenize it, and give --token-ids");
  const std::size_t width = is_token_ids ? sizeof(std::int32_t) : 1;
  expect(file.size() % width == 0, "expected int32 token ids, got " + std::to_string(file.size()) + " bytes");
  tokens_.resize(file.size() / width);
  if (is_token_ids)
    std::memcpy(tokens_.data(), file.data(), file.size());
  else
    std::transform(file.data(), file.data() + file.size(), tokens_.begin(),
                   [](std::byte byte) { return std::to_integer<std::int32_t>(byte); });
  const auto outside = std::find_if(tokens_.begin(), tokens_.end(),
                                    [&](std::int32_t token) { return token < 0 || token >= vocabulary; });
  if (outside != tokens_.end())
    expect(false, "token " + std::to_string(*outside) + " at " + std::to_string(outside - tokens_.begin()) +
                      " is outside the model's vocabulary of " + std::to_string(vocabulary));
  training_ = static_cast<std::int64_t>(tokens_.size()) * 9 / 10;
  const std::int64_t held_out = static_cast<std::int64_t>(tokens_.size()) - training_;
  expect(held_out >= sequence_ + 1, "too short: a tenth of it must hold " + std::to_string(sequence_ + 1) + " tokens");
  held_out_batches_ = std::min(batches.held_out, std::max<std::int64_t>(1, held_out / (batch_ * (sequence_ + 1))));
}

void Data::training_batch() {
  fill([&](std::int64_t) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(training_ - sequence_));
  });
}

void Data::held_out_batch(std::int64_t index) {
  const std::int64_t windows = (static_cast<std::int64_t>(tokens_.size()) - training_) / (sequence_ + 1);
  fill([&](std::int64_t i) { return training_ + (index * batch_ + i) % windows * (sequence_ + 1); });
}

template <class Start>
void Data::fill(Start&& start) {
  inputs.clear();
  targets.clear();
  for (std::int64_t i = 0; i < batch_; ++i) {
    const auto first = tokens_.begin() + start(i);
    inputs.insert(inputs.end(), first, first + sequence_);
    targets.insert(targets.end(), first + 1, first + 1 + sequence_);
  }
}

}  // namespace trainer
