#include "cpu/optimizer/optimizer_step.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/layout.h"
#include "cpu/runtime/parallel.h"

namespace qlora_native {
namespace {

// Elements of a task: its 16 bytes an element are a quarter of a megabyte, so that thousands of small tensors share
// few tasks and one large tensor makes enough of them for any number of threads.
constexpr std::int64_t kTaskElements = 64 * kOptimizer8bitBlocksize;

// The tensors one behind the other, each beginning a new block; cut into tasks of kTaskElements.
class Tasks {
 public:
  explicit Tasks(const Optimizer8bitArgs& args) : args_(args), begin_(static_cast<std::size_t>(args.count) + 1) {
    for (std::int64_t i = 0; i < args.count; ++i) {
      const std::int64_t blocks = ceil_div(args.tensors[i].elements, kOptimizer8bitBlocksize);
      begin_[static_cast<std::size_t>(i) + 1] = begin_[static_cast<std::size_t>(i)] + blocks * kOptimizer8bitBlocksize;
    }
  }

  std::int64_t count() const { return ceil_div(begin_.back(), kTaskElements); }

  // Calls f(index of the tensor, segment) for all that a task covers.
  template <class F>
  void run(std::int64_t task, const F& f) const {
    std::int64_t at = task * kTaskElements;
    const std::int64_t end = std::min(at + kTaskElements, begin_.back());
    auto next = std::upper_bound(begin_.begin(), begin_.end(), at);  // where the tensor after this one begins
    for (; at < end; at = *next++) {
      const std::int64_t index = next - begin_.begin() - 1;
      const Optimizer8bitTensor& tensor = args_.tensors[index];
      const std::int64_t begin = begin_[static_cast<std::size_t>(index)];
      f(index, OptimizerSegment{&tensor, at - begin, std::min(std::min(end, *next) - begin, tensor.elements)});
    }
  }

 private:
  const Optimizer8bitArgs& args_;
  std::vector<std::int64_t> begin_;
};

}  // namespace

void optimizer_8bit_step(const Optimizer8bitArgs& args, const OptimizerKernels& kernels) {
  const float inv_scale = args.inv_scale != nullptr ? *args.inv_scale : 1.0f;
  const Tasks tasks(args);
  std::atomic<bool> usable{args.found_inf == nullptr || *args.found_inf == 0.0f};
  if (usable) {
    parallel_for(tasks.count(), [&](std::int64_t task) {
      tasks.run(task, [&](std::int64_t, const OptimizerSegment& segment) {
        if (!kernels.is_usable(segment, inv_scale)) usable.store(false, std::memory_order_relaxed);
      });
    });
  }
  if (!usable) {
    ++*args.skipped;
    return;
  }
  std::vector<StepCoefficients> coefficients(static_cast<std::size_t>(args.count));
  with_rule(args.algorithm, [&]<class Rule>() {
    for (std::int64_t i = 0; i < args.count; ++i) {
      const Optimizer8bitTensor& tensor = args.tensors[i];
      coefficients[static_cast<std::size_t>(i)] =
          Rule::coefficients(args.groups[tensor.group], ++*tensor.step, inv_scale);
    }
  });
  parallel_for(tasks.count(), [&](std::int64_t task) {
    tasks.run(task, [&](std::int64_t index, const OptimizerSegment& segment) {
      kernels.update(args.algorithm, segment, coefficients[static_cast<std::size_t>(index)]);
    });
  });
}

}  // namespace qlora_native
