// linear_backward_input and lora_gradients, which all are products of ProductNn.
#pragma once

#include <memory>

#include "cpu/product/job_operands-inl.h"
#include "cpu/product/product_nn-inl.h"
#include "cpu/runtime/job.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "qlora_native/runtime.h"

namespace qlora_native::QLN_ISA {
namespace {

// Writes the accumulators of one row and chunk, times `scale`, to row `row` of out, from column `col` on.
template <DType kTo, int kVectors>
void write_row(Matrix out, std::int64_t row, std::int64_t col, const F32 (&accumulators)[kVectors], float scale) {
  constexpr auto kTarget = static_cast<std::int64_t>(size_of(kTo));
  char* p = static_cast<char*>(out.data) + (row * out.stride + col) * kTarget;
  for (int i = 0; i < kVectors && col + i * kLanes < out.cols; ++i)
    store_from_f32<kTo>(p + i * kLanes * kTarget, mul(accumulators[i], set1(scale)),
                        static_cast<int>(smaller<std::int64_t>(kLanes, out.cols - col - i * kLanes)));
}
// Writes them to column `row` of out, from row `col` on.
template <DType kTo, int kVectors>
void write_column(Matrix out, std::int64_t row, std::int64_t col, const F32 (&accumulators)[kVectors], float scale) {
  constexpr auto kTarget = static_cast<std::int64_t>(size_of(kTo));
  char values[kChunk * kTarget];
  for (int i = 0; i < kVectors; ++i)
    store_from_f32<kTo>(values + i * kLanes * kTarget, mul(accumulators[i], set1(scale)));
  const std::int64_t count = smaller<std::int64_t>(kChunk, out.rows - col);
  for (std::int64_t i = 0; i < count; ++i)
    __builtin_memcpy(static_cast<char*>(out.data) + ((col + i) * out.stride + row) * kTarget, values + i * kTarget,
                     kTarget);
}

// dX = dY . W + mask o (V . A). Stage 0 packs dY, 1 computes V, 2 packs it, 3 multiplies. Where dY has more columns
// than a call has memory for, as the logits of a vocabulary, they are packed and multiplied part by part, and the sums
// go on from part to part; W would else be decoded again for every few rows. This class has all that does not depend on
// how W is stored.
template <class Dot>
class BackwardInputOf : public Job {
 public:
  BackwardInputOf(const LinearBackwardInputArgs& args, const WeightRows& part) : args_(args) {
    const LoraView& lora = args.lora;
    v_stride_ = lora.rank > 0 ? Product::packed_stride(Product::units_of(lora.rank)) : 0;
    rows_ = part.end - part.begin;
    cut_dy(args.weight, lora.rank);
    first_row_ = part.begin;
    args_ = args_of(args, part, rows_);
    strips_ = Strips(rows_);
    adapters_ = job_adapters(lora, part, rows_, args.weight);
    std::int64_t strip = 0;
    for (const JobAdapter& adapter : adapters_) {
      const Range strips = strips_.of({adapter.begin, adapter.end}, strip);
      low_ranks_.push_back(
          {nullptr, DenseRows<Dot, false>(lora_a(adapter.lora, args.weight.K)), {adapter.begin, adapter.end}, strips});
      strip = strips.end - 1;
      packed_v_rows_ += strips_.first_packed(strips.end) - strips_.first(strips.begin);
      floats_kept_ += Product::kept_floats(strips, lora.rank);
    }
    floats_dy_ = strips_.packed_rows() * Product::packed_stride(units_.count());
    floats_v_ = packed_v_rows_ * v_stride_;
    // V's and dX's accumulators are not kept at the same time.
    floats_kept_ = in_parts() ? larger(floats_kept_, Product::kept_floats({0, strips_.count}, args.weight.K)) : 0;
    bytes_ = (floats_dy_ + floats_v_ + floats_kept_) * 4;
    if (!adapters_.empty() && args.v.data == nullptr) bytes_ += rows_ * lora.rank * kSize;
  }

  void cut(std::int64_t threads) override {
    tasks_[0] = strips_.count;
    for (std::size_t i = 0; i < adapters_.size(); ++i) {
      v_cuts_.push_back(Product::cut(strips_, low_ranks_[i].strips, args_.lora.rank, Decoded::in_panels, threads));
      tasks_[1] += v_cuts_.back().tasks();
    }
    if (args_.dx.data == nullptr) return;
    for (const LowRank& low_rank : low_ranks_) tasks_[2] += low_rank.strips.count();
    cut_ = Product::cut(strips_, {0, strips_.count}, args_.weight.K, decoded(), threads);
    tasks_[3] = cut_.tasks();
  }
  void prepare(std::byte* memory) override {
    dy_ = reinterpret_cast<float*>(memory);
    float* v = dy_ + floats_dy_;
    for (LowRank& low_rank : low_ranks_) {
      low_rank.v = v;
      v += (strips_.first_packed(low_rank.strips.end) - strips_.first(low_rank.strips.begin)) * v_stride_;
    }
    if (in_parts()) kept_ = v;
    v += floats_kept_;
    if (!adapters_.empty() && args_.v.data == nullptr)
      args_.v = {v, Dot::kActivation, rows_, args_.lora.rank, args_.lora.rank};
  }
  bool runs_alone() const override { return in_parts(); }
  void run(int stage, std::int64_t task) override {
    if (in_parts()) return multiply_parts();
    switch (stage) {
      case 0:
        return pack_dy(task);
      case 1:
        return compute_v(task);
      case 2:
        return pack_v(task);
      default:
        return multiply(task);
    }
  }

 protected:
  using Product = ProductNn<Dot>;
  using Decoded = typename Product::Decoded;

  virtual Decoded decoded() const = 0;  // how W is
  virtual void multiply(std::int64_t task) = 0;

  template <class Rows>
  void multiply_with(const Rows& w, std::int64_t task) {
    const Dropout dropout = adapters_.empty() ? Dropout{} : dropout_of(args_.lora);
    Product::product(cut_, task, {dy_, units_}, strips_, w, {low_ranks_, dropout, first_row_}, kept(0),
                     [&](std::int64_t row, std::int64_t col, F32(&accumulators)[kVectors]) {
                       write_row<Dot::kActivation>(args_.dx, row, col, accumulators, 1.0f);
                     });
  }

 private:
  using Strips = typename Product::Strips;
  using LowRank = typename Product::LowRank;
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));
  static constexpr int kVectors = Dot::kColumnVectors;
  static constexpr std::int64_t kManyRows = 256;  // multiplying them takes so long that decoding W hardly matters
  static constexpr std::int64_t kMinPartUnits = 256;
  // So many bytes of packed dY stay in the second-level cache beside the panels, over all columns of dX.
  static constexpr std::int64_t kPartBytes = kTunedL2 - Product::kPanels * Product::kPanelFloats * 4;

  // Chooses how many rows, and how many units of them, are packed at once.
  void cut_dy(const QuantizedWeightView& weight, std::int64_t rank) {
    all_units_ = Product::units_of(weight.N);
    units_ = {0, all_units_};
    const auto row_bytes = [&](std::int64_t units, std::int64_t kept_floats) {
      return (Product::packed_stride(units) + 2 * v_stride_ + kept_floats) * 4;
    };
    const std::int64_t rows = rows_;
    rows_ = smaller(rows, rows_per_block(rows, row_bytes(all_units_, 0), Product::kStripRows));
    const bool fits = rows_ * row_bytes(all_units_, 0) <= kPackedBytes;
    if (fits && (rows_ == rows || rows_ >= kManyRows)) return;
    if (!kOneChain<Dot>) return;  // sums that begin anew now and then are not kept
    const std::int64_t kept_floats = ceil_div(larger(weight.K, rank), kChunk) * kChunk;
    const std::int64_t rows_of_part =
        smaller(rows, rows_per_block(rows, row_bytes(kMinPartUnits, kept_floats), Product::kStripRows));
    if (fits && rows_of_part <= rows_) return;
    rows_ = rows_of_part;
    const std::int64_t fitting = scaled_to_l2(kPartBytes, 1, caches()) / (rows_ * 4);
    units_.end = smaller(all_units_, larger<std::int64_t>(fitting / kMinPartUnits, 1) * kMinPartUnits);
  }
  bool in_parts() const { return units_.count() < all_units_; }

  void pack_dy(std::int64_t strip) {
    ConstMatrix dy = args_.dy;
    dy.data = elements_at(dy.data, dy.dtype, units_.begin * Dot::kElementsPerUnit);
    dy.cols = smaller(units_.end * Dot::kElementsPerUnit, dy.cols) - units_.begin * Dot::kElementsPerUnit;
    Product::pack_strip(dy, {strips_.first(strip), strips_.first_packed(strip + 1)},
                        dy_ + strips_.first(strip) * Product::packed_stride(units_.count()));
  }
  void multiply_parts() {
    cut(num_threads());
    prepare(scratch(Slot::call, static_cast<std::size_t>(bytes_)));
    const Range first = units_;
    const auto each_part = [&](std::int64_t tasks, const auto& multiply) {
      for (units_ = first; units_.begin < all_units_;
           units_ = {units_.end, smaller(units_.end + first.count(), all_units_)})
        parallel_stages(Stage{strips_.count, [this](std::int64_t strip) { pack_dy(strip); }}, Stage{tasks, multiply});
    };
    if (tasks_[1] > 0) each_part(tasks_[1], [this](std::int64_t task) { compute_v(task); });
    parallel_for(tasks_[2], [this](std::int64_t task) { pack_v(task); });
    if (tasks_[3] > 0) each_part(tasks_[3], [this](std::int64_t task) { multiply(task); });
  }
  // The accumulators of this part, which begin so many floats after the first.
  typename Product::Kept kept(std::int64_t first) const {
    if (kept_ == nullptr) return {};
    return {kept_ + first, units_.begin != 0, units_.end == all_units_};
  }

  DenseRows<Dot, true> b_of(const JobAdapter& adapter) const { return lora_b(adapter.lora, args_.weight.N); }

  // Computes V = s/(1-p) * dY . B of one adapter. In the strips that it shares with others, only the rows of this
  // adapter are written.
  void compute_v(std::int64_t task) {
    std::size_t i = 0;
    std::int64_t before = 0;
    for (; task >= v_cuts_[i].tasks(); task -= v_cuts_[i++].tasks())
      before += Product::kept_floats(v_cuts_[i].strips, args_.lora.rank);
    const JobAdapter& adapter = adapters_[i];
    const float scale = adapter.lora.scaling * dropout_scale(adapter.lora);
    Product::product(v_cuts_[i], task, {dy_, units_}, strips_, b_of(adapter), {}, kept(before),
                     [&](std::int64_t row, std::int64_t col, F32(&accumulators)[kVectors]) {
                       if (row >= adapter.begin && row < adapter.end)
                         write_row<Dot::kActivation>(args_.v, row, col, accumulators, scale);
                     });
  }
  // Packs one strip of the V of one adapter.
  void pack_v(std::int64_t task) {
    std::size_t i = 0;
    for (; task >= low_ranks_[i].strips.count(); ++i) task -= low_ranks_[i].strips.count();
    const JobAdapter& adapter = adapters_[i];
    const LowRank& low_rank = low_ranks_[i];
    const std::int64_t strip = low_rank.strips.begin + task, first = strips_.first(strip);
    Product::pack_strip(readable(rows_of(args_.v, adapter.begin, adapter.end - adapter.begin)),
                        {first - adapter.begin, strips_.first_packed(strip + 1) - adapter.begin},
                        low_rank.v + (first - strips_.first(low_rank.strips.begin)) * v_stride_);
  }

  LinearBackwardInputArgs args_;  // of this job's rows
  std::int64_t first_row_;        // of the call's, as dropout counts them
  Strips strips_{0};
  std::vector<JobAdapter> adapters_;
  std::vector<LowRank> low_ranks_;  // one for each of these
  std::int64_t all_units_;          // of dY's columns
  Range units_;                     // of these, that are packed now
  std::int64_t v_stride_, packed_v_rows_ = 0;
  std::int64_t floats_dy_, floats_v_, floats_kept_ = 0;
  std::vector<typename Product::Cut> v_cuts_;
  typename Product::Cut cut_;
  float* dy_ = nullptr;
  float* kept_ = nullptr;  // accumulators, if the columns of dY are packed in parts
};

template <class Dot, class Rows>
class BackwardInput final : public BackwardInputOf<Dot> {
 public:
  BackwardInput(const Rows& w, const LinearBackwardInputArgs& args, const WeightRows& part)
      : BackwardInputOf<Dot>(args, part), w_(w) {}

 private:
  typename ProductNn<Dot>::Decoded decoded() const override { return ProductNn<Dot>::decoded(w_, this->rows_); }
  void multiply(std::int64_t task) override { this->multiply_with(w_, task); }

  Rows w_;
};

// dA = V^T . drop(X), or dB^T = s * U^T . dY. Both are low_rank[rows, rank]^T . dense[rows, cols], whose inner
// dimension are the rows of x that the adapter is for. Stage 0 transposes low_rank, 1 packs it, 2 multiplies.
template <class Dot>
class LoraGradient final : public Job {
 public:
  LoraGradient(Gradient gradient, const LoraGradientsArgs& args, const AdapterRows& part, std::int64_t first)
      : gradient_(gradient), first_(first), dtype_(args.lora.dtype) {
    const LoraView& lora = args.lora;
    inner_ = part.end - part.begin;
    const bool is_a = gradient == Gradient::a;
    low_rank_ = rows_of(is_a ? args.v : args.u, part.begin, inner_);
    const ConstMatrix dense = rows_of(is_a ? args.x : args.dy, part.begin, inner_);
    dense_ = DenseRows<Dot, false>(dense, 1.0f, is_a ? dropout_of(lora) : Dropout{}, part.begin);
    const std::int64_t elements = part.adapter * lora.rank * dense.cols;
    if (is_a)
      out_ = {elements_at(args.da, dtype_, elements), dtype_, lora.rank, dense.cols, dense.cols};
    else
      out_ = {elements_at(args.db, dtype_, elements), dtype_, dense.cols, lora.rank, lora.rank};
    scale_ = is_a ? 1.0f : lora.scaling;
    stride_ = Product::packed_stride(Product::units_of(inner_));
    rows_ = smaller(lora.rank - first, rows_per_block(lora.rank, stride_ * 4 + inner_ * kSize, Product::kStripRows));
    strips_ = Strips(rows_);
    bytes_ = strips_.packed_rows() * stride_ * 4 + rows_ * inner_ * kSize;
  }

  void cut(std::int64_t threads) override {
    cut_ = Product::cut(strips_, {0, strips_.count}, dense_.cols(), Product::decoded(dense_, rows_), threads,
                        kMinTasksOfThread);
    tasks_[0] = ceil_div(inner_, kTransposedRows);
    tasks_[1] = strips_.count;
    tasks_[2] = cut_.tasks();
  }
  void prepare(std::byte* memory) override {
    packed_ = reinterpret_cast<float*>(memory);
    transposed_ = reinterpret_cast<char*>(packed_ + strips_.packed_rows() * stride_);
  }
  void run(int stage, std::int64_t task) override {
    switch (stage) {
      case 0:
        return transpose_low_rank(task);
      case 1:
        return Product::pack_strip({transposed_, Dot::kActivation, rows_, inner_, inner_},
                                   {strips_.first(task), strips_.first_packed(task + 1)},
                                   packed_ + strips_.first(task) * stride_);
      default:
        return Product::product(cut_, task, {packed_, {0, Product::units_of(inner_)}}, strips_, dense_, {}, {},
                                [&](std::int64_t row, std::int64_t col, F32(&accumulators)[kVectors]) {
                                  write(first_ + row, col, accumulators);
                                });
    }
  }

 private:
  using Product = ProductNn<Dot>;
  using Strips = typename Product::Strips;
  static constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));
  static constexpr int kVectors = Dot::kColumnVectors;
  static constexpr std::int64_t kTransposedRows = 64;  // rows of low_rank that a task transposes
  // dA and dB are computed side by side, and one may be much wider than the other.
  static constexpr std::int64_t kMinTasksOfThread = 4;

  void transpose_low_rank(std::int64_t task) {
    const char* from = static_cast<const char*>(low_rank_.data) + first_ * kSize;
    const std::int64_t end = smaller((task + 1) * kTransposedRows, inner_);
    for (std::int64_t m = task * kTransposedRows; m < end; ++m)
      for (std::int64_t r = 0; r < rows_; ++r)
        __builtin_memcpy(transposed_ + (r * inner_ + m) * kSize, from + (m * low_rank_.stride + r) * kSize, kSize);
  }
  void write(std::int64_t row, std::int64_t col, const F32 (&accumulators)[kVectors]) const {
    with_dtype(dtype_, [&](auto dtype) {
      gradient_ == Gradient::a ? write_row<dtype()>(out_, row, col, accumulators, scale_)
                               : write_column<dtype()>(out_, row, col, accumulators, scale_);
    });
  }

  Gradient gradient_;
  std::int64_t first_;  // the first rank of this job
  DType dtype_;
  ConstMatrix low_rank_;
  DenseRows<Dot, false> dense_{ConstMatrix{}};
  Matrix out_;
  float scale_;
  std::int64_t inner_, stride_;
  Strips strips_{0};
  typename Product::Cut cut_;
  float* packed_ = nullptr;
  char* transposed_ = nullptr;
};

template <class Dot>
std::unique_ptr<Job> lora_gradient(Gradient gradient, const LoraGradientsArgs& args, const AdapterRows& part,
                                   std::int64_t first) {
  return std::make_unique<LoraGradient<Dot>>(gradient, args, part, first);
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
