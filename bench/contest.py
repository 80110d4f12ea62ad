"""Make the contestants of a case: functions to be timed, whose results have been checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import checks
import machine
from cases import LORA_SCALING, Case
from peers import Contestant, ours

Contestants = dict[str, Callable[[int], Any]]
WITHOUT_LORA = "without LoRA"
NF4 = "in NF4"
MAX_COPIES = 2048  # of a weight that is too small for that; so many need no minutes to make, even over the emulator


class Weights:
    """A weight of a shape in every form that the cases need, each in several copies."""

    def __init__(self, shape: tuple[int, int], format: str = "nf4") -> None:
        """Make random normal values of a size that keeps activations near 1, and quantize them."""
        torch.manual_seed(0)
        self.shape = shape
        self.weight = torch.randn(shape).mul_(shape[1] ** -0.5).bfloat16()
        self.quantized = ours.quantize(self.weight, format)
        self._dense: dict[torch.dtype, Tensor] = {}
        self._exact: dict[torch.dtype, Tensor] = {}
        self._copies: dict[tuple[str, torch.dtype], list[Any]] = {}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight, decoded to `dtype`."""
        if dtype not in self._dense:
            self._dense[dtype] = checks.decode(self.quantized, dtype)
        return self._dense[dtype]

    def exact(self, dtype: torch.dtype) -> Tensor:
        """The weight decoded to `dtype`, and then in float64."""
        if dtype not in self._exact:
            self._exact = {dtype: self.dense(dtype).double()}  # one at a time: it is large
        return self._exact[dtype]

    def copies(self, contestant: Contestant, dtype: torch.dtype) -> list[Any]:
        """Copies of the weight in the form of a contestant, so many that no cache holds them all."""
        key = (contestant.name, dtype)
        if key not in self._copies:
            held = self.quantized if contestant is ours else contestant.hold(self.weight, self.dense(dtype), dtype)
            count = copies_needed(contestant.nbytes(held))
            self._copies[key] = [held] + [contestant.copy(held) for _ in range(count - 1)]
        return self._copies[key]


def copies_needed(nbytes: int) -> int:
    """The number of copies of a weight of `nbytes` bytes that no cache holds together: 2 ... MAX_COPIES."""
    return min(max(2, machine.beyond_caches(nbytes)), MAX_COPIES)


def contestants(case: Case, weights: Weights, peers: Sequence[Contestant]) -> Contestants:
    """Make {name: function}: qlora_native first, then the peers that support the case.

    Raises:
        checks.WrongResult: a contestant's result is wrong.
    """
    peers = [peer for peer in peers if peer.supports(case)]
    make = {
        "quantize": _quantize,
        "dequantize": _dequantize,
        "forward": _product if case.format == "nf4" else _product_in_format,
        "dx": _product if case.format == "nf4" else _product_in_format,
        "lora_gradients": _lora_gradients,
    }[case.operation]
    return make(case, weights, peers)


def _quantize(case: Case, weights: Weights, peers: Sequence[Contestant]) -> Contestants:
    sources = [weights.weight] + [weights.weight.clone() for _ in range(copies_needed(weights.weight.nbytes) - 1)]
    checks.quantized(ours.name, ours.quantize(weights.weight), weights.weight)
    for peer in peers:
        decoded = peer.dequantize(peer.quantize(weights.weight), torch.float32)
        checks.close(peer.name, decoded, weights.dense(torch.float32), peer.error)
    return {each.name: lambda i, each=each: each.quantize(sources[i % len(sources)]) for each in (ours, *peers)}


def _dequantize(case: Case, weights: Weights, peers: Sequence[Contestant]) -> Contestants:
    dtype = getattr(torch, case.dtype)

    def call(contestant: Contestant) -> Callable[[int], Tensor]:
        # Use the copies made for 16 bits, although the result may be wider.
        held = weights.copies(contestant, torch.bfloat16)
        return lambda i: contestant.dequantize(held[i % len(held)], dtype)

    found = {contestant.name: call(contestant) for contestant in (ours, *peers)}
    checks.equal(ours.name, found[ours.name](0), weights.dense(dtype))
    for peer in peers:
        checks.close(peer.name, found[peer.name](0), weights.dense(dtype), peer.error)
    return found


def _product(case: Case, weights: Weights, peers: Sequence[Contestant]) -> Contestants:
    """forward and dx, in every form of `via`, with an adapter or without."""
    dtype = getattr(torch, case.dtype)
    N, K = case.shape
    forward = case.operation == "forward"
    left = torch.randn(case.M, K if forward else N).to(dtype)
    lora = _adapter(case) if case.rank else {}

    def call(contestant: Contestant, **lora: Any) -> Callable[[int], Tensor]:
        held = weights.copies(contestant, dtype)
        if case.via == "layer" and contestant is ours:
            layer = ours.layer(weights.weight)
            layers = [layer] + [ours.copy(layer) for _ in range(len(held) - 1)]
            return lambda i: layers[i % len(layers)](left)
        if case.rank and contestant is not ours and lora:
            held = [contestant.attach(one, **lora) for one in held]
            lora = {}
        if case.via == "autograd":
            x = torch.zeros(case.M, K, dtype=dtype, requires_grad=True)
            with torch.enable_grad():
                graphs = [contestant.forward(one, x, **lora) for one in held]
            return lambda i: torch.autograd.grad(graphs[i % len(graphs)], x, left, retain_graph=True)[0]
        if case.via == "op" and contestant is ours:
            return lambda i: ours.forward_op(held[i % len(held)], left)
        function = contestant.forward if forward else contestant.backward_input
        return lambda i: function(held[i % len(held)], left, **lora)

    found = {ours.name: call(ours, **lora)}
    if case.rank:
        found[WITHOUT_LORA] = call(ours)
    found |= {peer.name: call(peer, **lora) for peer in peers}

    rows = checks.rows_of(case.M)
    right = weights.exact(dtype).t() if forward else weights.exact(dtype)
    allowed = {peer.name: peer.error for peer in peers}
    for name, function in found.items():
        added = _low_rank(case, left[rows], lora) if case.rank and name != WITHOUT_LORA else None
        result = function(0)[rows]
        if added is not None and case.dropout:
            plain = ours.forward(weights.quantized, left, **lora | {"lora_dropout": 0.0})[rows]
            checks.dropout(name, result, plain, added, case.dropout)
        else:
            checks.product(name, result, left[rows], right, dtype, added, allowed.get(name))
    return found


def _product_in_format(case: Case, weights: Weights, _: Sequence[Contestant]) -> Contestants:
    """forward and dx over a weight of `case.format`, beside the same over NF4."""
    dtype = getattr(torch, case.dtype)
    N, K = case.shape
    forward = case.operation == "forward"
    left, rows = torch.randn(case.M, K if forward else N).to(dtype), checks.rows_of(case.M)
    function = ours.forward if forward else ours.backward_input
    found: Contestants = {}
    for name, each in ((ours.name, Weights(case.shape, case.format)), (NF4, weights)):
        held = each.copies(ours, dtype)
        found[name] = lambda i, held=held: function(held[i % len(held)], left)
        right = each.exact(dtype).t() if forward else each.exact(dtype)
        checks.product(name, found[name](0)[rows], left[rows], right, dtype)
    return found


def _adapter(case: Case) -> dict[str, Any]:
    """A LoRA adapter of normal size, fp32 as PEFT keeps it, as arguments of qn.linear."""
    N, K = case.shape
    return {
        "lora_a": torch.randn(case.rank, K) * K**-0.5,
        "lora_b": torch.randn(N, case.rank) * 0.1,
        "lora_scaling": LORA_SCALING,
        "lora_dropout": case.dropout,
    }


def _low_rank(case: Case, left: Tensor, lora: dict[str, Any]) -> Tensor:
    a, b = lora["lora_a"].double(), lora["lora_b"].double() * lora["lora_scaling"]
    return left.double() @ a.t() @ b.t() if case.operation == "forward" else left.double() @ b @ a


def _lora_gradients(case: Case, weights: Weights, peers: Sequence[Contestant]) -> Contestants:
    dtype = getattr(torch, case.dtype)
    N, K = case.shape
    sizes = ((case.M, K), (case.M, N), (case.M, case.rank), (case.M, case.rank))
    arguments = tuple(torch.randn(size).to(dtype) for size in sizes)
    x, dy, u, v = (argument.double() for argument in arguments)
    wanted = torch.cat(((v.t() @ x).flatten(), (LORA_SCALING * dy.t() @ u).flatten()))
    found = {
        contestant.name: lambda _, contestant=contestant: contestant.lora_gradients(*arguments, LORA_SCALING)
        for contestant in (ours, *peers)
    }
    for name, function in found.items():
        checks.close(name, torch.cat([part.flatten() for part in function(0)]), wanted)
    return found
