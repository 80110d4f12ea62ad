"""Bounds of a step of the tensor-core product: cycles of a multiprocessor by resource, counted from machine code.

`make sass` prints the table, and `make sass ARGS=--output` writes it to results/sass.md. A step is 64 of the inner
dimension of one tile, which 8 warps do together:

    shared memory  128 bytes a cycle: loads, stores, ldmatrix, and asynchronous copies on their way in
    issue          4 schedulers, an instruction of a warp a cycle each
    tensor         the tile's multiply-adds over the rate of mma.sync
    DRAM           the tile's codes and scales over the multiprocessor's share of the memory's bandwidth, once

The largest is a lower bound on the time, without waits, conflicts and caches. No GPU has confirmed it yet.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tools"))

from machine_code import Instruction, Kernel, main_loop

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


# mma.sync reaches 62 % of the rate that wgmma has on Hopper.
DEVICES = {
    "sm_80": Device("A100", 108, 1.41e9, 2.04e12, 1024),
    "sm_90": Device("H100", 132, 1.755e9, 3.35e12, 0.62 * 2048),
}


def shared_cycles(loop: Sequence[Instruction]) -> int:
    """The cycles of shared memory for one warp in one turn of a loop."""

    def bytes_of(opcode: str) -> int:
        if opcode.startswith("LDSM"):
            return LANES * 4 * int(opcode.rsplit(".", 1)[1])  # matrices of 8 rows of 16 bytes
        if re.match(r"(LDS|STS|LDGSTS)\b", opcode):
            width = re.search(r"\.(\d+)\b(?!.*\.\d)", opcode)
            return LANES * (int(width[1]) // 8 if width else 4)
        return 0

    return sum(-(-bytes_of(instruction.opcode) // SHARED_BYTES) for instruction in loop)


@dataclass(frozen=True)
class Step:
    """The cycles of a step of one kernel, by resource."""

    kernel: str
    architecture: str
    cycles: dict[str, float]

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.cycles, key=self.cycles.__getitem__)


def step_of(kernel: Kernel) -> Step | None:
    """The step of a kernel of the tensor-core product; None for other kernels."""
    thin = re.match(r"thin_gemm_kernel<\w+, (\d+), \w+>", kernel.name)
    match = thin or re.match(r"gemm_kernel<\w+, \w+, GemmTile<(\d+), (\d+), true>", kernel.name)
    if match is None:
        return None
    rows, cols = int(match[1]), 128 if thin else int(match[2])
    turns = 1 / 2 if thin else 1  # a step of the thin kernel is 128
    device = DEVICES[kernel.architecture]
    loop = main_loop(kernel.code, kernel.name)
    share = device.bandwidth / device.multiprocessors / device.clock
    return Step(
        kernel.name,
        kernel.architecture,
        {
            "shared memory": WARPS * shared_cycles(loop) * turns,
            "issue": WARPS * len(loop) / SCHEDULERS * turns,
            "tensor": rows * cols * STEP / device.multiply_adds,
            "DRAM": cols * STEP * BYTES_OF_WEIGHT / share,
        },
    )


def table(kernels: Sequence[Kernel]) -> Iterator[str]:
    """The table as Markdown, with a line for each kernel in bf16; fp16 costs the same."""
    resources = ("shared memory", "issue", "tensor", "DRAM")
    yield "| cycles of a step of 64 | on | " + " | ".join(resources) + " | bound by |"
    yield "|---|---|" + "---|" * (len(resources) + 1)
    steps = (step_of(kernel) for kernel in kernels if "<Bf16" in kernel.name)
    for step in sorted(filter(None, steps), key=lambda step: (step.architecture, step.kernel)):
        cycles = " | ".join(f"{step.cycles[name]:.0f}" for name in resources)
        yield f"| {step.kernel} | {DEVICES[step.architecture].name} | {cycles} | {step.bound} |"
