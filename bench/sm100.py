"""What sm_100 would change for the product that decodes on the way: cycles of a step, on paper.

cuda_account.py puts it below its tables. None of it is written or compiled. A step is 64 of the inner dimension of a
tile of 128 rows of W by some rows of X, as in hopper/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cycles
from cycles import BYTES_OF_WEIGHT, SHARED_BYTES, STEP

MULTIPROCESSORS, BANDWIDTH, PEAK = 148, 8e12, 2.25e15 / 2  # of a B200; multiply-adds a second of bf16
MULTIPLY_ADDS = 4096  # a cycle and multiprocessor: twice those of wgmma
CLOCK = PEAK / MULTIPROCESSORS / MULTIPLY_ADDS
COLS, BF16 = 128, 2  # rows of W in a tile; bytes
# Bytes a cycle into tensor memory: a word for each of its 128 lanes. An assumption, which changes no bound here.
TENSOR_MEMORY = 512
WORDS = 512  # 32-bit columns of tensor memory


class Variant(NamedTuple):
    """A way to bring decoded W to tcgen05.mma."""

    name: str
    rows: int  # of X
    through_shared: bool  # decoded W; otherwise by tcgen05.st
    pair: bool  # two multiprocessors share X


VARIANTS = (
    Variant("(i) W through shared memory", 256, True, False),
    Variant("(ii) W by tcgen05.st", 256, False, False),
    Variant("(i) in a pair", 256, True, True),
    Variant("(ii) in a pair", 256, False, True),
    Variant("(ii) in a pair, 384 rows", 384, False, True),
)


def step(variant: Variant, issue: float, alu: float) -> dict[str, float]:
    """The cycles of a step of one multiprocessor, by resource. `issue` and `alu` are what decoding takes."""
    codes = COLS * STEP // 2
    left = variant.rows * STEP * BF16 // (2 if variant.pair else 1)  # what this multiprocessor's shared memory holds
    decoded = COLS * STEP * BF16
    # A thread has a row of W: it reads 32 bytes of codes, and two words of the table for each byte.
    shared = 2 * codes + codes * 8
    shared += 2 * left  # written by TMA, and read once
    shared += 2 * decoded if variant.through_shared else 0
    return {
        "shared memory": shared / SHARED_BYTES,
        "tensor memory": 0 if variant.through_shared else decoded / TENSOR_MEMORY,
        "issue": issue,
        "ALU": alu,
        "tensor": variant.rows * COLS * STEP / MULTIPLY_ADDS,
        "DRAM": COLS * STEP * BYTES_OF_WEIGHT / (BANDWIDTH / MULTIPROCESSORS / CLOCK),
    }


def words(variant: Variant) -> int:
    """32-bit columns of tensor memory: the sums, and two steps of W."""
    return variant.rows + (0 if variant.through_shared else 2 * STEP * BF16 // 4)


def lines(figures: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """The lines of the table."""
    hopper = "hopper_gemm_kernel<Bf16, HopperRows, 256>"
    counted = figures[hopper]["sm_90a"]["step"]
    today = cycles.step_of(hopper, counted, cycles.DEVICES["sm_90a"])
    yield (
        "wgmma on an H100, W from registers",
        "256",
        *(f"{today.cycles[name]:.0f}" if name in today.cycles else "–" for name in RESOURCES),
        today.bound,
        f"{today.share:.0%}",
        "–",
    )
    for variant in VARIANTS:
        taken = step(variant, counted["issue"], counted["ALU"])
        bound = max(RESOURCES, key=taken.__getitem__)
        yield (
            variant.name,
            str(variant.rows),
            *(f"{taken[name]:.0f}" if taken[name] else "–" for name in RESOURCES),
            bound,
            f"{taken['tensor'] / taken[bound]:.0%}",
            f"{words(variant)} of {WORDS}",
        )


RESOURCES = ("shared memory", "tensor memory", "issue", "ALU", "tensor", "DRAM")


def section(figures: Mapping[str, Any]) -> str:
    """The part of results/cuda-account.md about sm_100."""
    header = ("cycles of a step of 64, 128 rows of W", "rows of X", *RESOURCES, "bound by", "of the peak", "words")
    return "\n\n".join((BEFORE.format(CLOCK / 1e9), cycles.markdown(header, lines(figures)), AFTER))


BEFORE = """## What sm_100 would change

A B200 has 148 multiprocessors ([1]), 2.25 PFLOP/s of dense bf16 and 8 TB/s ([2]). tcgen05.mma multiplies twice as fast
as wgmma ([3]), 4096 multiply-adds a cycle at {:.2f} GHz, while shared memory is as fast as before ([4]). wgmma does
not exist there: code for sm_90a runs on nothing else ([5]). So a B200 would run the kernels of `gemm/` today.

What is known of the instructions: one thread issues a product; a is in shared or in tensor memory, b in shared memory,
the sums in tensor memory; from tensor memory a must be contiguous along the inner dimension ([6]). Tensor memory has
128 lanes of 512 words of 32 bits ([7]). tcgen05.st (32x32b) writes a row for each lane of a warp, and each warp of a
warpgroup reaches 32 rows of its own ([8]). Two multiprocessors that multiply as a pair (cta_group::2) have 128 rows of
W each and hold half of X each ([9]), which about halves what X costs shared memory ([10])."""
AFTER = """These are forward steps. Decoding is counted as today: 32 bytes of codes and 32 pairs of the table for each
row, and what the kernel by wgmma issues, although a lane then has a row of its own and needs one scale a step.
A store to tensor memory is taken as a word a lane and cycle; no document says so, and no bound depends on it. L2 is
not counted, for want of a rate; on an H100 it is about as near as shared memory, and a pair halves what X costs it,
too.

- **Tensor cores get twice as fast, and shared memory does not.** With decoded W through shared memory (i) a step takes
  more than twice as long as the tensor cores need, although they read X once and not once for each warpgroup.
- **tcgen05.st (ii) is worth it**, as registers are on Hopper: W leaves shared memory. X and the table remain.
- **A pair halves X**, and then the table takes most. It is asked for each weight, so taller tiles are what is left:
  the sums of 384 rows (products of 256 and 128) and two steps of W still fit, and the tensor cores bound.

What would have to be written: wrappers for tcgen05.alloc, .mma, .st, .ld, .commit and their fences in `simt/`, and a
model of tensor memory in the emulator; a producer that brings X by TMA to two blocks of a cluster, with barriers that
count both; consumers that decode a row each and store it (dX: columns of W, whose codes must be turned first, because
a lies along the inner dimension); one thread that multiplies; and a warpgroup that takes the sums from tensor memory,
and stores or exchanges them (`stream_k.cuh`), while the next tile is multiplied. Scales, stages and runs would stay as
they are.

[1]: https://chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut
[2]: https://github.com/stas00/ml-engineering/blob/master/insights/when-to-upgrade-gpus/README.md
[3]: https://github.com/NVIDIA/cutlass/blob/main/media/docs/cpp/blackwell_functionality.md
[4]: https://www.together.ai/blog/flashattention-4
[5]: https://reviews.llvm.org/D155851
[6]: https://docs.nvidia.com/cutlass/latest/media/docs/pythonDSL/mma_docs/tcgen05_programming.html
[7]: https://nvidia.github.io/tilus/stable/programming-guides/type-system/tmemory-tensor.html
[8]: https://tvm.apache.org/docs/tirx/tile_ops/tcgen05_ld_st.html
[9]: https://nvidia.github.io/tilus/stable/tutorials/matmul-blackwell/v6.html
[10]: https://arxiv.org/html/2603.05451"""
