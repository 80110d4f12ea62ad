// How blocks share the steps of all tiles of a tensor-core product (GemmConfig): each has a run of them, the end of a
// tile, whole tiles, the beginning of one. A block that has not the first step of a tile leaves its sums in memory for
// the one that has.
#pragma once

#include "device/elements.cuh"
#include "product/config.h"
#include "product/gemm/tile.cuh"
#include "product/product.cuh"
#include "simt/workspace.h"

namespace qlora_native::QLN_CUDA {

// What a block of a product with groups found out (tile_rows.cuh): how many tiles there are, and which it is at.
struct GroupedBlock {
  GemmConfig config;
  RowTile tile;
};

// Null, where no tile is shared.
struct SharedSums {
  float* of_runs;         // what each run leaves, a tile each
  std::uint32_t* ready;   // by run: whether it has left them
  std::uint32_t* ticket;  // how many blocks have begun
  GroupedBlock* of_blocks;
};

// On the host: memory for them, of a stream.
class SumsMemory {
 public:
  // The flags and the ticket come last, behind sums that are a whole number of vectors.
  SumsMemory(const GemmConfig& config, const Stream& stream)
      : blocks_(config.blocks),
        sums_(bytes_of<float>(config.blocks * config.tile_rows * config.tile_cols)),
        found_(config.grouped ? bytes_of<GroupedBlock>(blocks_) : 0),
        flags_(bytes_of<std::uint32_t>(blocks_ + 1)),
        workspace_(config.grouped || config.splits_a_tile() ? sums_ + found_ + flags_ : 0, stream) {
    if (workspace_.data() != nullptr) fill_bytes(workspace_.data() + sums_ + found_, 0, flags_, stream);
  }
  SharedSums shared() const {
    std::byte* const memory = workspace_.data();
    if (memory == nullptr) return {};
    auto* const ready = reinterpret_cast<std::uint32_t*>(memory + sums_ + found_);
    return {reinterpret_cast<float*>(memory), ready, ready + blocks_, reinterpret_cast<GroupedBlock*>(memory + sums_)};
  }

 private:
  template <class T>
  static std::size_t bytes_of(int count) {
    return static_cast<std::size_t>(count) * sizeof(T);
  }
  const int blocks_;
  const std::size_t sums_, found_, flags_;
  const Workspace workspace_;
};

// What the kernels of this folder take.
struct GemmArgs : Product {
  GemmArgs(const Product& product, const GemmConfig& config, const SumsMemory& memory)
      : Product(product),
        scales(scales_of(product.weight)),
        last_chunk(last_chunk_of(product.weight)),
        low_rank_vectors(rows_are_vectors(product.low_rank, product.low_rank.cols)),
        config(config),
        shared_sums(memory.shared()) {}

  WeightScales scales;
  std::uint32_t last_chunk;  // of an aligned weight
  bool low_rank_vectors;     // rows of low_rank are whole 16-byte vectors
  GemmConfig config;
  SharedSums shared_sums;
};

// A part of a run lies in one tile: it has the steps first ... first + count - 1 of that tile.
struct Part {
  int run;
  std::int64_t tile;
  int first, count;
  bool is_last;  // of the run
};

class Runs {
 public:
  __device__ Runs(const GemmConfig& config, const SharedSums& shared) : config_(config), shared_(shared) {}

  // The block's run, for one of its threads to ask. Where tiles are shared, runs are given out from the last to the
  // first, in the order in which blocks begin: a block waits for later runs alone, so for blocks that have begun.
  // Negative where there are fewer runs than blocks, because groups have fewer tiles than they might.
  __device__ int take() const {
    const auto begun = shared_.ticket == nullptr ? static_cast<int>(block_index()) : take_ticket(shared_.ticket);
    return config_.blocks - 1 - begun;
  }
  // What comes after so many steps of a run.
  __device__ Part part_after(int run, std::uint32_t done) const {
    const std::int64_t step = config_.begin_of(run) + done, rest = config_.begin_of(run + 1) - step;
    const int first = static_cast<int>(step % config_.steps), rest_of_tile = config_.steps - first;
    const bool is_last = rest <= rest_of_tile;
    return {run, step / config_.steps, first, is_last ? static_cast<int>(rest) : rest_of_tile, is_last};
  }
  // What begins with a step, counted over all runs.
  __device__ Part part_at(std::uint32_t step) const {
    const int run = config_.run_of(step);
    return part_after(run, static_cast<std::uint32_t>(step - config_.begin_of(run)));
  }
  // Whether `sums` are the tile's, with those of all other runs that have a part of it: they are added in the order of
  // the inner dimension. Else another run has the beginning of the tile, and the sums are left to it. kSums: of a tile.
  // Called by the block's first kGemmThreads threads, which `meet`.
  template <int kSums, class Sums, class Meet>
  __device__ __forceinline__ bool complete(const Part& part, Sums& sums, const Meet& meet) const {
    if (part.first > 0) {
      sums.leave(shared_.of_runs + std::int64_t{part.run} * kSums);
      meet();
      if (thread_index() == 0) signal(shared_.ready + part.run, 1);
      return false;
    }
    // The runs after this one that have the rest of the tile. A thread waits for each, all at once.
    const int last = config_.run_of((part.tile + 1) * config_.steps - 1);
    if (last > part.run) {
      for (int other = part.run + 1 + thread_index(); other <= last; other += kGemmThreads) {
        wait_for(shared_.ready + other, 1);
      }
      meet();
#pragma unroll 1
      for (int other = part.run + 1; other <= last; ++other) sums.add(shared_.of_runs + std::int64_t{other} * kSums);
    }
    return true;
  }
  template <int kSums, class Sums>
  __device__ __forceinline__ bool complete(const Part& part, Sums& sums) const {
    return complete<kSums>(part, sums, [] { sync_threads(); });
  }

 private:
  const GemmConfig& config_;
  const SharedSums& shared_;
};

}  // namespace qlora_native::QLN_CUDA
