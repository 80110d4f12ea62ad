#include "cpu/product/linear.h"

#include <cstring>

namespace qlora_native {
namespace {

template <class Args>
void run_by_weight(const Args& args, std::int64_t rows, std::unique_ptr<Job> (*make)(const Args&, const WeightRows&)) {
  const std::vector<AdapterRows> adapters = adapter_rows(args.lora, args.groups, rows);
  Jobs jobs;
  for (WeightRows part : weight_rows(args.weight, args.groups, rows, adapters))
    while (part.begin < part.end) {
      std::unique_ptr<Job> job = make(args, part);
      part.begin += job->rows();
      jobs.add(std::move(job));
    }
  jobs.run();
}

// Rows of U, or V, that no adapter is for.
void clear_rows_without_adapter(Matrix low_rank, const RowGroups& groups) {
  if (low_rank.data == nullptr || groups.count == 0) return;
  const std::size_t size = size_of(low_rank.dtype);
  for (std::int64_t row = 0; row < groups.offsets[0]; ++row)
    std::memset(static_cast<char*>(low_rank.data) + static_cast<std::size_t>(row * low_rank.stride) * size, 0,
                static_cast<std::size_t>(low_rank.cols) * size);
}

}  // namespace

std::vector<AdapterRows> adapter_rows(const LoraView& lora, const RowGroups& groups, std::int64_t rows) {
  if (lora.rank == 0) return {};
  if (groups.count == 0) return {{0, 0, rows}};
  if (lora.count == 1) return {{0, groups.offsets[0], rows}};
  std::vector<AdapterRows> adapters;
  for (std::int64_t g = 0; g < groups.count; ++g) adapters.push_back({g, groups.offsets[g], groups.offsets[g + 1]});
  return adapters;
}

std::vector<WeightRows> weight_rows(const QuantizedWeightView& weight, const RowGroups& groups, std::int64_t rows,
                                    std::span<const AdapterRows> adapters) {
  if (rows == 0) return {};
  if (weight.count == 1) return {{0, 0, rows, adapters}};
  std::vector<WeightRows> parts;
  for (std::int64_t g = 0; g < groups.count; ++g) {
    WeightRows part{g, groups.offsets[g], groups.offsets[g + 1], adapters};
    if (part.begin == part.end) continue;
    // Each weight's rows have an adapter of their own, or all share one.
    if (adapters.size() > 1) part.adapters = adapters.subspan(static_cast<std::size_t>(g), 1);
    parts.push_back(part);
  }
  return parts;
}

void linear_forward(const LinearForwardArgs& args, const Products& products) {
  run_by_weight(args, args.x.rows, products.forward);
  clear_rows_without_adapter(args.u, args.groups);
}

void linear_backward_input(const LinearBackwardInputArgs& args, const Products& products) {
  run_by_weight(args, args.dy.rows, products.backward_input);
  clear_rows_without_adapter(args.v, args.groups);
}

void lora_gradients(const LoraGradientsArgs& args, const Products& products) {
  const std::int64_t rank = args.lora.rank;
  const auto clear = [&](void* gradients, std::int64_t adapter, std::int64_t elements) {
    const std::size_t bytes = static_cast<std::size_t>(elements) * size_of(args.lora.dtype);
    std::memset(static_cast<char*>(gradients) + static_cast<std::size_t>(adapter) * bytes, 0, bytes);
  };
  Jobs jobs;
  for (const AdapterRows& adapter : adapter_rows(args.lora, args.groups, args.x.rows)) {
    const auto run = [&](Gradient gradient, void* gradients, std::int64_t cols) {
      if (gradients == nullptr) return;
      if (adapter.begin == adapter.end) return clear(gradients, adapter.adapter, rank * cols);  // a sum of nothing
      for (std::int64_t first = 0; first < rank;) {
        std::unique_ptr<Job> job = products.gradient(gradient, args, adapter, first);
        first += job->rows();
        jobs.add(std::move(job));
      }
    };
    run(Gradient::a, args.da, args.x.cols);
    run(Gradient::b, args.db, args.dy.cols);
  }
  jobs.run();
}

}  // namespace qlora_native
