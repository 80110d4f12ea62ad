"""A step of AdamW: our AdamW8bit against bitsandbytes' and torch's fused AdamW, and against the machine's limit.

    python bench/optimizer.py                            both cases, in half a minute on two cores
    python bench/run.py --operations optimizer --output  the same, as JSON under bench/results/

Two cases, all in fp32: the LoRA adapter of a small model, 4.9 M parameters in 360 tensors, and one tensor of 100 M.
The limit is what must move, 16 bytes a parameter (parameter, gradient and two codes in; parameter and codes out), over
the bandwidth of a copy, measured between the calls. Everything is cold, as after a backward (timing.py).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import machine
from timing import alternate, set_allocator

OURS, BITSANDBYTES, FUSED = "qlora_native", "bitsandbytes", "torch fused"
BYTES_PER_PARAMETER = 16
# LoRA r=16 on SmolLM2-135M's seven linears, of which k_proj and v_proj are taken as one: elements of A and of B.
RANK, LAYERS = 16, 30
WIDTHS = [(576, 576), (1152, 384), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
ADAPTER = [RANK * width for _ in range(LAYERS) for pair in WIDTHS for width in pair]
LARGE = [100_000_000]
OPTIONS = {"lr": 1e-3, "weight_decay": 1e-2}
CHECKED_STEPS = 3
CHECKED = 1 << 20  # elements of each tensor, from its beginning
# Of the distance that the float64 oracle moved. 8-bit moments are off by a few percent of it after three steps.
ALLOWED = {OURS: 0.05, BITSANDBYTES: 0.05, FUSED: 1e-4}


def measure(probes: machine.Probes, budget_s: float = 6.0) -> list[dict[str, Any]]:
    """Check and time every contestant in both cases.

    Args:
        probes: for the bandwidth of a copy.
        budget_s: seconds of a case, shared by its contestants.

    Returns:
        A row a case: `name`, `parameters`, `tensors`, `bandwidth` (of the copy, bytes/s), `limit_us`, `times` as in
        run.py's rows.

    Raises:
        RuntimeError: a contestant's parameters are not those of AdamW.
    """
    rows = []
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, sizes, peers in (("LoRA adapter", ADAPTER, (BITSANDBYTES, FUSED)), ("one tensor", LARGE, (FUSED,))):
            set_allocator("setup")
            steps, errors = {}, {}
            for contestant in (OURS, *peers):
                if contestant != BITSANDBYTES or importlib.util.find_spec("bitsandbytes"):
                    steps[contestant], errors[contestant] = _checked(contestant, sizes)
            set_allocator("default")
            times, probe = alternate(steps, probes.copy, budget_s)
            bandwidth = 2 * machine.PROBE_BYTES / probe.median
            rows.append(
                {
                    "name": name,
                    "parameters": sum(sizes),
                    "tensors": len(sizes),
                    "bandwidth": bandwidth,
                    "limit_us": 1e6 * BYTES_PER_PARAMETER * sum(sizes) / bandwidth,
                    "times": {
                        n: {"us": 1e6 * t.median, "best_us": 1e6 * t.best, "calls": t.calls, "error": errors[n]}
                        for n, t in times.items()
                    },
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


def _checked(contestant: str, sizes: list[int]) -> tuple[Callable[[int], None], float]:
    """(a function that makes a step, how far its parameters were off after a few)."""
    generator = torch.Generator().manual_seed(0)
    values = [0.02 * torch.randn(size, generator=generator) for size in sizes]
    params = [nn.Parameter(value) for value in values]
    wide = [nn.Parameter(value[:CHECKED].double()) for value in values]
    began = [value.detach().clone() for value in wide]
    optimizer, oracle = _optimizer(contestant, params), torch.optim.AdamW(wide, **OPTIONS)
    for param, other in zip(params, wide, strict=True):
        param.grad = 1e-3 * torch.randn(param.shape, generator=generator)
        other.grad = param.grad[:CHECKED].double()
    for _ in range(CHECKED_STEPS):
        optimizer.step()
        oracle.step()

    def distance(pairs: Any) -> float:
        return sum((a.detach().double() - b).square().sum().item() for a, b in pairs) ** 0.5

    found: list[Tensor] = [param.detach()[:CHECKED] for param in params]
    error = distance(zip(found, wide, strict=True)) / distance(zip(wide, began, strict=True))
    if not error <= ALLOWED[contestant]:
        raise RuntimeError(
            f"{contestant}: parameters off by {error:.1e} of their way, expected {ALLOWED[contestant]:g}"
        )
    return lambda _: optimizer.step(), error


def main() -> None:
    """The command line."""
    import report

    for row in measure(machine.Probes()):
        print(report.optimizer_lines(row), flush=True)


if __name__ == "__main__":
    main()
