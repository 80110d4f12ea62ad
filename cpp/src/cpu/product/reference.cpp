// The scalar backend's products.
#include <algorithm>
#include <vector>

#include "common/layout.h"
#include "common/philox.h"
#include "cpu/isa/scalar/reference.h"
#include "cpu/product/linear.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"

namespace qlora_native::reference {
namespace {

// Rows of x or dy that are held in fp32 at a time: 16 rows of 32768 columns are 2 MB.
constexpr std::int64_t kTileRows = 16;
// Columns of an output that one task sums: four cache lines of doubles.
constexpr std::int64_t kTileCols = 32;

double* doubles(Slot slot, std::int64_t count) {
  return reinterpret_cast<double*>(scratch(slot, static_cast<std::size_t>(count) * sizeof(double)));
}

struct Dropout {
  std::uint64_t seed;
  std::uint32_t threshold;
  float scale;  // 1 / (1 - p)

  explicit Dropout(const LoraView& lora)
      : seed(dropout_seed(lora.seed, lora.device_seed)),
        threshold(dropout_threshold(lora.dropout)),
        scale(1.0f / (1.0f - lora.dropout)) {}
  bool keeps(std::int64_t m, std::int64_t k) const { return dropout_keeps(seed, m, k, threshold); }
};

// Element (r, k) of A, and (n, r) of `scaling` * B, as the product uses them: rounded to the dtype of x.
float lora_a(const LoraView& lora, std::int64_t r, std::int64_t k, std::int64_t K, DType dtype) {
  return round_to(dtype, load(lora.a, lora.dtype, r * K + k));
}
float lora_b(const LoraView& lora, std::int64_t n, std::int64_t r, float scaling, DType dtype) {
  return round_to(dtype, scaling * load(lora.b, lora.dtype, n * lora.rank + r));
}

class Adapters {
 public:
  Adapters(const LoraView& all, const RowGroups& groups, std::int64_t rows, std::int64_t N, std::int64_t K)
      : all_(all), rows_(adapter_rows(all, groups, rows)), N_(N), K_(K) {}
  // The adapters of rows m ... m+count-1, of rank 0 where a row has none.
  std::vector<LoraView> for_rows(std::int64_t m, std::int64_t count) const {
    std::vector<LoraView> loras;
    for (std::int64_t i = 0; i < count; ++i) loras.push_back(for_row(m + i));
    return loras;
  }

 private:
  LoraView for_row(std::int64_t m) const {
    LoraView lora = all_;
    lora.rank = 0;
    for (const AdapterRows& adapter : rows_) {
      if (m < adapter.begin || m >= adapter.end) continue;
      const auto at = [&](const void* data, std::int64_t elements) {
        return static_cast<const char*>(data) +
               adapter.adapter * all_.rank * elements * static_cast<std::int64_t>(size_of(all_.dtype));
      };
      lora.rank = all_.rank;
      lora.a = at(all_.a, K_);
      lora.b = at(all_.b, N_);
    }
    return lora;
  }

  LoraView all_;
  std::vector<AdapterRows> rows_;
  std::int64_t N_, K_;
};

// Calls f(which weight, first row, rows) for all rows, kTileRows at most that one weight multiplies.
template <class F>
void for_rows_of_weights(const QuantizedWeightView& weight, const RowGroups& groups, std::int64_t rows, const F& f) {
  for (const WeightRows& part : weight_rows(weight, groups, rows, {}))
    for (std::int64_t m = part.begin; m < part.end; m += kTileRows)
      f(part.weight, m, std::min(kTileRows, part.end - m));
}

// emit(r, c, sum of low_rank[m,r] * dense(m,c) over the adapter's rows) for every r < rank and c < cols.
template <class Dense, class Emit>
void sum_over_rows(const ConstMatrix& low_rank, const AdapterRows& adapter, std::int64_t cols, const Dense& dense,
                   const Emit& emit) {
  const std::int64_t rank = low_rank.cols;
  parallel_for(ceil_div(cols, kTileCols), [&](std::int64_t task) {
    const std::int64_t c0 = task * kTileCols, count = std::min(kTileCols, cols - c0);
    double* sum = doubles(Slot::thread, rank * kTileCols);
    std::fill(sum, sum + rank * kTileCols, 0.0);
    for (std::int64_t m = adapter.begin; m < adapter.end; ++m) {
      float row[kTileCols];
      for (std::int64_t c = 0; c < count; ++c) row[c] = dense(m, c0 + c);
      for (std::int64_t r = 0; r < rank; ++r) {
        const double factor = at(low_rank, m, r);
        for (std::int64_t c = 0; c < count; ++c) sum[r * kTileCols + c] += factor * row[c];
      }
    }
    for (std::int64_t r = 0; r < rank; ++r) {
      for (std::int64_t c = 0; c < count; ++c) emit(r, c0 + c, sum[r * kTileCols + c]);
    }
  });
}

}  // namespace

void linear_forward(const LinearForwardArgs& args, const Stream&) {
  const std::int64_t N = args.weight.N, K = args.weight.K, rank = args.lora.rank;
  const DType dtype = args.x.dtype;
  const Dropout dropout(args.lora);
  const Adapters adapters(args.lora, args.groups, args.x.rows, N, K);

  for_rows_of_weights(args.weight, args.groups, args.x.rows,
                      [&](std::int64_t weight, std::int64_t m0, std::int64_t rows) {
                        float* x = scratch_floats(Slot::call, rows * (K + rank));  // [rows, K]
                        float* u = x + rows * K;                                   // [rows, rank]
                        const std::vector<LoraView> loras = adapters.for_rows(m0, rows);
                        parallel_for(rows, [&](std::int64_t i) {
                          for (std::int64_t k = 0; k < K; ++k) x[i * K + k] = at(args.x, m0 + i, k);
                          if (rank == 0) return;
                          const LoraView& lora = loras[static_cast<std::size_t>(i)];
                          float* dropped = scratch_floats(Slot::thread, K);
                          for (std::int64_t k = 0; k < K; ++k)
                            dropped[k] = dropout.keeps(m0 + i, k) ? x[i * K + k] : 0.0f;
                          for (std::int64_t r = 0; r < rank; ++r) {
                            double sum = 0.0;
                            for (std::int64_t k = 0; k < K && lora.rank > 0; ++k)
                              sum += double{dropped[k]} * lora_a(lora, r, k, K, dtype);
                            u[i * rank + r] = round_to(dtype, static_cast<float>(sum * dropout.scale));
                            if (args.u.data != nullptr)
                              store(args.u.data, dtype, (m0 + i) * args.u.stride + r, u[i * rank + r]);
                          }
                        });
                        parallel_for(N, [&](std::int64_t n) {
                          float* w = scratch_floats(Slot::thread, K);  // row n of W
                          decode(args.weight, (weight * N + n) * K, K, dtype, w);
                          for (std::int64_t i = 0; i < rows; ++i) {
                            const LoraView& lora = loras[static_cast<std::size_t>(i)];
                            double sum = args.bias != nullptr ? load(args.bias, dtype, weight * N + n) : 0.0f;
                            for (std::int64_t k = 0; k < K; ++k) sum += double{x[i * K + k]} * w[k];
                            for (std::int64_t r = 0; r < lora.rank; ++r)
                              sum += double{u[i * rank + r]} * lora_b(lora, n, r, lora.scaling, dtype);
                            store(args.y.data, dtype, (m0 + i) * args.y.stride + n, static_cast<float>(sum));
                          }
                        });
                      });
}

void linear_backward_input(const LinearBackwardInputArgs& args, const Stream&) {
  const std::int64_t N = args.weight.N, K = args.weight.K, rank = args.lora.rank;
  const DType dtype = args.dy.dtype;
  const Dropout dropout(args.lora);
  const Adapters adapters(args.lora, args.groups, args.dy.rows, N, K);

  for_rows_of_weights(
      args.weight, args.groups, args.dy.rows, [&](std::int64_t weight, std::int64_t m0, std::int64_t rows) {
        float* dy = scratch_floats(Slot::call, rows * (N + rank));  // [rows, N]
        float* v = dy + rows * N;                                   // [rows, rank]
        const std::vector<LoraView> loras = adapters.for_rows(m0, rows);
        parallel_for(rows, [&](std::int64_t i) {
          const LoraView& lora = loras[static_cast<std::size_t>(i)];
          for (std::int64_t n = 0; n < N; ++n) dy[i * N + n] = at(args.dy, m0 + i, n);
          for (std::int64_t r = 0; r < rank; ++r) {
            double sum = 0.0;
            for (std::int64_t n = 0; n < N && lora.rank > 0; ++n)
              sum += double{dy[i * N + n]} * lora_b(lora, n, r, 1.0f, dtype);
            v[i * rank + r] = round_to(dtype, static_cast<float>(sum * (lora.scaling * dropout.scale)));
            if (args.v.data != nullptr) store(args.v.data, dtype, (m0 + i) * args.v.stride + r, v[i * rank + r]);
          }
        });
        if (args.dx.data == nullptr) return;
        parallel_for(ceil_div(K, kTileCols), [&](std::int64_t task) {
          const std::int64_t k0 = task * kTileCols, cols = std::min(kTileCols, K - k0);
          double sum[kTileRows][kTileCols] = {};
          float w[kTileCols];
          for (std::int64_t n = 0; n < N; ++n) {
            decode(args.weight, (weight * N + n) * K + k0, cols, dtype, w);
            for (std::int64_t i = 0; i < rows; ++i) {
              for (std::int64_t k = 0; k < cols; ++k) sum[i][k] += double{dy[i * N + n]} * w[k];
            }
          }
          for (std::int64_t i = 0; i < rows; ++i) {
            const LoraView& lora = loras[static_cast<std::size_t>(i)];
            for (std::int64_t k = 0; k < cols; ++k) {
              if (lora.rank > 0 && dropout.keeps(m0 + i, k0 + k)) {
                for (std::int64_t r = 0; r < rank; ++r) {
                  sum[i][k] += double{v[i * rank + r]} * lora_a(lora, r, k0 + k, K, dtype);
                }
              }
              store(args.dx.data, dtype, (m0 + i) * args.dx.stride + k0 + k, static_cast<float>(sum[i][k]));
            }
          }
        });
      });
}

void lora_gradients(const LoraGradientsArgs& args, const Stream&) {
  const std::int64_t N = args.dy.cols, K = args.x.cols, rank = args.lora.rank;
  if (rank == 0) return;
  const Dropout dropout(args.lora);
  for (const AdapterRows& adapter : adapter_rows(args.lora, args.groups, args.x.rows)) {
    if (args.da != nullptr) {
      sum_over_rows(
          args.v, adapter, K,
          [&](std::int64_t m, std::int64_t k) { return dropout.keeps(m, k) ? at(args.x, m, k) : 0.0f; },
          [&](std::int64_t r, std::int64_t k, double sum) {
            store(args.da, args.lora.dtype, (adapter.adapter * rank + r) * K + k, static_cast<float>(sum));
          });
    }
    if (args.db != nullptr) {
      sum_over_rows(
          args.u, adapter, N, [&](std::int64_t m, std::int64_t n) { return at(args.dy, m, n); },
          [&](std::int64_t r, std::int64_t n, double sum) {
            store(args.db, args.lora.dtype, (adapter.adapter * N + n) * rank + r,
                  static_cast<float>(sum * args.lora.scaling));
          });
    }
  }
}

}  // namespace qlora_native::reference
