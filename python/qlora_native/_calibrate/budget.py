"""A budget of bits: the weights whose rounding moves a model most get more than 4 bits.

How much a weight matters is measured: its transformer layer is run over some of the text with this weight alone
rounded, and what counts is the mean over tokens of ‖ΔY‖² / ‖Y‖², where Y is the layer's output for a token. It is
relative, because what follows normalizes each token; and for each token, because a few are hundreds of times as large
as the others. Only one layer is needed for it, and no gradients. The weight is rounded to the nearest levels: that
ranks weights as well as calibrated rounding, and can be done before the layer is calibrated.

The errors of different weights are nearly uncorrelated, so their squares add up. Weights are then the items of a
knapsack, and are taken by what each gains for a byte (Dantzig, "Discrete-variable extremum problems", 1957).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._core.errors import bad, bad_type, dtype_name, is_finite_number, weight_named
from .._core.weight import QuantizedWeight
from .._layers.base import zero_weight
from .._layers.linear import linear_class
from .batches import mask_of
from .feedback import Options
from .layers import Layers, patched_forward
from .observe import rows_within
from .report import BUDGETED, CalibrationReport

MAX_BITS = 16
MEASURED_TOKENS = 2048  # that a layer is measured on


@dataclass(frozen=True)
class Budget:
    """What the weights of a model may take.

    Attributes:
        bits: the mean of all elements, with their scales and tables, as they are stored.
        eight: whether weights may have 8 bits.
        dtype: in which weights that are not quantized are stored; None: in their own.
    """

    bits: float
    eight: bool = True
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Item:
    """A weight, and what it may become.

    Attributes:
        sizes: its bytes in each format that it may have.
        sensitivity: how far the output of its transformer layer moves in each of them.
    """

    sizes: tuple[int, ...]
    sensitivity: tuple[float, ...]

    def gain(self, before: int, after: int) -> float:
        """How much less the output moves in format `after`, for each byte that it takes more than `before`."""
        cost = self.sizes[after] - self.sizes[before]
        return (self.sensitivity[before] - self.sensitivity[after]) / cost if cost > 0 else math.inf

    def steps(self) -> list[tuple[int, int]]:
        """The formats that it goes through, as pairs: each step gains less for a byte than the one before it."""
        steps, at = [], 0
        while better := [to for to in range(at + 1, len(self.sizes)) if self.sensitivity[to] < self.sensitivity[at]]:
            steps.append((at, max(better, key=partial(self.gain, at))))
            at = steps[-1][1]
        return steps


def choose(items: Sequence[Item], spare: float) -> list[int]:
    """The index of each item's format, such that the outputs move little in all.

    Steps are taken by their gain for a byte, equal ones in the order of the items. One that does not fit is left out,
    and others may follow it. A larger budget never gives a larger sum: the first step that it alone can take gains at
    least as much as all that the smaller one takes from there on.

    Args:
        items: the weights.
        spare: the bytes that they may take beyond those of their first formats.
    """
    steps = [(-item.gain(*step), number, step) for number, item in enumerate(items) for step in item.steps()]
    chosen = [0] * len(items)
    for _, number, (before, after) in sorted(steps):
        cost = items[number].sizes[after] - items[number].sizes[before]
        if chosen[number] == before and cost <= spare:
            chosen[number] = after
            spare -= cost
    return chosen


class Probe:
    """The outputs of a transformer layer for some of the text, before its weights are quantized."""

    def __init__(self, layers: Layers, index: int, batches: Sequence[Mapping[str, Any]]) -> None:
        """Run layer `index`, which is the next one, over the first batches, as many as have MEASURED_TOKENS."""
        self._layer = layers.modules[index]
        self._calls: list[tuple[Any, Any, Tensor | None, Tensor]] = []
        forward, mask, tokens = self._layer.forward, None, 0

        def noting(*args: Any, **kwargs: Any) -> Any:
            nonlocal tokens
            output = forward(*args, **kwargs)
            rows = _rows(output, mask)
            self._calls.append((args, kwargs, mask, rows))
            tokens += len(rows)
            return output

        with patched_forward(self._layer, noting):
            for number in layers.run(index, advance=False):
                if tokens >= MEASURED_TOKENS:
                    break
                mask = mask_of(batches[number])

    def sensitivity(self, forwards: Mapping[nn.Module, Callable[..., Any]]) -> float:
        """How far the outputs move: the mean over tokens of ‖ΔY‖² / ‖Y‖².

        Args:
            forwards: what modules in the layer do in place of their own forward.
        """
        ratios: list[float] = []
        with ExitStack() as stack:
            for module, forward in forwards.items():
                stack.enter_context(patched_forward(module, forward))
            for args, kwargs, mask, before in self._calls:
                after = _rows(self._layer(*args, **kwargs), mask)
                ratio = (after - before).square().sum(dim=-1) / before.square().sum(dim=-1)
                ratios += ratio[ratio.isfinite()].tolist()
        return math.fsum(ratios) / max(1, len(ratios))


def _rows(output: Any, mask: Tensor | None) -> Tensor:
    """The hidden states [tokens, D] in fp32 of a layer's output."""
    return rows_within(mask, output[0] if isinstance(output, tuple) else output).float()


class BudgetAllocator:
    """Gives the weights of a model what a budget has.

    Attributes:
        sensitivity: {path of a layer: how far the output of its transformer layer moves if its weight alone is rounded
            to the nearest levels; one value for each quantized format that it may have}.
    """

    def __init__(
        self, budget: Budget, options: Options, layers: Mapping[str, nn.Module], experts: Sequence[Tensor]
    ) -> None:
        """Count the bytes.

        Args:
            budget: what the weights may take.
            options: the format that all of them have at first.
            layers: the linear layers by their paths. Some may share a weight, which counts once.
            experts: weights that keep this format.

        Raises:
            TypeError, ValueError: the bits are no number, too many or not enough, or do not go with the format.
        """
        _check(budget.bits, options.format)
        self.sensitivity: dict[str, tuple[float, ...]] = {}
        self._options = [options, *([replace(options, format="int8", codebook=None)] if budget.eight else [])]
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._formats: dict[str, tuple[str, ...]] = {}
        for path, layer in layers.items():
            dtype = budget.dtype or layer.weight.dtype
            sizes = (_bytes(each, layer.weight) for each in self._options)
            self._sizes[path] = (*sizes, layer.weight.numel() * dtype.itemsize)
            self._formats[path] = (*(each.format for each in self._options), dtype_name(dtype))
        paths = {id(layer.weight): path for path, layer in layers.items()}.values()
        self._least = sum(self._sizes[path][0] for path in paths) + sum(map(partial(_bytes, options), experts))
        self._elements = sum(layers[path].weight.numel() for path in paths) + sum(w.numel() for w in experts)
        self._spare = budget.bits * self._elements / 8 - self._least
        if self._spare < 0:
            least = math.ceil(100 * 8 * self._least / self._elements) / 100
            raise bad("bits", f"at least {least:.2f}, which all weights in {options.format} have", budget.bits)

    def quantized(self, weight: Tensor, format: str) -> QuantizedWeight:
        """Round a weight to the nearest levels of one of the formats."""
        return next(options for options in self._options if options.format == format).round_to_nearest(weight)

    def measure(self, probe: Probe, layers: Mapping[str, nn.Module]) -> None:
        """Set `sensitivity` of the linear layers in a transformer layer, which is run for it.

        Args:
            probe: of the transformer layer.
            layers: {path: linear layer}, before they are quantized.
        """
        found: dict[int, tuple[float, ...]] = {}
        for path, layer in layers.items():
            weight = layer.weight
            if id(weight) not in found:
                own = [other for other in layers.values() if other.weight is weight]
                sensitivity = []
                for options in self._options:
                    with weight_named(f"{path}."):
                        q = options.round_to_nearest(weight)
                    rounded = {other: linear_class(q).from_quantized(q, other.bias).forward for other in own}
                    sensitivity.append(probe.sensitivity(rounded))
                found[id(weight)] = tuple(sensitivity)
            self.sensitivity[path] = found[id(weight)]

    def choose(self, report: CalibrationReport) -> dict[str, str]:
        """Choose the weights that get more bits, and note them in the report of all weights.

        Returns:
            {path of the layer: "int8", or the dtype of a weight that is not quantized}.
        """
        weights = {number: each for number, each in enumerate(report.weights) if each.sensitivity is not None}
        items = [Item(self._sizes[each.name], (*each.sensitivity, 0.0)) for each in weights.values()]
        chosen: dict[str, str] = {}
        taken = self._least
        for (number, each), item, index in zip(weights.items(), items, choose(items, self._spare), strict=True):
            if index > 0:
                chosen[each.name] = self._formats[each.name][index]
                report.weights[number] = replace(each, format=chosen[each.name], fallback=None)
                taken += item.sizes[index] - item.sizes[0]
        report.bits = 8 * taken / self._elements
        return chosen


def _check(bits: Any, format: str) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int | float):
        raise bad_type("bits", "a number or None", type(bits).__name__)
    if not is_finite_number(bits) or bits > MAX_BITS:
        raise bad("bits", f"a number up to {MAX_BITS}", bits)
    if format not in BUDGETED:
        raise bad("bits", f"None with a format other than {' and '.join(BUDGETED)}", f"{bits} with {format}")


def _bytes(options: Options, weight: Tensor) -> int:
    """The bytes of a weight when it is quantized, with its scales and tables."""
    how = options.format, options.blocksize, options.double_quant, options.codebook
    return zero_weight(tuple(weight.shape), torch.float32, "meta", *how).nbytes
