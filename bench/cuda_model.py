"""How long a product with a 4-bit weight takes on a GPU, by a model of its blocks. No GPU has confirmed it yet.

A block has a run of steps (GemmConfig in cuda/product/config.h). Its time is the sum of

    begin      latencies of memory, for the table of codes and for the first stage, and a step that nothing hides; by
               wgmma the table and the stage come at the same time, but runs wait for a ticket first
    steps      each takes the cycles of the resource that takes longest
    pairs      a barrier of the cluster before the first step, where two blocks load rows of X for both (hopper/), which
               halves what these take of L2
    restart    a latency and a step for each further tile, where the pipeline drains between tiles (gemm/)
    join       by wgmma two warpgroups have sums of the same columns of dX, and exchange them through shared memory
    adapter    a step at the beginning of each tile, and latencies, because the loops that load B are not unrolled
    exchange   where runs share a tile: all but one store their sums in fp32, and the one that has the tile's beginning
               waits for them and adds them, one after another. Where a cluster shares a tile (hopper/): each block
               stores its sums into the shared memory of the others after a barrier, and adds a part of them, in turns
    result     storing a tile

To the resources of cycles.py come L2, through which each tile loads its operands, and the whole card's DRAM, through
which each operand passes once. Two blocks of a multiprocessor take turns at its resources. A product takes as long as
its slowest block, and LAUNCH for each kernel and each memset that nothing hides.

Panels take the dense product's measured rate. At best only the first panel's decoding shows, at worst that of all. U or
V takes two launches at most, and while it is made, the kernel of a product that decodes on the way is launched. What is
left out makes everything slower: bank conflicts, waits at barriers, a clock that falls, and X where it does not stay in
L2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cycles
from cycles import BYTES_OF_WEIGHT, LANES, SCHEDULERS, STEP, Device

H100 = cycles.DEVICES["sm_90a"]
H200 = dataclasses.replace(H100, name="H200", bandwidth=4.8e12)
# Bytes a second from L2 to all multiprocessors: "Measured H100 L2 bandwidth" of openxla/xla,
# xla/service/gpu/model/gpu_dot_fusion_cost_model.cc. An H200 has the same L2.
L2_BANDWIDTH = 6.65e12
# Bytes a cycle: what a multiprocessor gets from L2 at most, however few ask, which is an assumption; and what it stores
# of a result, of which eight lanes fill 32 bytes (hopper/tile.cuh).
PORT, STORED = 64, 32
# Cycles until a load arrives: an H100 SXM in github.com/markdewing/AI_kernels, latency/README.md.
L2_LATENCY, DRAM_LATENCY = 291, 700
# Bytes a second that all multiprocessors load from the shared memory of others, by blocks of a cluster, and cycles
# until such a load arrives: Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking",
# arXiv 2501.12084, on an H800 PCIe, which has 114 multiprocessors and this clock. They measured clusters of 2 and 4;
# for 8 the bandwidth is assumed to fall once more as it does from 2 to 4. Stores are taken to be as fast, and a barrier
# of a cluster, which shows no stores, to cost one such latency.
CLUSTER_BANDWIDTH, CLUSTER_LATENCY = {2: 3.3e12, 4: 2.65e12, 8: 2.65e12**2 / 3.3e12}, 200
CLUSTER_MULTIPROCESSORS = 114
# Multiply-adds a second of cuBLAS in bf16 on an H100: 790 TFLOP/s, measured. Power keeps it from more, so no way is
# counted with more.
DENSE_RATE = 790e12 / 2
# Seconds between two kernels of a graph, of which the second depends on the first. Published figures are 0.5 us
# (NVIDIA's "Getting Started with CUDA Graphs", on a V100) to 1.2 us. This is the model's least certain number.
LAUNCH = 1e-6
# How many latencies the loops wait that load B of a tile: for two columns of a lane (gemm/gemm.cuh, hopper/gemm.cuh),
# or for four and U (gemm/thin.cuh). Other elements of the same 32 bytes come from L1. hopper/ has B in L2 by then.
ADAPTER_WAITS = {"thin": 5, "gemm": 2, "wgmma": 2}
# A tile of U or V (general.cuh, low_rank.cuh): its rows, how many of its blocks a multiprocessor holds, and cycles of
# shared memory of a step of 64. Both operands are stored once, and 8 warps load 16 rows of one and 32 of the other.
LOW_RANK_TILE, LOW_RANK_BLOCKS = 64, 2
LOW_RANK_CYCLES = (2 * 64 + 8 * (16 + 32)) * STEP * 2 // cycles.SHARED_BYTES
BF16, F32 = 2, 4  # bytes
THIN_STEP, TALL_ROWS, MOST_TURNS = 128, 256, 4  # kThinStep, kGemmTallRows, kHopperMostTurns


@dataclass(frozen=True)
class Product:
    """out[rows, cols] = left[rows, inner] times the weight, by its rows (forward) or by its columns (dX)."""

    direction: str
    rows: int
    cols: int
    inner: int
    rank: int = 0

    @property
    def bytes(self) -> float:
        """Of the operands and the result, each once."""
        return BYTES_OF_WEIGHT * self.cols * self.inner + BF16 * self.rows * (self.cols + self.inner)

    def limit(self, device: Device) -> float:
        """The seconds that memory or the tensor cores' peak need at least, without an adapter."""
        peak = device.peak * device.multiprocessors * device.clock
        return max(self.bytes / device.bandwidth, self.rows * self.cols * self.inner / peak)


# ---- how the work is shared: config.h --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """GemmConfig: each of `blocks` blocks has `share` steps, and the first `rest` blocks have one more.

    HopperConfig: if `cluster` is not 0, so many blocks share each tile, and there are no runs. With `pairs` two blocks
    load rows of X for both.
    """

    kernel: str  # thin, gemm or wgmma
    tile_rows: int
    tile_cols: int
    tiles: int
    steps: int  # of a tile
    blocks: int
    share: int
    rest: int
    cluster: int = 0
    pairs: int = 0

    @property
    def tiles_of_block(self) -> int:
        """Of which the slowest block of a cluster has a part; not for runs."""
        return math.ceil(self.tiles * self.cluster / self.blocks)

    @property
    def longest(self) -> int:
        """The steps of the slowest block."""
        if self.cluster:
            return self.tiles_of_block * math.ceil(self.steps / self.cluster)
        return self.share + (self.rest > 0)

    def first_step(self, run: int) -> int:
        """The step with which a run begins, counted over all tiles."""
        return run * self.share + min(run, self.rest)

    def run_of(self, step: int) -> int:
        """The run that has a step."""
        of_longer = self.rest * (self.share + 1)
        return step // (self.share + 1) if step < of_longer else self.rest + (step - of_longer) // self.share

    @property
    def splits_a_tile(self) -> bool:
        """Whether a run may end before the end of a tile."""
        return self.steps > 1 and (self.rest > 0 or self.share % self.steps != 0)


@dataclass(frozen=True)
class Panels:
    """PanelsConfig: the columns of a panel, and the rows at once."""

    cols: int
    rows: int

    TILE = 128  # kPanelCols, and the rows of a tile of cuBLAS


# ---- the time of each way --------------------------------------------------------------------------------------------


class Model:
    """The times of one device. `figures` is {kernel: {architecture: what sass.py reports of it}}."""

    def __init__(self, figures: Mapping[str, Any], device: Device) -> None:
        """See the class."""
        self.figures, self.device = figures, device
        self.l2 = L2_BANDWIDTH / device.clock  # bytes a cycle

    def step(self, product: Product, runs: Runs) -> dict[str, float]:
        """The cycles of a step of 64 of one tile, by resource."""
        device, rows = self.device, runs.tile_rows
        layout = ("Hopper" if runs.kernel == "wgmma" else "Decoded") + ("Rows", "Columns")[product.direction == "dX"]
        name = {
            "thin": f"thin_gemm_kernel<Bf16, {rows}, false>",
            "gemm": f"gemm_kernel<Bf16, {layout}, GemmTile<{rows}, {runs.tile_cols}, true>, false>",
            "wgmma": f"hopper_gemm_kernel<Bf16, {layout}, {rows}>",
        }[runs.kernel]
        architecture = "sm_90a" if runs.kernel == "wgmma" else "sm_90"
        dense = DENSE_RATE / device.multiprocessors / device.clock
        rate = min(cycles.DEVICES[architecture].multiply_adds, dense)
        counted = self.figures[name][architecture]["step"]
        step = cycles.step_of(name, counted, dataclasses.replace(device, multiply_adds=rate))
        of_left = min(rows, product.rows) * BF16 / (2 if runs.pairs else 1)
        loaded = STEP * (of_left + runs.tile_cols * BYTES_OF_WEIGHT)
        dram = product.bytes / device.bandwidth * device.clock
        return {
            **step.cycles,
            "L2": loaded * device.multiprocessors / self.l2,
            "DRAM": dram / (self._together(runs) * runs.longest * self._of_step(runs)),
        }

    def _together(self, runs: Runs) -> int:
        """How many blocks the multiprocessor has that has most of them."""
        return math.ceil(runs.blocks / self.device.multiprocessors)

    @staticmethod
    def _of_step(runs: Runs) -> int:
        """How many steps of 64 a step of the kernel is."""
        return THIN_STEP // STEP if runs.kernel == "thin" else 1

    def parts(self, product: Product, runs: Runs) -> dict[str, float]:
        """The seconds of a product that decodes on the way, by what takes them."""
        together = self._together(runs)
        step = max(self.step(product, runs).values()) * together * self._of_step(runs)
        begin = self._latencies_of_begin(runs) + step
        steps = runs.longest * step
        end = (self._end_of_clusters if runs.cluster else self._end_of_runs)(product, runs, step, begin)
        cycles_of = {"begin": begin, "steps": steps, "exchange, adapter, results": end - begin - steps}
        return {
            # A memset clears the flags of shared tiles. With an adapter the memset and the kernel of U or V come first,
            # and the product's kernel is launched while that one runs.
            "launches": 0.0 if product.rank else LAUNCH * (1 + runs.splits_a_tile),
            **{part: spent / self.device.clock for part, spent in cycles_of.items()},
        }

    @staticmethod
    def _latencies_of_begin(runs: Runs) -> float:
        """The cycles that a block waits for memory before its first step.

        By wgmma the first stages come while the tables are filled. In runs its producers wait for a ticket first.
        """
        if runs.kernel != "wgmma":
            return 2 * DRAM_LATENCY
        return DRAM_LATENCY + (L2_LATENCY if runs.splits_a_tile else 0) + (CLUSTER_LATENCY if runs.pairs else 0)

    def _adapter(self, product: Product, runs: Runs, step: float) -> float:
        """The cycles of a tile's adapter."""
        if product.rank == 0:
            return 0
        return step + ADAPTER_WAITS[runs.kernel] * (L2_LATENCY if runs.kernel == "wgmma" else DRAM_LATENCY)

    @staticmethod
    def _join(product: Product, runs: Runs) -> float:
        """The cycles in which two warpgroups exchange sums of a tile of dX, through shared memory.

        Each has a part of every sum, and gives half of them to the other. Of a tall tile each has other columns, so it
        has half as many sums to give, and none if the blocks of a cluster exchange them (hopper/gemm.cuh).
        """
        if runs.kernel != "wgmma" or product.direction != "dX" or (runs.tile_rows == TALL_ROWS and runs.cluster > 1):
            return 0
        given = runs.tile_rows * runs.tile_cols * F32 / (2 if runs.tile_rows == TALL_ROWS else 1)
        return 2 * given / cycles.SHARED_BYTES

    def _end_of_clusters(self, product: Product, runs: Runs, step: float, begin: float) -> float:
        """The cycles until the slowest block has ended, where clusters share tiles, or blocks have whole tiles."""
        sums, count = runs.tile_rows * runs.tile_cols, runs.cluster
        last = sums * BF16 / STORED / count  # results
        if count > 1:
            rate = CLUSTER_BANDWIDTH[count] / CLUSTER_MULTIPROCESSORS / self.device.clock
            stored = sums * F32 * (count - 1) / count / rate  # in other blocks
            added = sums * F32 / cycles.SHARED_BYTES + last
            turns = min(max(runs.tile_rows // 8 // count, 1), MOST_TURNS)
            last = max(stored + added / turns, stored / turns + added) + 2 * CLUSTER_LATENCY  # a barrier comes first
        of_tile = self._adapter(product, runs, step) + self._join(product, runs) + last
        return begin + runs.longest * step + runs.tiles_of_block * of_tile

    def _end_of_runs(self, product: Product, runs: Runs, step: float, begin: float) -> float:
        """The cycles until the slowest block has ended, where blocks have runs."""
        together = self._together(runs)
        # The runs that begin within a tile store its sums at about the same time, and the others add them.
        inside = sum(runs.first_step(run) % runs.steps > 0 for run in range(runs.blocks))
        sums = runs.tile_rows * runs.tile_cols
        left = sums * F32 / min(PORT, self.l2 / max(inside, 1))
        added = sums * F32 / min(PORT, self.l2 / min(runs.tiles, runs.blocks)) + L2_LATENCY
        stored = sums * BF16 / STORED * together
        restart = 0 if runs.kernel == "wgmma" else DRAM_LATENCY + step
        adapter, joined = self._adapter(product, runs, step), self._join(product, runs)

        left_at, end = [0.0] * runs.blocks, 0.0  # when a run has stored the sums of its first tile; when all have ended
        for run in reversed(range(runs.blocks)):
            first, stop = runs.first_step(run), runs.first_step(run + 1)
            own = math.ceil(first / runs.steps)  # the first tile whose beginning the run has
            count = max(math.ceil(stop / runs.steps) - own, 0)  # of such tiles
            time = begin + (stop - first) * step + count * (adapter + joined + stored)
            if first % runs.steps:
                left_at[run] = begin + (min(own * runs.steps, stop) - first) * step + joined + left
                time += joined + left + count * restart
            else:
                time += (count - 1) * restart
            if count and stop % runs.steps:
                last = runs.run_of((stop // runs.steps + 1) * runs.steps - 1)
                waited = max(left_at[run + 1 : last + 1]) + L2_LATENCY
                time = max(time - stored, waited) + (last - run) * added + stored
            end = max(end, time)
        return end

    def fused(self, product: Product, runs: Runs) -> float:
        """The seconds of a product that decodes on the way."""
        return sum(self.parts(product, runs).values())

    def panels(self, product: Product, panels: Panels) -> tuple[float, float]:
        """The seconds of a product by panels, at best and at worst."""
        device = self.device
        issued = SCHEDULERS * LANES * device.multiprocessors * device.clock  # thread-instructions a second
        of_element = max(
            self.figures["panel_kernel<Bf16, 4>"]["sm_90"]["per_element"] / issued,
            BYTES_OF_WEIGHT / device.bandwidth,
            (BYTES_OF_WEIGHT + BF16) / L2_BANDWIDTH,
        )
        inner = product.inner + product.rank
        # Each product begins, and stores the last tiles, while nothing else runs.
        around = (DRAM_LATENCY + Panels.TILE**2 * BF16 / STORED) / device.clock + LAUNCH
        decoding, shown = [], LAUNCH
        for row in range(0, product.rows, panels.rows):
            rows = min(panels.rows, product.rows - row)
            if product.rank:  # [X | U] is read and written
                shown += LAUNCH + 2 * BF16 * rows * inner / device.bandwidth
            for col in range(0, product.cols, panels.cols):
                cols = min(panels.cols, product.cols - col)
                tiles = math.ceil(rows / Panels.TILE) * math.ceil(cols / Panels.TILE)
                waves = math.ceil(tiles / device.multiprocessors)
                shown += waves * device.multiprocessors * Panels.TILE**2 * inner / DENSE_RATE + around
                decoding.append(cols * inner * of_element)
        return shown + decoding[0], shown + sum(decoding)

    def low_rank(self, product: Product, runs: Runs | None, parts: int, length: int) -> float:
        """The seconds of U or V: blocks sum `length` of the inner dimension each, and the last adds `parts` sums.

        Tickets are cleared by a kernel beside which the one of U or V is launched; but by a memset where the product's
        runs (None: panels) take tickets too.
        """
        device = self.device
        blocks = math.ceil(product.rows / LOW_RANK_TILE) * parts
        together = min(math.ceil(blocks / device.multiprocessors), LOW_RANK_BLOCKS)
        waves = math.ceil(blocks / (LOW_RANK_BLOCKS * device.multiprocessors))
        of_wave = 2 * DRAM_LATENCY + math.ceil(length / STEP) * together * LOW_RANK_CYCLES
        seconds = max(waves * of_wave / device.clock, BF16 * product.rows * product.inner / device.bandwidth)
        seconds += LAUNCH * (2 if runs is not None and runs.cluster == 0 and runs.splits_a_tile else 1)
        return seconds + (3 * L2_LATENCY / device.clock if parts > 1 else 0)  # stores, a ticket, loads
