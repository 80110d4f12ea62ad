// The products of linear.h on the cpu. Rows are cut by the weight and the adapter that multiply them, and an
// instruction set makes a Job of each piece.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu/runtime/job.h"
#include "qlora_native/linear.h"

namespace qlora_native {

// Rows begin ... end-1 of X, or dY, that an adapter is for.
struct AdapterRows {
  std::int64_t adapter = 0;  // which
  std::int64_t begin = 0, end = 0;
};

// Rows begin ... end-1 of X, or dY, that one weight multiplies.
struct WeightRows {
  std::int64_t weight = 0;  // which
  std::int64_t begin = 0, end = 0;
  std::span<const AdapterRows> adapters;  // ascending; rows that are in none have no adapter
};

enum class Gradient { a, b };  // dA or dB

// What an instruction set provides. Each function makes a Job for as many of the rows as its memory allows, from the
// first on.
struct Products {
  std::unique_ptr<Job> (*forward)(const LinearForwardArgs&, const WeightRows&);
  std::unique_ptr<Job> (*backward_input)(const LinearBackwardInputArgs&, const WeightRows&);
  // The rows of this job are rows of dA, or columns of dB, from `first` on.
  std::unique_ptr<Job> (*gradient)(Gradient, const LoraGradientsArgs&, const AdapterRows&, std::int64_t first);
};

void linear_forward(const LinearForwardArgs& args, const Products& products);
void linear_backward_input(const LinearBackwardInputArgs& args, const Products& products);
void lora_gradients(const LoraGradientsArgs& args, const Products& products);

// The adapters and the rows that each of them is for, which may be none. Without an adapter the list is empty.
std::vector<AdapterRows> adapter_rows(const LoraView& lora, const RowGroups& groups, std::int64_t rows);
// The weights that have a row, and the rows that each of them multiplies. `adapters` must outlive the result.
std::vector<WeightRows> weight_rows(const QuantizedWeightView& weight, const RowGroups& groups, std::int64_t rows,
                                    std::span<const AdapterRows> adapters);

}  // namespace qlora_native
