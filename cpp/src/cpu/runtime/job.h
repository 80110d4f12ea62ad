// Work for the thread pool that may run beside other work, as the products of a mixture's experts do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace qlora_native {

// A product, or as many of its rows as its memory allows, in stages of tasks (run_stages in parallel.h).
class Job {
 public:
  static constexpr int kStages = 4;

  Job() = default;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  virtual ~Job();

  // How many of the requested rows this job computes, from the first on.
  std::int64_t rows() const { return rows_; }
  // Bytes of memory that its tasks share.
  std::int64_t bytes() const { return bytes_; }
  std::int64_t tasks(int stage) const { return tasks_[stage]; }

  // Chooses the tasks for so many threads. No result depends on it.
  virtual void cut(std::int64_t threads) = 0;
  // Takes bytes() of memory; called once, by one thread, before the first stage.
  virtual void prepare(std::byte* memory) = 0;
  virtual void run(int stage, std::int64_t task) = 0;

  // Whether it uses the pool by itself, so that nothing may run beside it. It is then one task of the calling thread.
  virtual bool runs_alone() const;

 protected:
  std::int64_t rows_ = 0, bytes_ = 0, tasks_[kStages] = {};
};

// Runs jobs side by side. A stage begins when the one before it has ended in every job. The jobs share the memory of
// one call; those that do not fit run after the others.
class Jobs {
 public:
  void add(std::unique_ptr<Job> job);
  void run();

 private:
  std::vector<std::unique_ptr<Job>> jobs_;
  std::int64_t bytes_ = 0;
};

}  // namespace qlora_native
