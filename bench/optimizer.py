"""A step of AdamW: ours in 8 bits against that of bitsandbytes, torch's fused AdamW, and the machine's limit.

    python bench/run.py --operations optimizer [--device cuda]

There are two cases: the LoRA adapter of a small model, 4.9 M parameters in 360 tensors, and one tensor of 100 M. Both
are in fp32, but the latter is in bf16 on a GPU. The limit is the bytes that must move (parameter, gradient and two
codes in, parameter and codes out: 16 bytes in fp32) over the bandwidth of a copy, measured between the calls. Caches
are cold, as after a backward pass (timing.py).

The measurement runs in a process of its own: what ran before in a process decides on which pages parameters and states
lie.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import machine
from cases import ADAMW_ADAPTER, ADAMW_TENSOR
from timing import Cpu, Gpu, set_allocator

OURS, BITSANDBYTES, FUSED = "qlora_native", "bitsandbytes", "torch fused"
CODES_BYTES = 4  # for each parameter: the codes of both moments, in and out
# The elements of A and of B of LoRA r=16 on SmolLM2-135M's seven linears, with k_proj and v_proj taken as one.
RANK, LAYERS = 16, 30
WIDTHS = [(576, 576), (1152, 384), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
ADAPTER = [RANK * width for _ in range(LAYERS) for pair in WIDTHS for width in pair]
LARGE = [100_000_000]
OPTIONS = {"lr": 1e-3, "weight_decay": 1e-2}
CHECKED_STEPS = 3
CHECKED = 1 << 20  # the number of elements of each tensor that are checked, from its beginning
# The allowed error, relative to the distance that the float64 oracle has moved. 8-bit moments cause a few percent in
# three steps. A bf16 parameter of size 0.02 (steps of 2^-13) is rounded by up to 2^-14 in each step: 2 % of 3e-3 in
# root mean square.
ALLOWED = {OURS: 0.05, BITSANDBYTES: 0.05, FUSED: 1e-4}
ALLOWED_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 0.04}


def measure_on(device: str) -> list[dict[str, Any]]:
    """Call measure() on a device: for a process of its own."""
    torch.set_default_device(device)
    set_allocator("setup")
    probes = machine.Probes()
    return measure(probes, Gpu(probes.flush, torch.cuda) if device == "cuda" else Cpu())


def measure(probes: machine.Probes, clock: Cpu | Gpu, budget_s: float = 6.0) -> list[dict[str, Any]]:
    """Check and time every contestant in both cases.

    Args:
        probes: measure the bandwidth of a copy.
        clock: the clock of the device.
        budget_s: the seconds of a case, shared by its contestants.

    Returns:
        A row for each case: `name`, `parameters`, `tensors`, `dtype`, `bandwidth` (of the copy, bytes/s), `limit_us`,
        `times` as in run.py's rows.

    Raises:
        RuntimeError: a contestant's parameters are not those of AdamW.
    """
    rows = []
    large = torch.bfloat16 if machine.device() == "cuda" else torch.float32
    cases = ((ADAMW_ADAPTER, ADAPTER, torch.float32, (BITSANDBYTES, FUSED)), (ADAMW_TENSOR, LARGE, large, (FUSED,)))
    # bitsandbytes' step synchronizes, and an optimizer has its state once
    options = {"captured": False} if isinstance(clock, Gpu) else {"copies": False}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, sizes, dtype, peers in cases:
            set_allocator("setup")
            steps = {}
            for contestant in (OURS, *peers):
                if contestant != BITSANDBYTES or importlib.util.find_spec("bitsandbytes"):
                    steps[contestant] = _checked(contestant, sizes, dtype)
            set_allocator("default")
            times, probe = clock.alternate(steps, probes.copy, budget_s, **options)
            bandwidth = 2 * probes.nbytes / probe.median
            must_move = (3 * dtype.itemsize + CODES_BYTES) * sum(sizes)
            rows.append(
                {
                    "name": name,
                    "parameters": sum(sizes),
                    "tensors": len(sizes),
                    "dtype": str(dtype).removeprefix("torch."),
                    "bandwidth": bandwidth,
                    "limit_us": 1e6 * must_move / bandwidth,
                    "us": {contestant: 1e6 * each.median for contestant, each in times.items()},
                }
            )
    return rows


def _optimizer(contestant: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if contestant == OURS:
        import qlora_native as qn

        return qn.optim.AdamW8bit(params, **OPTIONS)
    if contestant == BITSANDBYTES:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, **OPTIONS)
    return torch.optim.AdamW(params, fused=True, **OPTIONS)


def _checked(contestant: str, sizes: list[int], dtype: torch.dtype) -> Callable[[int], None]:
    """A function that makes a step, after the parameters have been checked over a few."""
    generator = torch.Generator(machine.device()).manual_seed(0)
    values = [(0.02 * torch.randn(size, generator=generator)).to(dtype) for size in sizes]
    params = [nn.Parameter(value) for value in values]
    wide = [nn.Parameter(value[:CHECKED].double()) for value in values]
    began = [value.detach().clone() for value in wide]
    optimizer, oracle = _optimizer(contestant, params), torch.optim.AdamW(wide, **OPTIONS)
    for param, other in zip(params, wide, strict=True):
        param.grad = (1e-3 * torch.randn(param.shape, generator=generator)).to(dtype)
        other.grad = param.grad[:CHECKED].double()
    for _ in range(CHECKED_STEPS):
        optimizer.step()
        oracle.step()

    def distance(pairs: Any) -> float:
        return sum((a.detach().double() - b).square().sum().item() for a, b in pairs) ** 0.5

    found: list[Tensor] = [param.detach()[:CHECKED] for param in params]
    error = distance(zip(found, wide, strict=True)) / distance(zip(wide, began, strict=True))
    allowed = ALLOWED[contestant] + ALLOWED_ROUNDING[dtype]
    if not error <= allowed:
        raise RuntimeError(f"{contestant}: parameters off by {error:.1e} of their movement, expected {allowed:g}")
    return lambda _: optimizer.step()
