// Guards PagedArena, with the emulator's driver: it calls the driver in the right order, and a paged step gives the
// same bits as a step in ordinary memory. In this driver work runs only when something waits for it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator/emulated_driver.h"
#include "paged/arena.h"
#include "parameter.h"
#include "qlora_native/qlora_native.h"

using qn::cuda_emulated::EmulatedDriver;

namespace {

std::unique_ptr<qn::PagedArena> make_arena(const std::vector<qn::PagedState>& states, EmulatedDriver::Options& driver,
                                           const qn::PagedOptions& options) {
  return qn::PagedArena::Impl::make_arena(std::make_unique<EmulatedDriver>(&driver), states, options);
}

// ---- training of parameters whose state lies in ordinary memory or in arenas ----

class Training {
 public:
  // states[group] describes the parameters of a group.
  explicit Training(const std::vector<std::vector<qn::PagedState>>& states) : algorithm_(states[0][0].algorithm) {
    for (const auto& group : states)
      for (const qn::PagedState& state : group)
        parameters_.emplace_back(state.elements, DType::f32, DType::f32, state.in_8_bits);
    for (std::size_t group = 0, i = 0; group < states.size(); ++group)
      for (std::size_t k = 0; k < states[group].size(); ++k)
        tensors_.push_back(parameters_[i++].view(static_cast<int>(group)));
    for (qn::Optimizer8bitTensor& tensor : tensors_)
      for (int k = qn::moments_of(algorithm_); k < qn::kMaxMoments; ++k)
        state_of(tensor, k) = absmax_of(tensor, k) = nullptr;
  }

  // From now on the state of a group's parameters lies in the arena.
  void use(const qn::PagedArena& arena, int group = 0) {
    std::size_t index = 0;
    for (qn::Optimizer8bitTensor& tensor : tensors_) {
      if (tensor.group == group) arena.place(index++, tensor);
    }
  }

  // The same for state1 and absmax1 only.
  void use_first_moments(const qn::PagedArena& arena) {
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      qn::Optimizer8bitTensor placed;
      arena.place(i, placed);
      tensors_[i].state1 = placed.state1;
      tensors_[i].absmax1 = placed.absmax1;
    }
  }

  // `without_gradient` is the index of a parameter.
  void step(std::size_t without_gradient = kNone, bool unusable = false) {
    const std::vector<qn::Optimizer8bitGroup> groups = {{.lr = 1e-2}, {.lr = 1e-3}};
    std::vector<qn::Optimizer8bitTensor> tensors;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      parameters_[i].grad.fill(random_, 1.0f);
      if (i != without_gradient) tensors.push_back(tensors_[i]);
    }
    Tensor& last = parameters_.back().grad;
    if (unusable) last.set(0, last.cols() - 1, 1e30f);
    qn::optimizer_8bit_step({.tensors = tensors.data(),
                             .count = static_cast<std::int64_t>(tensors.size()),
                             .groups = groups.data(),
                             .group_count = 2,
                             .skipped = &skipped_,
                             .algorithm = algorithm_});
  }

  bool same_bits(const Training& other) const {
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      const Parameter &a = parameters_[i], &b = other.parameters_[i];
      const auto same = [](const void* x, const void* y, std::size_t n) { return n == 0 || std::memcmp(x, y, n) == 0; };
      if (a.param.bytes() != b.param.bytes() || a.step != b.step) return false;
      const std::size_t state_bytes = a.moments[0].size() * (a.in_8_bits ? 1 : 4);
      const std::size_t absmax_bytes = a.in_8_bits ? 4 * a.absmax[0].size() : 0;
      for (int k = 0; k < qn::moments_of(algorithm_); ++k) {
        if (!same(state_of(tensors_[i], k), state_of(other.tensors_[i], k), state_bytes)) return false;
        if (!same(absmax_of(tensors_[i], k), absmax_of(other.tensors_[i], k), absmax_bytes)) return false;
      }
    }
    return skipped_ == other.skipped_;
  }

  static constexpr std::size_t kNone = ~std::size_t{0};

 private:
  qn::Algorithm algorithm_;
  Random random_{1};
  std::vector<Parameter> parameters_;
  std::vector<qn::Optimizer8bitTensor> tensors_;
  std::int64_t skipped_ = 0;
};

const std::vector<qn::PagedState> kMixed = {{300}, {0}, {5000}, {17, false}, {1}, {9000, false}, {256}, {40'000}};

std::vector<qn::PagedState> of(qn::Algorithm algorithm, std::vector<qn::PagedState> states) {
  for (qn::PagedState& state : states) state.algorithm = algorithm;
  return states;
}

// ---- layout ----

// The slow moment of ademamix directly follows the fast one, as in bitsandbytes' tensors.
void expect_disjoint_arrays(qn::Algorithm algorithm, std::size_t segment_bytes) {
  EmulatedDriver::Options driver;
  const auto arena = make_arena(of(algorithm, kMixed), driver, {.segment_bytes = segment_bytes});
  const bool has_slow_moment = algorithm == qn::Algorithm::ademamix;
  const int moments = qn::moments_of(algorithm);
  const std::byte* end = arena->data();
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < kMixed.size(); ++i) {  // in the order of the update
    qn::Optimizer8bitTensor t;
    arena->place(i, t);
    const bool in_8_bits = kMixed[i].in_8_bits;
    const auto elements = static_cast<std::size_t>(kMixed[i].elements);
    const std::size_t state_bytes = elements * (in_8_bits ? 1 : 4), absmax_bytes = (elements + 255) / 256 * 4;
    const auto expect_array = [&](const void* array, std::size_t size) {
      const auto* const begin = static_cast<const std::byte*>(array);
      EXPECT(begin >= end && (begin - arena->data()) % 256 == 0);
      EXPECT(std::all_of(begin, begin + size, [](std::byte b) { return b == std::byte{0}; }));
      end = begin + size;
      bytes += size;
    };
    for (int k = 0; k < qn::kMaxMoments; ++k) {
      EXPECT((state_of(t, k) != nullptr) == (k < moments));
      EXPECT((absmax_of(t, k) != nullptr) == (k < moments && in_8_bits));
    }
    expect_array(t.state1, has_slow_moment ? 2 * state_bytes : state_bytes);
    EXPECT(!has_slow_moment || t.state3 == static_cast<std::byte*>(t.state1) + state_bytes);
    if (moments > 1) expect_array(t.state2, state_bytes);
    if (!in_8_bits) continue;
    expect_array(t.absmax1, has_slow_moment ? 2 * absmax_bytes : absmax_bytes);
    EXPECT(!has_slow_moment || t.absmax3 == t.absmax1 + absmax_bytes / 4);
    if (moments > 1) expect_array(t.absmax2, absmax_bytes);
  }
  EXPECT(end <= arena->data() + arena->bytes());
  EXPECT(arena->stats().bytes_managed >= static_cast<std::int64_t>(bytes));
  EXPECT(arena->stats().bytes_managed <= static_cast<std::int64_t>(arena->bytes()));
}
TEST(arrays_are_disjoint) {
  for (const qn::Algorithm algorithm : kAlgorithms)
    for (const int segment_bytes : {1, 2000, 30'000, 1 << 25}) expect_disjoint_arrays(algorithm, segment_bytes);
}

// ---- the same bits ----

void expect_same_bits_after_paged_steps(qn::Algorithm algorithm) {
  const std::vector<std::vector<qn::PagedState>> groups = {of(algorithm, kMixed), of(algorithm, {{70'000}, {3000}})};
  for (const bool pinned : {false, true})
    for (const bool eager : {false, true})
      for (const std::size_t segment_bytes : {std::size_t{1}, std::size_t{10'000}, std::size_t{1} << 25}) {
        EmulatedDriver::Options driver{.concurrent = !pinned, .eager = eager, .free_bytes = 0};
        const auto first = make_arena(groups[0], driver, {.segment_bytes = segment_bytes});
        const auto second = make_arena(groups[1], driver, {.segment_bytes = segment_bytes, .pinned = pinned});
        Training paged(groups), plain(groups), half(groups);
        paged.use(*first, 0);
        paged.use(*second, 1);
        const auto third = make_arena(groups[1], driver, {.segment_bytes = segment_bytes});
        half.use(*third, 1);
        for (const std::size_t without_gradient : {Training::kNone, std::size_t{2}, std::size_t{9}, Training::kNone}) {
          for (Training* training : {&paged, &plain, &half}) training->step(without_gradient);
          EXPECT(paged.same_bits(plain));
          EXPECT(half.same_bits(plain));
        }
        for (Training* training : {&paged, &plain, &half}) training->step(Training::kNone, true);  // skipped
        EXPECT(paged.same_bits(plain));
        EXPECT(half.same_bits(plain));
      }
}

TEST(paged_step_of_each_algorithm_leaves_the_bits_of_ordinary_memory) {
  for (const qn::Algorithm algorithm : kAlgorithms) expect_same_bits_after_paged_steps(algorithm);
}

// The arena holds only one moment, and adamw finds the other elsewhere: then nothing is fetched, and the result is
// right.
TEST(state_partly_outside_of_an_arena_is_updated_where_it_lies) {
  const std::vector<qn::PagedState> states(2, {5000});
  EmulatedDriver::Options driver{.concurrent = false};
  const auto arena = make_arena(of(qn::Algorithm::lion, states), driver, {.segment_bytes = 8192});
  Training paged({states}), plain({states});
  paged.use_first_moments(*arena);
  bool called = false;
  driver.trace = [&](const std::string&) { called = true; };
  for (int step = 0; step < 2; ++step) {
    for (Training* training : {&paged, &plain}) training->step();
    EXPECT(paged.same_bits(plain));
  }
  EXPECT(!called);
}

TEST(graph_takes_no_memory) {
  for (const bool pinned : {false, true}) {
    std::vector<std::string> calls;
    EmulatedDriver::Options driver;
    const auto arena = make_arena(kMixed, driver, {.segment_bytes = 10'000, .pinned = pinned});
    Training paged({kMixed}), plain({kMixed});
    paged.use(*arena);
    driver.trace = [&](const std::string& call) { calls.push_back(call); };
    driver.capturing = true;
    for (Training* training : {&paged, &plain}) training->step();
    EXPECT(calls.empty());
    driver.capturing = false;
    for (Training* training : {&paged, &plain}) training->step();
    EXPECT(!calls.empty());
    EXPECT(paged.same_bits(plain));
  }
}

// ---- the order of the calls ----

using Names = std::vector<std::pair<std::string, std::string>>;

// The calls of the driver in one step, and then while the arena is destroyed. `events` are named in the order in which
// they are created.
std::string calls_of_step(EmulatedDriver::Options driver, const qn::PagedOptions& options,
                          const std::vector<std::string>& events, Names names) {
  names.insert(names.end(), {{"stream 0", "in"}, {"stream 1", "out"}});
  for (std::size_t i = 0; i < events.size(); ++i) names.push_back({"event " + std::to_string(i), events[i]});
  std::string calls;
  const std::vector<qn::PagedState> states(4, {4096});
  auto arena = make_arena(states, driver, options);
  Training training({states});
  training.use(*arena);
  driver.trace = [&](std::string call) {
    for (const auto& [from, to] : names) {
      const std::size_t at = call.find(from);
      const bool whole = at != std::string::npos && (at + from.size() == call.size() || call[at + from.size()] < '0' ||
                                                     call[at + from.size()] > '9');
      if (whole) call.replace(at, from.size(), to);
    }
    calls += call + "; ";
  };
  training.step();
  calls += "-- ";
  arena.reset();
  return calls;
}

void expect_calls(const std::string& found, const std::string& expected) {
  EXPECT(found == expected);
  if (found != expected) std::printf("expected %s\ngot      %s\n", expected.c_str(), found.c_str());
}

// There are two segments, a and b, of two parameters each.
TEST(managed_memory_is_prefetched_in_order) {
  const qn::PagedOptions options{.segment_bytes = 20'000};
  const std::vector<std::string> events = {"step began", "step ended", "evicted", "a fetched", "a ready",
                                           "a updated",  "b fetched",  "b ready", "b updated"};
  const Names names = {{"managed+0, 17216", "a"}, {"managed+2097152, 17216", "b"}};
  // The gradients are checked once the prefetch of a is recorded.
  expect_calls(calls_of_step({}, options, events, names),
               "caller: record step began; in: wait for step began; out: wait for step began; in: wait for evicted; "
               "in: prefetch a to device; in: record a fetched; in: prefetch b to device; in: record b fetched; "
               "caller: record a ready; caller: wait for a fetched; caller: record b ready; "
               "caller: wait for b fetched; out: record evicted; caller: record step ended; "
               "-- synchronize step ended; synchronize evicted; release managed; ");
  // If memory is short, a goes back while b is updated.
  expect_calls(calls_of_step({.free_bytes = std::size_t{1} << 20}, options, events, names),
               "caller: record step began; in: wait for step began; out: wait for step began; in: wait for evicted; "
               "in: prefetch a to device; in: record a fetched; in: prefetch b to device; in: record b fetched; "
               "caller: record a ready; caller: wait for a fetched; caller: record a updated; "
               "out: wait for a updated; out: prefetch a to host; caller: record b ready; "
               "caller: wait for b fetched; caller: record b updated; out: wait for b updated; "
               "out: prefetch b to host; out: record evicted; caller: record step ended; "
               "-- synchronize step ended; synchronize evicted; release managed; ");
}

// There are four segments a, b, c, d of one parameter each, and three slots x, y, z.
TEST(ring_copies_in_order) {
  std::vector<std::string> events = {"x back", "y back", "z back", "step began", "step ended", "evicted"};
  Names names;
  for (int i = 0; i < 4; ++i) {
    const std::string name(1, "abcd"[i]);
    names.push_back({"pinned+" + std::to_string(i * 2097152), name});
    events.insert(events.end(), {name + " fetched", name + " ready", name + " updated"});
  }
  for (int i = 0; i < 3; ++i) names.push_back({"ring+" + std::to_string(i * 8704), std::string(1, "xyz"[i])});
  names.push_back({", 8512", ""});
  expect_calls(calls_of_step({.concurrent = false}, {.segment_bytes = 8192}, events, names),
               "caller: record step began; in: wait for step began; out: wait for step began; in: wait for evicted; "
               "in: copy a to x; in: record a fetched; in: copy b to y; in: record b fetched; "
               "caller: record a ready; caller: wait for a fetched; caller: record a updated; "
               "out: wait for a updated; out: copy x to a; out: record x back; in: copy c to z; in: record c fetched; "
               "caller: record b ready; caller: wait for b fetched; caller: record b updated; "
               "out: wait for b updated; out: copy y to b; out: record y back; "
               "in: wait for x back; in: copy d to x; in: record d fetched; "
               "caller: record c ready; caller: wait for c fetched; caller: record c updated; "
               "out: wait for c updated; out: copy z to c; out: record z back; "
               "caller: record d ready; caller: wait for d fetched; caller: record d updated; "
               "out: wait for d updated; out: copy x to d; out: record x back; "
               "out: record evicted; caller: wait for evicted; caller: record step ended; "
               "-- synchronize step ended; synchronize evicted; release ring; release pinned; ");
}

// ---- eviction and statistics ----

TEST(at_most_three_segments_are_on_the_device) {
  EmulatedDriver::Options driver{.free_bytes = 0};
  const std::vector<qn::PagedState> states(12, {4096});
  const auto arena = make_arena(states, driver, {.segment_bytes = 8192});
  Training training({states});
  training.use(*arena);
  int now = 0, largest = 0, fetched = 0;
  driver.trace = [&](const std::string& call) {
    const bool in = call.find("to device") != std::string::npos, out = call.find("to host") != std::string::npos;
    now += in - out;
    fetched += in;
    largest = std::max(largest, now);
  };
  for (int step = 0; step < 3; ++step) {
    training.step();
    EXPECT(now == 0 && largest <= 3 && fetched == 12 * (step + 1));
  }
}

TEST(statistics_count_what_happened) {
  for (const bool eager : {false, true}) {
    EmulatedDriver::Options driver{.eager = eager};
    const auto arena = make_arena(kMixed, driver, {.segment_bytes = 10'000});
    Training training({kMixed});
    training.use(*arena);
    const qn::PagedStats before = arena->stats();
    EXPECT(before.bytes_managed > 0 && before.bytes_resident == 0 && before.prefetches == 0 && before.stalls == 0);
    training.step();
    const qn::PagedStats after = arena->stats();
    EXPECT(after.bytes_resident == after.bytes_managed && after.bytes_managed == before.bytes_managed);
    EXPECT(after.prefetches > 3 && after.stalls == (eager ? 0 : after.prefetches));
    training.step();
    EXPECT(arena->stats().prefetches == 2 * after.prefetches && arena->stats().stalls == 2 * after.stalls);
    if (!eager) continue;  // without `eager` the state goes back only when something waits for it
    driver.free_bytes = 0;
    training.step();
    EXPECT(arena->stats().bytes_resident == 0);
  }
}

}  // namespace

int main() { return run_tests(); }
