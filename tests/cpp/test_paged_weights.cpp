// Guards PagedWeights, with the emulator's driver: what it expects to be used next, where copies lie, the order of its
// calls of the driver, what it moves in a step, and that products over paged weights have the bits of ordinary ones. In
// this driver a copy runs only when something waits for it, so a product that does not wait reads NaN.
#include "paged/weights.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "emulator/emulated_driver.h"
#include "expect_refused.h"
#include "layer.h"
#include "qlora_native/qlora_native.h"

using qn::cuda_emulated::EmulatedDriver;

namespace {

using Order = std::vector<std::size_t>;

// ---- the order of uses ----

// A training step over blocks of layers: upwards, then downwards. With checkpointing each block runs upwards again
// before it runs downwards.
Order step_of(std::size_t blocks, std::size_t layers, bool checkpointing) {
  Order order;
  const auto up = [&](std::size_t block) {
    for (std::size_t i = 0; i < layers; ++i) order.push_back(block * layers + i);
  };
  for (std::size_t block = 0; block < blocks; ++block) up(block);
  for (std::size_t block = blocks; block-- > 0;) {
    if (checkpointing) up(block);
    for (std::size_t i = layers; i-- > 0;) order.push_back(block * layers + i);
  }
  return order;
}

// How many uses of `order` come unexpected.
std::size_t unexpected(qn::AccessOrder& access, const Order& order) {
  std::size_t count = 0;
  for (const std::size_t item : order) {
    count += access.next() != item;
    access.use(item);
  }
  return count;
}

TEST(order_of_a_step_is_known_after_the_first_one) {
  for (const bool checkpointing : {false, true}) {
    for (const std::size_t unused_below : {0, 2}) {  // the first layers have no product downwards
      Order step = step_of(4, 3, checkpointing);
      step.resize(step.size() - unused_below);
      qn::AccessOrder access(12);
      unexpected(access, step);
      for (int repeat = 0; repeat < 200; ++repeat) {
        // Where the first layer is used twice in a row the second use may be unexpected; that layer is in place.
        EXPECT(unexpected(access, step) <= (repeat == 0 && unused_below == 0));
      }
    }
  }
}

TEST(order_is_known_again_after_a_layer_was_skipped_or_repeated) {
  const Order step = step_of(5, 2, true);
  Order skipped, repeated;
  for (const std::size_t item : step) {
    if (item != 4) skipped.push_back(item);
    repeated.push_back(item);
    if (item == 4) repeated.push_back(item);
  }
  for (const Order& changed : {skipped, repeated}) {
    qn::AccessOrder access(10);
    for (int i = 0; i < 3; ++i) unexpected(access, step);
    EXPECT(unexpected(access, changed) <= 9);  // 3 uses of the layer, each missed, and twice until two uses repeat
    EXPECT(unexpected(access, changed) <= 1);
    EXPECT(unexpected(access, changed) == 0);
    EXPECT(unexpected(access, step) <= 9);
    for (int i = 0; i < 2; ++i) EXPECT(unexpected(access, step) <= 1);
    EXPECT(unexpected(access, step) == 0);
  }
}

TEST(items_are_as_far_as_their_next_use) {
  qn::AccessOrder access(5);
  for (const std::size_t item : Order{0, 1, 2, 3, 3, 2, 1, 0, 0, 1}) access.use(item);
  // 2 3 3 2 1 0 follow, then again 0 1; item 4 was never used.
  const Order distances = access.distances();
  EXPECT((Order(distances.begin(), distances.begin() + 4) == Order{5, 4, 0, 1}));
  EXPECT(distances[4] > distances[0]);
  // Nothing repeats: what was used first is expected, and of the others what was used longest ago comes last.
  qn::AccessOrder first(5);
  for (const std::size_t item : Order{2, 0, 3, 1}) first.use(item);
  EXPECT(first.next() == 2);
  const Order ages = first.distances();
  EXPECT(ages[2] == 0 && ages[1] < ages[3] && ages[3] < ages[0] && ages[0] < ages[4]);
}

// ---- where copies lie ----

TEST(copy_finds_room_beside_the_one_in_use) {
  Random random(7);
  const auto below = [&](std::size_t limit) {
    return std::min(static_cast<std::size_t>((random.uniform() + 1.0f) * 0.5f * static_cast<float>(limit)), limit - 1);
  };
  for (int trial = 0; trial < 300; ++trial) {
    Order sizes(2 + below(9));
    for (std::size_t& size : sizes) size = 1 + below(trial % 3 == 0 ? 4 : 100);
    const std::size_t least = qn::Placement::least_bytes(sizes),
                      all = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
    const std::size_t bytes = trial % 4 == 0 ? all : least + below(all - least + 1);
    qn::Placement placement(bytes, sizes);
    std::size_t in_use = qn::Placement::kNone;
    for (int i = 0; i < 100; ++i) {
      const std::size_t item = below(sizes.size());
      if (item == in_use) continue;
      if (!placement.holds(item)) {
        Order distances(sizes.size());
        for (std::size_t& distance : distances) distance = below(1000);
        const Order gone = placement.place(item, in_use, distances);
        EXPECT(std::count(gone.begin(), gone.end(), in_use) == 0);
        EXPECT(bytes < all || gone.empty());
      }
      EXPECT(placement.holds(item) && placement.begin(item) + sizes[item] <= bytes);
      for (std::size_t a = 0; a < sizes.size(); ++a)
        for (std::size_t b = 0; b < a; ++b)
          EXPECT(!placement.holds(a) || !placement.holds(b) || placement.begin(a) >= placement.begin(b) + sizes[b] ||
                 placement.begin(b) >= placement.begin(a) + sizes[a]);
      in_use = item;
    }
  }
}

TEST(what_is_needed_last_makes_room) {
  qn::Placement placement(40, {10, 10, 10, 10, 10, 20});
  for (const std::size_t item : {0, 1, 2, 3}) EXPECT(placement.place(item, qn::Placement::kNone, Order(6)).empty());
  EXPECT((placement.place(4, 0, {9, 5, 8, 7, 0, 0}) == Order{2}));
  // Of neighbours the one that is needed first decides.
  EXPECT((placement.place(5, 4, {6, 5, 8, 9, 0, 0}) == Order{0, 1}));
}

// Llama 65B in 4 bits and blocks of 64, without a device: 33.4 GB, of which `budget` fit. A step copies what does not
// fit upwards and downwards, and two percent of the weights more at most: places for layers of two sizes leave
// gaps.
TEST(step_of_a_large_model_copies_little_more_than_what_does_not_fit) {
  constexpr std::size_t kBlocks = 80, kLayers = 7, kWidth = 8192, kHidden = 22016;
  Order sizes;
  for (std::size_t i = 0; i < kBlocks * kLayers; ++i) {
    const std::size_t elements = kWidth * (i % kLayers < 4 ? kWidth : kHidden);
    sizes.push_back(elements / 2 + elements / 64);
  }
  const std::size_t all = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
  for (const bool checkpointing : {false, true}) {
    for (const std::size_t gigabytes : {4, 16, 30}) {
      const std::size_t budget = gigabytes * 1'000'000'000;
      qn::AccessOrder access(sizes.size());
      qn::Placement placement(budget, sizes);
      for (int step = 0; step < 3; ++step) {
        std::size_t bytes = 0, faults = 0;
        const auto fetch = [&](std::size_t item, std::size_t kept) {
          if (item == kept || placement.holds(item)) return false;
          placement.place(item, kept, access.distances());
          bytes += sizes[item];
          return true;
        };
        for (const std::size_t item : step_of(kBlocks, kLayers, checkpointing)) {
          access.use(item);
          faults += fetch(item, qn::Placement::kNone);
          fetch(access.next(), item);
        }
        if (step > 0) EXPECT(faults == 0 && bytes <= 2 * (all - budget) + all / 50);
      }
    }
  }
}

// ---- a model whose weights are paged ----

const std::vector<Case> kCases = {
    {.M = 5, .N = 48, .K = 64, .rank = 4},
    {.M = 5, .N = 70, .K = 96, .dtype = DType::f32, .format = "q4_1", .blocksize = 32, .bias = true},
    {.M = 5, .N = 33, .K = 50, .format = "int8", .double_quant = false},
    {.M = 20, .N = 64, .K = 128, .format = "gptq", .blocksize = 128, .rank = 3},
    {.M = 20, .N = 40, .K = 256, .format = "q4_k", .blocksize = 32},
    {.M = 12, .N = 24, .K = 64, .rank = 2, .offsets = {0, 5, 12}, .group_weights = true},
};

// The arrays of a weight that are paged.
std::vector<std::pair<const void**, std::size_t>> arrays_of(qn::QuantizedWeightView& w) {
  const auto blocks = static_cast<std::size_t>(w.blocks());
  const std::size_t scale = w.nested_absmax != nullptr ? 1 : size_of(w.scale_dtype);
  std::vector<std::pair<const void**, std::size_t>> arrays = {
      {reinterpret_cast<const void**>(&w.codes), static_cast<std::size_t>(qn::bytes_of_codes(w.elements(), w.bits))},
      {&w.absmax, blocks * scale}};
  if (w.minimum != nullptr) arrays.push_back({&w.minimum, blocks * (w.nested_minimum != nullptr ? 1 : scale)});
  if (w.zero_point != nullptr) arrays.push_back({reinterpret_cast<const void**>(&w.zero_point), blocks});
  return arrays;
}

class Model {
 public:
  explicit Model(const std::vector<Case>& cases) {
    for (const Case& c : cases) layers_.push_back(std::make_unique<Layer>(c));
    for (const auto& layer : layers_) views_.push_back(layer->weight.view());
  }

  std::vector<std::vector<std::size_t>> sizes() {
    std::vector<std::vector<std::size_t>> sizes;
    for (qn::QuantizedWeightView& view : views_) {
      sizes.emplace_back();
      for (const auto& [array, bytes] : arrays_of(view)) sizes.back().push_back(bytes);
    }
    return sizes;
  }

  // From now on the products read paged weights.
  void page(qn::PagedWeights& weights) {
    for (std::size_t i = 0; i < views_.size(); ++i) {
      std::size_t k = 0;
      for (const auto& [array, bytes] : arrays_of(views_[i])) {
        std::byte* const home = weights.data(i, k++);
        std::memcpy(home, *array, bytes);
        *array = home;
      }
    }
  }

  void forward(std::size_t layer) {
    qn::LinearForwardArgs args = layers_[layer]->forward_args();
    args.weight = views_[layer];
    qn::linear_forward(args);
  }
  void backward(std::size_t layer, bool with_dx = true) {
    qn::LinearBackwardInputArgs args = layers_[layer]->backward_args();
    args.weight = views_[layer];
    if (!with_dx) args.dx = {};
    qn::linear_backward_input(args);
  }
  void step(bool checkpointing = false) {
    for (std::size_t i = 0; i < layers_.size(); ++i) forward(i);
    for (std::size_t i = layers_.size(); i-- > 0;) {
      if (checkpointing) forward(i);
      backward(i);
    }
  }
  std::vector<char> results() const {
    std::vector<char> all;
    for (const auto& layer : layers_) {
      const std::vector<char> bytes = layer->bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }

  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<qn::QuantizedWeightView> views_;
};

std::unique_ptr<qn::PagedWeights> make_weights(Model& model, EmulatedDriver::Options& driver, std::size_t bytes) {
  auto weights = qn::PagedWeights::Impl::make_weights(std::make_unique<EmulatedDriver>(&driver), model.sizes(), bytes);
  model.page(*weights);
  return weights;
}

// So many equal layers, whose copies take kLayerBytes each: 2048 of codes, 64 scales that begin at a multiple of 256.
std::vector<Case> equal_layers(std::size_t count) {
  return std::vector<Case>(count, {.M = 2, .N = 64, .K = 64, .rank = 2});
}
constexpr std::int64_t kLayerBytes = 2048 + 256;

TEST(products_over_paged_weights_have_the_bits_of_ordinary_ones) {
  Model plain(kCases);
  for (int i = 0; i < 2; ++i) plain.step();
  const std::vector<char> expected = plain.results();
  Model sized(kCases);
  for (const bool eager : {false, true}) {
    for (const std::size_t share : {0, 1, 2}) {
      EmulatedDriver::Options driver{.eager = eager};
      Model model(kCases);
      const std::size_t least = 4608 + 6144;  // of the two largest
      const auto weights = make_weights(model, driver, share == 2 ? 1 << 20 : least + share * 3000);
      for (const bool checkpointing : {false, true, false}) model.step(checkpointing);
      EXPECT(model.results() == expected);
      EXPECT(weights->stats().bytes_fetched >= weights->stats().bytes_managed);
      EXPECT(weights->stats().bytes_resident <= static_cast<std::int64_t>(least + share * 3000) || share == 2);
    }
  }
}

TEST(products_read_the_copies_alone) {
  EmulatedDriver::Options driver;
  Model model(kCases), plain(kCases);
  const auto weights = make_weights(model, driver, 1 << 20);
  for (int i = 0; i < 2; ++i) model.step(), plain.step();
  for (qn::QuantizedWeightView& view : model.views_)
    for (const auto& [array, bytes] : arrays_of(view)) std::memset(const_cast<void*>(*array), 0xFF, bytes);
  model.step();
  EXPECT(model.results() == plain.results());
}

TEST(weight_is_as_before_if_its_memory_cannot_be_completed) {
  for (const int events : {1, 2, 3}) {  // the first one is for written memory, and a weight has three
    EmulatedDriver::Options driver{.events_left = events};
    Model model(equal_layers(2)), plain(equal_layers(2));
    const auto weights =
        qn::PagedWeights::Impl::make_weights(std::make_unique<EmulatedDriver>(&driver), model.sizes(), 2 * kLayerBytes);
    bool refused = false;
    try {
      weights->data(0, 0);
    } catch (const qn::Unavailable&) {
      refused = true;
    }
    EXPECT(refused && weights->stats().bytes_managed == 0);
    weights->release(0);
    driver.events_left = 100;
    model.page(*weights);
    EXPECT(weights->stats().bytes_managed == 2 * kLayerBytes);
    for (Model* each : {&model, &plain}) each->step();
    EXPECT(model.results() == plain.results() && weights->stats().bytes_fetched > 0);
  }
}

// ---- the order of the calls ----

// Three layers in room for two. There is one event for written memory, and three for each layer.
TEST(next_weight_is_copied_while_one_is_multiplied_by) {
  EmulatedDriver::Options driver;
  Model model(equal_layers(3));
  const auto weights = make_weights(model, driver, 2 * kLayerBytes);
  model.step();
  std::vector<std::string> calls;
  driver.trace = [&](std::string call) {
    const std::pair<std::string, std::string> names[] = {
        {"event 1", "a fetched"}, {"event 2", "a ready"}, {"event 3", "a used"},    {"event 4", "b fetched"},
        {"event 5", "b ready"},   {"event 6", "b used"},  {"event 7", "c fetched"}, {"event 8", "c ready"},
        {"event 9", "c used"},    {"stream 0", "copies"}, {"pinned+0, 2304", ""}};
    for (const auto& [from, to] : names)
      if (const std::size_t at = call.find(from); at != std::string::npos) call.replace(at, from.size(), to);
    calls.push_back(call);
  };
  model.step();
  driver.trace = [](const std::string&) {};
  const std::vector<std::string> expected = {
      // Upwards. The copies of a and b are there since the first step ended, so nothing moves before b is in use; c
      // then
      // takes the place of a as soon as the product with a has ended. Where a copy is used again, later copies wait for
      // the use before, too, which the event forgets.
      "caller: wait for a fetched", "copies: wait for a used", "caller: record a used",  //
      "copies: wait for a used", "copies: copy  to ring+0", "copies: record c fetched",  //
      "caller: wait for b fetched", "copies: wait for b used", "caller: record b used",  //
      "caller: record c ready", "caller: wait for c fetched", "caller: record c used",   //
      // Downwards: c and b are there.
      "caller: wait for c fetched", "copies: wait for c used", "caller: record c used",  //
      "copies: wait for c used", "copies: copy  to ring+0", "copies: record a fetched",  //
      "caller: wait for b fetched", "copies: wait for b used", "caller: record b used",  //
      "caller: record a ready", "caller: wait for a fetched", "caller: record a used"};
  EXPECT(calls == expected);
  if (calls != expected)
    for (const std::string& call : calls) std::printf("  %s\n", call.c_str());
}

// ---- the account ----

// Of n equal layers b fit on the device. Each step copies what does not: n - b upwards, and as many downwards. The
// first one copies all upwards.
TEST(step_copies_only_what_does_not_fit) {
  for (const std::int64_t n : {4, 9}) {
    for (const std::int64_t b : {std::int64_t{2}, std::int64_t{3}, n - 1, n}) {
      EmulatedDriver::Options driver{.eager = true};
      Model model(equal_layers(static_cast<std::size_t>(n)));
      const auto weights = make_weights(model, driver, static_cast<std::size_t>(b * kLayerBytes));
      EXPECT(weights->stats().bytes_managed == n * kLayerBytes && weights->stats().bytes_resident == 0);
      model.step();
      EXPECT(weights->stats().bytes_fetched == (n + n - b) * kLayerBytes);
      for (int step = 0; step < 4; ++step) {
        const qn::PagedWeightsStats before = weights->stats();
        model.step(/*checkpointing=*/step > 1);
        const qn::PagedWeightsStats after = weights->stats();
        EXPECT(after.bytes_resident == b * kLayerBytes);
        if (step == 2) continue;  // the order is new
        EXPECT(after.faults == before.faults && after.stalls == before.stalls);
        EXPECT(after.bytes_fetched - before.bytes_fetched == 2 * (n - b) * kLayerBytes);
      }
    }
  }
}

// Forward passes alone, as in evaluation: what is kept stays, and the others take turns in one place.
TEST(passes_in_one_direction_keep_what_fits) {
  EmulatedDriver::Options driver{.eager = true};
  Model model(equal_layers(8));
  const auto weights = make_weights(model, driver, 4 * kLayerBytes);
  const auto pass = [&] {
    for (std::size_t i = 0; i < 8; ++i) model.forward(i);
  };
  for (int i = 0; i < 3; ++i) pass();
  const qn::PagedWeightsStats before = weights->stats();
  for (int i = 0; i < 4; ++i) pass();
  const qn::PagedWeightsStats after = weights->stats();
  EXPECT(after.faults == before.faults);
  EXPECT(after.bytes_fetched - before.bytes_fetched == 4 * 5 * kLayerBytes);  // three stay, and one is in use
}

TEST(stalls_are_prefetches_that_a_product_waited_for) {
  EmulatedDriver::Options driver;  // a copy runs when a product waits for it
  Model model(equal_layers(4));
  const auto weights = make_weights(model, driver, 2 * kLayerBytes);
  for (int i = 0; i < 2; ++i) model.step();
  const qn::PagedWeightsStats before = weights->stats();
  model.step();
  const qn::PagedWeightsStats after = weights->stats();
  EXPECT(after.prefetches - before.prefetches == 4 && after.stalls - before.stalls == 4);
}

// ---- changes ----

TEST(written_weight_is_copied_again) {
  EmulatedDriver::Options driver;
  Model model(equal_layers(3)), plain(equal_layers(3));
  const auto weights = make_weights(model, driver, 1 << 20);
  for (Model* each : {&model, &plain}) each->step();
  std::byte* const codes = weights->data(1, 0);
  std::memset(codes, 0x5A, 2048);
  std::fill(plain.layers_[1]->weight.codes.begin(), plain.layers_[1]->weight.codes.end(), std::uint8_t{0x5A});
  std::fill(model.layers_[1]->weight.codes.begin(), model.layers_[1]->weight.codes.end(), std::uint8_t{0x5A});
  std::vector<std::string> calls;
  driver.trace = [&](const std::string& call) { calls.push_back(call); };
  qn::paged_weight_written(codes + 100, {});
  qn::paged_weight_written(&driver, {});  // memory of others
  driver.trace = [](const std::string&) {};
  // Copies wait for what the caller's stream writes, and for the last product with the copy that no longer counts.
  EXPECT((calls == std::vector<std::string>{"caller: record event 0", "stream 0: wait for event 0",
                                            "stream 0: wait for event 6"}));
  for (Model* each : {&model, &plain}) each->step();
  EXPECT(model.results() == plain.results());
  EXPECT(weights->stats().bytes_fetched == 4 * kLayerBytes);
}

TEST(released_weight_takes_no_memory_and_the_others_go_on) {
  EmulatedDriver::Options driver;
  Model model(equal_layers(4)), plain(equal_layers(4));
  const auto weights = make_weights(model, driver, 2 * kLayerBytes);
  for (int i = 0; i < 2; ++i) model.step();
  model.views_[2] = model.layers_[2]->weight.view();  // ordinary memory again
  weights->release(2);
  EXPECT(weights->stats().bytes_managed == 3 * kLayerBytes);
  for (int i = 0; i < 3; ++i) model.step();
  const qn::PagedWeightsStats before = weights->stats();
  model.step();
  EXPECT(weights->stats().faults == before.faults);
  for (int i = 0; i < 2; ++i) plain.step();
  EXPECT(model.results() == plain.results());
  weights->release(2);  // changes nothing
}

TEST(weights_of_two_objects_do_not_meet) {
  EmulatedDriver::Options driver;
  Model one(equal_layers(3)), other(equal_layers(3)), plain(equal_layers(3));
  const auto of_one = make_weights(one, driver, 2 * kLayerBytes);
  auto of_other = make_weights(other, driver, 2 * kLayerBytes);
  const auto both = [&] {
    for (std::size_t i = 0; i < 3; ++i) one.forward(i), other.forward(i);
    for (std::size_t i = 3; i-- > 0;) one.backward(i), other.backward(i);
  };
  both();
  const std::int64_t faults = of_one->stats().faults;
  both();
  EXPECT(of_one->stats().faults == faults && of_other->stats().faults == faults);
  plain.step();
  EXPECT(one.results() == plain.results() && other.results() == plain.results());
  of_other.reset();
  one.step();
  EXPECT(one.results() == plain.results());
}

TEST(gradient_of_an_adapter_alone_moves_nothing) {
  EmulatedDriver::Options driver;
  Model model(equal_layers(3));
  const auto weights = make_weights(model, driver, 2 * kLayerBytes);
  model.backward(1, /*with_dx=*/false);
  EXPECT(weights->stats().bytes_fetched == 0);
}

TEST(threads_multiply_by_the_same_weights) {
  EmulatedDriver::Options driver;
  Model one(equal_layers(4)), other(equal_layers(4)), plain(equal_layers(4));
  const auto weights = make_weights(one, driver, 2 * kLayerBytes);
  other.views_ = one.views_;
  std::thread thread([&] { other.step(); });
  one.step();
  thread.join();
  plain.step();
  EXPECT(one.results() == plain.results() && other.results() == plain.results());
}

// ---- what is refused ----

TEST(capture_of_a_product_with_paged_weights_is_refused) {
  EmulatedDriver::Options driver;
  Model model(equal_layers(2));
  const auto weights = make_weights(model, driver, 1 << 20);
  driver.capturing = true;
  expect_refused("stream", [&] { model.forward(0); });
  expect_refused("stream", [&] { model.backward(0); });
  driver.capturing = false;
  model.forward(0);
}

TEST(budget_without_room_for_two_weights_is_refused) {
  const auto make = [](const std::vector<std::vector<std::size_t>>& sizes, std::size_t bytes) {
    return qn::PagedWeights(sizes, bytes, {});
  };
  const std::vector<std::vector<std::size_t>> sizes = {{1000}, {5000, 100}, {2048, 10}};
  const std::size_t least = 5120 + 256 + 2048 + 256;
  expect_refused("device_bytes", [&] { make(sizes, least - 1); });
  try {
    make(sizes, 7000);
  } catch (const qn::Error& error) {
    const std::string message = error.what();
    EXPECT(message.find("at least 7680") != std::string::npos && message.find("5376 and 2304") != std::string::npos);
  }
  EXPECT(make(sizes, least).stats().bytes_managed == 0);
  EXPECT(make({{5000}}, 5120).stats().bytes_managed == 0);  // a single one needs no room for another
  expect_refused("weights", [&] { make({}, 1 << 20); });
}

}  // namespace

int main() { return run_tests(); }
