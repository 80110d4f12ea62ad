// linear_forward of few rows of x, which is a product of SmallM.
#pragma once

#include "cpu/product/product_small_m-inl.h"
#include "cpu/runtime/job.h"

namespace qlora_native::QLN_ISA {
namespace {

// prepare() packs X, stage 0 computes U, and stage 1 multiplies.
template <class Dot, class Rows>
class ForwardSmallM final : public Job {
 public:
  ForwardSmallM(const Rows& w, const LinearForwardArgs& args, const WeightRows& part) : w_(w), args_(args) {
    rows_ = smaller(part.end - part.begin, cpu::kMaxSmallM);  // the other rows are another job
    first_row_ = part.begin;
    args_ = args_of(args, part, rows_);
    adapters_ = job_adapters(args.lora, part, rows_, args.weight);
    for (const JobAdapter& adapter : adapters_)
      loras_.push_back({.b = lora_b(adapter.lora, args.weight.N),
                        .scaling = adapter.lora.scaling,
                        .begin = adapter.begin,
                        .end = adapter.end,
                        .padded_rank = padded_rank()});
    kernel_ =
        Product::template kernel_of<Rows>(Product::template piece_rows<Rows>(static_cast<int>(rows_), args.x.cols));
    pieces_ = static_cast<int>(ceil_div(rows_, std::int64_t{kernel_.rows_of_x}));
    kernel_of_a_ = Product::template kernel_of<RowsOfA>(kernel_.rows_of_x);
    x_floats_ = pieces_ * Product::steps(w) * kernel_.rows_of_x * Product::kStepUnits;
    u_floats_ = rows_ * padded_rank();
    bytes_ = (x_floats_ * (has_dropout() ? 2 : 1) + static_cast<std::int64_t>(loras_.size()) * u_floats_) * 4;
  }

  void cut(std::int64_t threads) override {
    u_task_rows_ = kernel_of_a_.task_rows(args_.lora.rank, threads);
    y_task_rows_ = kernel_.task_rows(w_.rows(), threads);
    tasks_[0] = adapters_.empty() ? 0 : static_cast<std::int64_t>(adapters_.size()) * u_tasks();
    tasks_[1] = ceil_div(w_.rows(), y_task_rows_);
  }
  void prepare(std::byte* memory) override {
    const auto pack = [&](const DenseRows<Dot, false>& x, float* out) {
      return Product::pack(x, pieces_, kernel_.rows_of_x, out);
    };
    float* const floats = reinterpret_cast<float*>(memory);
    x_ = dropped_x_ = pack(DenseRows<Dot, false>(args_.x), floats);
    float* u = floats + x_floats_;
    if (has_dropout()) {
      dropped_x_ = pack(DenseRows<Dot, false>(args_.x, 1.0f, dropout_of(args_.lora), first_row_), u);
      u += x_floats_;
    }
    __builtin_memset(u, 0, loras_.size() * static_cast<std::size_t>(u_floats_) * sizeof(float));
    for (LowRank& lora : loras_) {
      lora.u = u;
      u += u_floats_;
    }
  }
  void run(int stage, std::int64_t task) override { stage == 0 ? compute_u(task) : multiply(task); }

 private:
  using Product = SmallM<Dot>;
  using LowRank = typename Product::LowRank;
  using RowsOfA = DenseRows<Dot, false>;
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));

  std::int64_t padded_rank() const { return ceil_div(args_.lora.rank, kLanes) * kLanes; }
  std::int64_t u_tasks() const { return ceil_div(args_.lora.rank, u_task_rows_); }
  bool has_dropout() const { return !adapters_.empty() && static_cast<bool>(dropout_of(args_.lora)); }

  // Computes the U of one adapter for all rows, and saves the rows that are the adapter's.
  void compute_u(std::int64_t task) {
    const JobAdapter& adapter = adapters_[static_cast<std::size_t>(task / u_tasks())];
    const LowRank& lora = loras_[static_cast<std::size_t>(task / u_tasks())];
    const std::int64_t begin = task % u_tasks() * u_task_rows_;
    const F32 scale = set1(dropout_scale(adapter.lora));
    Product::multiply(RowsOfA(lora_a(adapter.lora, args_.x.cols)), kernel_of_a_,
                      {begin, smaller(begin + u_task_rows_, adapter.lora.rank)}, dropped_x_, {},
                      [&](int m, std::int64_t first, int count, const float* results) {
                        if (m < adapter.begin || m >= adapter.end) return;
                        for (int r = 0; r < count; r += kLanes) {
                          const int lanes = smaller(kLanes, count - r);
                          // U is rounded like any operand of a product.
                          const F32 value = round_to<Dot::kActivation>(mul(load(results + r), scale));
                          store_from_f32<DType::f32>(lora.u + m * lora.padded_rank + first + r, value, lanes);
                          if (args_.u.data != nullptr) store_elements(args_.u, m, first + r, value, lanes);
                        }
                      });
  }
  void multiply(std::int64_t task) {
    const std::int64_t begin = task * y_task_rows_;
    Product::multiply(w_, kernel_, {begin, smaller(begin + y_task_rows_, w_.rows())}, x_, loras_,
                      [&](int m, std::int64_t first, int count, const float* results) {
                        if (m >= rows_) return;
                        for (int j = 0; j < count; j += kLanes) {
                          const int lanes = smaller(kLanes, count - j);
                          store_elements(args_.y, m, first + j, add(load(results + j), bias(first + j, lanes)), lanes);
                        }
                      });
  }

  static void store_elements(Matrix out, std::int64_t row, std::int64_t col, F32 values, int count) {
    store_from_f32<Dot::kActivation>(static_cast<char*>(out.data) + (row * out.stride + col) * kSize, values, count);
  }
  F32 bias(std::int64_t n, int count) const {
    if (args_.bias == nullptr) return zero();
    return load_as_f32<Dot::kActivation>(static_cast<const char*>(args_.bias) + n * kSize, count);
  }

  Rows w_;
  LinearForwardArgs args_;  // of this job's rows
  std::int64_t first_row_;  // of the call's, as dropout counts them
  typename Product::template Kernel<Rows> kernel_;
  typename Product::template Kernel<RowsOfA> kernel_of_a_;
  std::vector<JobAdapter> adapters_;
  std::vector<LowRank> loras_;
  int pieces_;
  std::int64_t x_floats_, u_floats_;
  std::int64_t u_task_rows_ = 0, y_task_rows_ = 0;  // of A, and of W
  typename Product::Pieces x_, dropped_x_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
