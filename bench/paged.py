"""A step of the paged AdamW on a GPU whose memory is nearly full, beside the same step with room, and the ordinary one.

    python bench/paged.py [--tensors 32] [--elements 16777216]
    QLN_BACKEND=cuda_emulated python bench/paged.py --tensors 2 --elements 5000    without pressure, over the emulator

The parameters are in bf16. After some steps with room, memory is allocated until so little is free that the optimizer
sends each segment of the state back to the host after its update (kSpareBytes in cpp/src/paged/update.cpp). The state
and that memory fit the GPU together, because a card may hang if more managed memory is asked of it than it has free.
After each phase the parameters must have the bits of those of the ordinary optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from qlora_native import optim
from torch import Tensor, nn

import machine

STEPS = 5
OPTIONS = {"lr": 1e-3, "weight_decay": 1e-2}
STATE_BYTES = 2.1  # of an element: two codes, and the scales of their blocks
# Free memory under pressure: less than the 512 MB below which the optimizer sends the state back.
FREE_BYTES = 256 << 20


def parameters(tensors: int, elements: int) -> list[nn.Parameter]:
    """Random parameters, the same each time."""
    generator = torch.Generator(machine.device()).manual_seed(0)
    return [nn.Parameter((0.02 * torch.randn(elements, generator=generator)).bfloat16()) for _ in range(tensors)]


def seconds(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], gradient: Tensor) -> float:
    """The median seconds of STEPS steps; all parameters have the same gradient."""
    for param in params:
        param.grad = gradient
    times = []
    for _ in range(STEPS):
        _synchronize()
        began = time.perf_counter()
        optimizer.step()
        _synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _synchronize() -> None:
    if machine.device() == "cuda":
        torch.cuda.synchronize()


def fill_memory() -> Tensor:
    """Memory that leaves FREE_BYTES of the GPU free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, free - FREE_BYTES), dtype=torch.uint8)


def measure(tensors: int, elements: int) -> None:
    """Time and check the phases, and print a line for each.

    Raises:
        RuntimeError: the parameters differ, or no state went back to the host under pressure.
    """
    on_gpu = machine.device() == "cuda"
    if on_gpu and (needed := STATE_BYTES * tensors * elements) > (free := torch.cuda.mem_get_info()[0]) / 8:
        raise SystemExit(f"expected a state of at most an eighth of the free {free} bytes, got {needed:.0f}")
    ordinary, paged = parameters(tensors, elements), parameters(tensors, elements)
    gradient = (1e-3 * torch.randn(elements)).bfloat16()
    reference, optimizer = optim.AdamW8bit(ordinary, **OPTIONS), optim.PagedAdamW8bit(paged, **OPTIONS)
    for phase in ("with room", "under pressure") if on_gpu else ("with room",):
        filled = fill_memory() if phase == "under pressure" else None
        times = [seconds(reference, ordinary, gradient), seconds(optimizer, paged, gradient)]
        if not all(map(torch.equal, ordinary, paged)):
            raise RuntimeError(f"{phase}: paged parameters differ from those of the ordinary optimizer")
        stats = optimizer.stats()
        if filled is not None and stats["bytes_resident"] == stats["bytes_managed"]:
            raise RuntimeError(f"{phase}: expected a state that goes back to the host, all of it is on the GPU")
        state = f"{stats['bytes_resident']} of {stats['bytes_managed']} managed bytes are on the device after a step"
        counts = f"{stats['prefetches']} prefetches, {stats['stalls']} stalls"
        print(
            f"{phase}: ordinary {1e3 * times[0]:.2f} ms, paged {1e3 * times[1]:.2f} ms; {state}; {counts}", flush=True
        )
        del filled


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=32)
    parser.add_argument("--elements", type=int, default=16 << 20, help="of each tensor")
    args = parser.parse_args(argv)
    torch.set_default_device(machine.gpu_or_emulator())
    measure(args.tensors, args.elements)


if __name__ == "__main__":
    main()
