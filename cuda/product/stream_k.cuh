// Stream-K: how blocks share the steps of all tiles of a tensor-core product (GemmConfig). Each has a run of them: the
// end of a tile, whole tiles, and the beginning of one. A block that does not have the first step of a tile stores its
// partial sums in memory, for the block that does.
#pragma once

#include "device/elements.cuh"
#include "product/config.h"
#include "product/product.cuh"
#include "product/tile.cuh"
#include "runtime/workspace.h"

namespace qlora_native::QLN_CUDA {

// What a block of a product with groups has found (tile_rows.cuh): how many tiles there are, and its tile.
struct GroupedBlock {
  GemmConfig config;
  RowTile tile;
};

// Memory that blocks share. The pointers are null where no tile is shared and there are no groups.
struct StreamKMemory {
  float* partial_sums;    // a tile's partial sums, for each run
  std::uint32_t* ready;   // by run: whether it has stored them
  std::uint32_t* ticket;  // how many blocks have begun
  GroupedBlock* blocks;
};

// Allocates that memory in a stream; on the host. `counters` has room for config.counters().
class StreamKWorkspace {
 public:
  StreamKWorkspace(const GemmConfig& config, Counters& counters, const Stream& stream)
      : blocks_(config.blocks),
        partial_sums_bytes_(bytes_of<float>(config.blocks * config.tile_rows * config.tile_cols)),
        workspace_(
            config.counters() == 0 ? 0 : partial_sums_bytes_ + (config.grouped ? bytes_of<GroupedBlock>(blocks_) : 0),
            stream),
        ready_(counters.take(config.counters())) {}
  StreamKMemory memory() const {
    std::byte* const memory = workspace_.data();
    if (memory == nullptr) return {};
    return {reinterpret_cast<float*>(memory), ready_, ready_ + blocks_,
            reinterpret_cast<GroupedBlock*>(memory + partial_sums_bytes_)};
  }

 private:
  template <class T>
  static std::size_t bytes_of(int count) {
    return static_cast<std::size_t>(count) * sizeof(T);
  }
  const int blocks_;
  const std::size_t partial_sums_bytes_;
  const Workspace workspace_;
  std::uint32_t* const ready_;
};

// The arguments of the kernels of this folder, and of wgmma/.
struct GemmArgs : Product {
  GemmArgs(const Product& product, const GemmConfig& config, const StreamKMemory& memory)
      : Product(product),
        scales(scales_of(product.weight)),
        last_chunk(last_chunk_of(product.weight)),
        u_has_vectors(rows_are_vectors(product.u, product.u.cols)),
        config(config),
        stream_k(memory) {}

  WeightScales scales;
  std::uint32_t last_chunk;  // of an aligned weight
  bool u_has_vectors;        // rows of U or V are whole 16-byte vectors
  GemmConfig config;
  StreamKMemory stream_k;
};

// A part of a run lies in one tile: it has steps first ... first + count - 1 of that tile.
struct TilePart {
  int run;
  std::int64_t tile;
  int first, count;
  bool is_last;  // of the run
};

class StreamK {
 public:
  __device__ StreamK(const GemmConfig& config, const StreamKMemory& memory) : config_(config), memory_(memory) {}

  // Takes the block's run; one of its threads calls this. Where tiles are shared, tickets assign runs from the last to
  // the first, in the order in which blocks begin. A block waits for later runs alone, and so for blocks that have
  // begun. The run is negative where there are fewer runs than blocks, because groups have fewer tiles than they might
  // have.
  __device__ int take_run() const {
    const auto begun = memory_.ticket == nullptr ? static_cast<int>(block_index()) : take_ticket(memory_.ticket);
    return config_.blocks - 1 - begun;
  }
  // The part that follows the first `done` steps of a run.
  __device__ TilePart part_after(int run, std::uint32_t done) const {
    const std::int64_t step = config_.first_step(run) + done, rest = config_.first_step(run + 1) - step;
    const int first = static_cast<int>(step % config_.steps), rest_of_tile = config_.steps - first;
    const bool is_last = rest <= rest_of_tile;
    return {run, step / config_.steps, first, is_last ? static_cast<int>(rest) : rest_of_tile, is_last};
  }
  // The part that begins with a step; steps are counted over all runs.
  __device__ TilePart part_at(std::uint32_t step) const {
    const int run = config_.run_of(step);
    return part_after(run, static_cast<std::uint32_t>(step - config_.first_step(run)));
  }
  // Completes the accumulators of a tile. If the part has the tile's beginning, this adds the partial sums of all other
  // runs that have a part of the tile, in the order of the inner dimension, and returns true. Otherwise it stores
  // `accumulators` for the run that has the beginning, and returns false. The block's first kGemmThreads threads call
  // this, and `sync` is their barrier.
  template <int kTileElements, class Accumulators, class Sync>
  __device__ __forceinline__ bool complete_tile(const TilePart& part, Accumulators& accumulators,
                                                const Sync& sync) const {
    if (part.first > 0) {
      store(accumulators, memory_.partial_sums + std::int64_t{part.run} * kTileElements);
      sync();
      if (thread_index() == 0) signal(memory_.ready + part.run, 1);
      return false;
    }
    // The runs after this one have the rest of the tile. A thread waits for each of them, all threads at once.
    const int last = config_.run_of((part.tile + 1) * config_.steps - 1);
    if (last > part.run) {
      for (int other = part.run + 1 + thread_index(); other <= last; other += kGemmThreads) {
        wait_for(memory_.ready + other, 1);
      }
      sync();
#pragma unroll 1
      for (int other = part.run + 1; other <= last; ++other) {
        add(accumulators, memory_.partial_sums + std::int64_t{other} * kTileElements);
      }
    }
    return true;
  }
  template <int kTileElements, class Accumulators>
  __device__ __forceinline__ bool complete_tile(const TilePart& part, Accumulators& accumulators) const {
    return complete_tile<kTileElements>(part, accumulators, [] { sync_threads(); });
  }

 private:
  // In memory the partial sums have the order in which threads hold them: a vector of each thread, then the next.
  template <class Accumulators>
  __device__ __forceinline__ static void store(Accumulators& accumulators, float* run) {
    float* const to = run + thread_index() * 4;
#pragma unroll
    for (int i = 0; i < Accumulators::kVectors; ++i) {
      const float* const s = accumulators.vector(i);
      store_vector<float, 4>(to + i * kGemmThreads * 4, {{s[0], s[1], s[2], s[3]}});
    }
  }
  template <class Accumulators>
  __device__ __forceinline__ static void add(Accumulators& accumulators, const float* run) {
    const float* const from = run + thread_index() * 4;
#pragma unroll
    for (int i = 0; i < Accumulators::kVectors; ++i) {
      const auto s = load_vector<float, 4>(from + i * kGemmThreads * 4);
      float* const to = accumulators.vector(i);
#pragma unroll
      for (int part = 0; part < 4; ++part) to[part] += s.at[part];
    }
  }

  const GemmConfig& config_;
  const StreamKMemory& memory_;
};

}  // namespace qlora_native::QLN_CUDA
