"""Bounds of a step of the tensor-core product: cycles of a multiprocessor by resource, counted from machine code.

`make sass` prints the table, and `make sass ARGS=--output` writes it to results/sass.md. A step is 64 of the inner
dimension of one tile, which 8 warps do together:

    shared memory  128 bytes a cycle: loads, stores, ldmatrix, and asynchronous copies on their way in
    issue          4 schedulers, an instruction of a warp a cycle each
    ALU            half of that: a scheduler begins one of ALU's instructions every second cycle
    tensor         the tile's multiply-adds over the rate of mma.sync, or of wgmma
    DRAM           the tile's codes and scales over the multiprocessor's share of the memory's bandwidth, once

wgmma (hopper/) reads its b from shared memory once for each of two warpgroups, and its tiles come by TMA. Beside the 8
warps that multiply, one asks for tiles and two bring scales. Where lanes i and i ^ 1 load the same 16 bytes, a load
takes two cycles and not four (Greg of NVIDIA, forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/
77228), as it does for the forward codes of wgmma, which four lanes share (HopperRows in hopper/weights.cuh).

The largest is a lower bound on the time, without waits, conflicts and caches, and an upper bound on the share of the
tensor cores' peak that a full tile can reach. No GPU has confirmed it yet. cuda_account.py computes the time of whole
products from it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tools"))

from machine_code import Instruction, Kernel, count, loops, main_loop

STEP, WARPS, LANES, SCHEDULERS, SHARED_BYTES = 64, 8, 32, 4, 128
BYTES_OF_WEIGHT = 0.5159  # 4 bits, and a share of the double-quantized scale of 64


@dataclass(frozen=True)
class Device:
    """One GPU: figures of NVIDIA's data sheets, and the measured rate of mma.sync."""

    name: str
    multiprocessors: int
    clock: float  # Hz, under load
    bandwidth: float  # bytes a second
    multiply_adds: float  # of bf16 by tensor cores, a cycle and multiprocessor
    peak: float  # the same, by the instruction that is fastest there


# mma.sync reaches 62 % of the rate that wgmma has on Hopper.
DEVICES = {
    "sm_80": Device("A100", 108, 1.41e9, 2.04e12, 1024, 1024),
    "sm_90": Device("H100", 132, 1.755e9, 3.35e12, 0.62 * 2048, 2048),
    "sm_90a": Device("H100", 132, 1.755e9, 3.35e12, 2048, 2048),
}
SCALE_WARPS = 2  # of a kernel that multiplies by wgmma
# The instructions of which a multiprocessor has 64 results a cycle, and not 128: sums, logic, comparisons and minima of
# integers, and conversions to 16 bits (CUDA C++ Programming Guide, "Throughput of native arithmetic instructions",
# compute capability 8.0 and 9.0). Integer multiply-adds (IMAD) take another unit.
ALU = frozenset(
    "IADD3 VIADD IABS LEA LOP3 PLOP3 PRMT SHF SEL ISETP VIMNMX VIADDMNMX IMNMX F2FP FMNMX FSEL FSETP P2R R2P".split()
)


def shared_cycles(loop: Sequence[Instruction], lanes_share_vectors: bool = False) -> int:
    """The cycles of shared memory for one warp in one turn of a loop.

    With `lanes_share_vectors`, lanes i and i ^ 1 load the same 16 bytes.
    """

    def bytes_of(opcode: str) -> int:
        if lanes_share_vectors and opcode == "LDS.128":
            return LANES * 16 // 2
        if opcode.startswith("LDSM"):
            return LANES * 4 * int(opcode.rsplit(".", 1)[1])  # matrices of 8 rows of 16 bytes
        if re.match(r"(LDS|STS|LDGSTS)\b", opcode):
            width = re.search(r"\.(\d+)\b(?!.*\.\d)", opcode)
            return LANES * (int(width[1]) // 8 if width else 4)
        return 0

    return sum(-(-bytes_of(instruction.opcode) // SHARED_BYTES) for instruction in loop)


def of_alu(code: Sequence[Instruction]) -> int:
    """How many instructions are the ALU's."""
    return sum(instruction.opcode.split(".")[0] in ALU for instruction in code)


def tile_of(name: str) -> tuple[int, int] | None:
    """The rows and columns of a tile of the tensor-core product; None for other kernels."""
    match = re.match(r"gemm_kernel<\w+, \w+, GemmTile<(\d+), (\d+), true>", name)
    if match is None:
        match = re.match(r"(?:thin_gemm_kernel<\w+, |hopper_gemm_kernel<\w+, \w+, )(\d+)", name)
        return None if match is None else (int(match[1]), 128)
    return int(match[1]), int(match[2])


def count_step(kernel: Kernel) -> dict[str, int] | None:
    """The cycles of shared memory, issue and ALU that a step takes, counted from code; None for other kernels."""
    tile = tile_of(kernel.name)
    if tile is None:
        return None
    turns = 1 / 2 if kernel.name.startswith("thin") else 1  # a step of the thin kernel is 128
    loop = main_loop(kernel.code, kernel.name)
    beside: list[Instruction] = []  # what producers issue
    copied = 0.0  # what passes shared memory and is in no instruction of the loop
    if kernel.name.startswith("hopper"):
        rows, cols = tile
        # One warp asks for rows and codes, in one of two loops: for this block, or, which is longer, for a pair. Others
        # load scales.
        waiting = sorted((body for body in loops(kernel.code) if count(body, "SYNCS")), key=len)
        asks = [body for body in waiting if count(body, "UTMALDG") == 2]
        scales = [body for body in waiting if count(body, "LDG")]
        for body in (*asks[-1:], *SCALE_WARPS * scales[:1]):
            beside += body
        left = rows * STEP * 2
        copied = (2 * left + left + cols * STEP // 2) / SHARED_BYTES
    return {
        "shared memory": round(WARPS * shared_cycles(loop, "HopperRows" in kernel.name) * turns + copied),
        "issue": round((WARPS * len(loop) + len(beside)) / SCHEDULERS * turns),
        "ALU": round(2 * (WARPS * of_alu(loop) + of_alu(beside)) / SCHEDULERS * turns),
    }


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


@dataclass(frozen=True)
class Step:
    """The cycles of a step of one kernel, by resource."""

    kernel: str
    device: Device
    cycles: dict[str, float]
    least: float  # cycles that its multiply-adds take at the peak

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def share(self) -> float:
        """Of the tensor cores' peak, at most."""
        return self.least / self.cycles[self.bound]


def step_of(name: str, counted: Mapping[str, float], device: Device) -> Step:
    """The step of a kernel, from what count_step() says of it."""
    rows, cols = tile_of(name)
    share = device.bandwidth / device.multiprocessors / device.clock
    return Step(
        name,
        device,
        {
            **counted,
            "tensor": rows * cols * STEP / device.multiply_adds,
            "DRAM": cols * STEP * BYTES_OF_WEIGHT / share,
        },
        rows * cols * STEP / device.peak,
    )


def table(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table as Markdown, of {kernel: {architecture: figures}}. Kernels in fp16 are left out: they cost the same."""
    resources = ("shared memory", "issue", "ALU", "tensor", "DRAM")
    yield "| cycles of a step of 64 | on | " + " | ".join(resources) + " | bound by | of the peak |"
    yield "|---|---|" + "---|" * (len(resources) + 2)
    for architecture, device in DEVICES.items():
        for name, figures in sorted(found.items()):
            if "<Bf16" in name and "step" in figures.get(architecture, {}):
                step = step_of(name, figures[architecture]["step"], device)
                cycles = " | ".join(f"{step.cycles[resource]:.0f}" for resource in resources)
                yield f"| {name} | {device.name} | {cycles} | {step.bound} | {step.share:.0%} |"
