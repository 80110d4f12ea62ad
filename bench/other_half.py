"""The other half of a training step: the loss of a language model, attention, gated activations and norms.

    python bench/other_half.py [--output]

The loss: `linear_cross_entropy`, forward and backward, against `F.cross_entropy(F.linear(...))` and, where it is
installed, Apple's cut-cross-entropy (its `torch_compile`, which is what it has for a CPU; Liger's kernels need a GPU),
with the memory of each; and a large head in 4 bits, whose logits would not fit here. Blocks:
`gated_activation`, `rms_norm` and `rotary_embedding`, forward and backward, against what transformers' models compute,
and `attention`, causal, against torch's `scaled_dot_product_attention`, with the bytes that autograd keeps beside the
operands.

Contestants alternate in one process (timing.py); medians. Results are compared before they are timed. --output writes
bench/results/<machine>/other-half.md.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial

import qlora_native as qn
import torch
import torch.nn.functional as F
from qlora_native.functional import attention, gated_activation, linear_cross_entropy, rms_norm, rotary_embedding
from torch import Tensor

import checks
import memory
import report
import timing
from cases import OURS
from tables import table

BUDGET_S = 10.0  # of one row's contestants together
UNFUSED, CUT, HEAD_4BIT = "torch, unfused", "cut-cross-entropy", "ours, a head in 4 bits"
DTYPE = torch.bfloat16
EPS = 1e-6


def loss(T: int, K: int, V: int, clock: timing.Cpu, probe: Callable) -> dict:
    """The loss and the gradient by the hidden states, of a dense head and of one in 4 bits."""
    weight, labels = (torch.randn(V, K) / K**0.5).to(DTYPE), torch.randint(V, (T,))
    q = qn.quantize(weight)
    hidden = torch.randn(T, K).to(DTYPE)

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor]:
        def call(_: int) -> Tensor:
            x = hidden.clone().requires_grad_()
            return torch.autograd.grad(function(x), x)[0]

        return call

    contestants = {
        OURS: step(lambda x: linear_cross_entropy(x, weight, labels)),
        UNFUSED: step(lambda x: F.cross_entropy(F.linear(x, weight).float(), labels)),
        HEAD_4BIT: step(lambda x: linear_cross_entropy(x, q, labels)),
    }
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy as cut

        contestants[CUT] = step(lambda x: cut(x, weight, labels, impl="torch_compile"))
    for name in (UNFUSED, *[CUT] * (CUT in contestants)):
        checks.close("loss", contestants[OURS](0), contestants[name](0))
    peaks = {name: memory.peak(lambda call=call: call(0)) for name, call in contestants.items()}
    found, _ = clock.alternate(contestants, probe, 2 * BUDGET_S)
    seconds = {name: times.median for name, times in found.items()}
    return {"name": f"loss of {V} words, K = {K}", "rows": T, "seconds": seconds, "peak_bytes": peaks}


def large_loss(T: int, K: int, V: int) -> dict:
    """The loss and the gradient over a head in 4 bits whose logits would not fit; two calls, of which one is timed."""
    q = qn.quantize(torch.randn(V, K, dtype=DTYPE))
    hidden, labels = torch.randn(T, K).to(DTYPE).requires_grad_(), torch.randint(V, (T,))
    seconds = []

    def call() -> Tensor:
        started = time.perf_counter()
        result = torch.autograd.grad(linear_cross_entropy(hidden, q, labels), hidden)[0]
        seconds.append(time.perf_counter() - started)
        return result

    peak = memory.peak(call)
    return {
        "name": f"loss of {V} words, K = {K}",
        "rows": T,
        "seconds": {HEAD_4BIT: min(seconds)},
        "peak_bytes": {HEAD_4BIT: peak},
    }


def kept(function: Callable[..., Tensor], operands: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward beside the operands."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*operands)
    for operand in operands:
        storages.pop(operand.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def parts_of_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm computes it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def block(
    name: str, contestants: dict[str, Callable], operands: list[Tensor], clock: timing.Cpu, probe: Callable
) -> dict:
    """A function of a block and its gradients by the operands that want one."""
    trained = [operand for operand in operands if operand.requires_grad]
    B, *others = operands[0].shape  # [T, N], or [B, H, T, D]
    tokens = B * (others[1] if len(others) == 3 else 1)
    gradient = torch.randn_like(operands[0])

    def step(function: Callable) -> Callable[[int], tuple[Tensor, ...]]:
        return lambda _: torch.autograd.grad(function(*operands), trained, gradient)

    steps = {each: step(function) for each, function in contestants.items()}
    for ours, theirs in zip(steps[OURS](0), steps[UNFUSED](0), strict=True):
        checks.close(name, ours, theirs)
    found, _ = clock.alternate(steps, probe, BUDGET_S)
    return {
        "name": f"{name} [{', '.join(map(str, operands[0].shape))}]",
        "rows": tokens,
        "seconds": {each: times.median for each, times in found.items()},
        "kept_bytes": {each: kept(function, operands) for each, function in contestants.items()},
    }


def blocks(T: int, width: int, inner: int, clock: timing.Cpu, probe: Callable) -> list[dict]:
    """The gated activation and the norm of a layer."""
    gate, up = (torch.randn(T, inner).to(DTYPE).requires_grad_() for _ in range(2))
    x, weight = torch.randn(T, width).to(DTYPE).requires_grad_(), torch.randn(width).to(DTYPE)
    gated = {OURS: gated_activation, UNFUSED: lambda gate, up: F.silu(gate) * up}
    norm = {OURS: lambda x, weight: rms_norm(x, weight, EPS), UNFUSED: parts_of_norm}
    return [
        block("SwiGLU", gated, [gate, up], clock, probe),
        block("RMS norm", norm, [x, weight], clock, probe),
    ]


def parts_of_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' Llama computes it."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-x2, x1), dim=-1) * sin[:, None]


def heads(B: int, H: int, KV: int, T: int, D: int, clock: timing.Cpu, probe: Callable) -> list[dict]:
    """Causal attention of H heads over KV heads of keys, and the rotation of the queries."""
    q, k, v = (torch.randn(B, T, h, D).to(DTYPE).transpose(1, 2).requires_grad_() for h in (H, KV, KV))
    angles = torch.randn(1, T, D // 2).repeat(1, 1, 2)
    of_torch = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    causal = {OURS: partial(attention, is_causal=True), UNFUSED: of_torch}
    rotation = {OURS: rotary_embedding, UNFUSED: parts_of_rotation}
    return [
        block(f"attention over {KV} heads of keys", causal, [q, k, v], clock, probe),
        block("rotation", rotation, [q, angles.cos().to(DTYPE), angles.sin().to(DTYPE)], clock, probe),
    ]


def measure(clock: timing.Cpu, probe: Callable) -> list[dict]:
    """The rows of the report."""
    return [
        loss(1024, 576, 49_152, clock, probe),
        large_loss(8192, 4096, 128_256),
        *blocks(1024, 576, 1536, clock, probe),
        *blocks(512, 4096, 11_008, clock, probe),
        *heads(4, 9, 3, 256, 64, clock, probe),
        *heads(1, 32, 32, 512, 128, clock, probe),
        *heads(1, 32, 8, 2048, 128, clock, probe),
    ]


def lines(found: dict) -> str:
    """The report in Markdown."""
    rows = []
    for row in found["measured"]:
        bytes_of = row.get("peak_bytes") or row["kept_bytes"]
        for name, seconds in row["seconds"].items():
            ours = row["seconds"].get(OURS)
            ratio = f"{seconds / ours:.2f} × as fast" if ours and not name.startswith("ours") and name != OURS else ""
            rows.append((row["name"], row["rows"], name, f"{1e3 * seconds:.3g}", ratio, f"{bytes_of[name] / 1e6:.3g}"))
    return (
        f"# The other half of a step\n\n{report.head(found['machine'])}; bfloat16, forward and backward; medians. "
        "Memory: of a loss how far the process grows, of the others what autograd keeps beside the operands.\n\n"
        + table(("", "rows", "", "ms", "ours is", "MB"), rows)
    )


if __name__ == "__main__":
    report.command_line("other-half", __doc__, measure, lines)
