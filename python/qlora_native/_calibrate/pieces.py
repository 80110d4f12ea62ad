"""Quantize a layer piece by piece: what lies behind a weight is observed only when that weight has been quantized.

A piece is the weights that multiply the same input, such as q, k and v; then come o, gate and up, and down. Each is
observed in a pass that ends at it, so the weights after it cost nothing; and what lies before it is not computed again,
but its output is kept. All passes over a layer together multiply by each weight about once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layers import Layers, is_same, patched_forward, version_of

MAX_PIECES = 16  # a layer with more has experts as modules of their own, whose calls depend on the tokens


@dataclass(frozen=True)
class Order:
    """How a layer calls its modules.

    Attributes:
        pieces: the paths of the weights' modules, in the order in which they are quantized. None: they cannot be taken
            apart, because one is not called exactly once, or two in different pieces share a weight.
        others: the layer's other modules that are called exactly once, and how many pieces each one's output depends
            on: those that are called before it ends.
    """

    pieces: list[list[str]] | None
    others: list[tuple[nn.Module, int]]


def order_of_calls(layers: Layers, index: int, wanted: Mapping[str, nn.Module]) -> Order:
    """Run a layer over the first batch, and see how it calls its modules.

    Args:
        layers: of the model; layer `index` is next.
        index: of the layer.
        wanted: {path: module} of the weights.
    """
    path_of = {module: path for path, module in wanted.items()}
    calls: Counter[nn.Module] = Counter()
    pieces: list[list[str]] = []
    inputs: list[tuple[Tensor, int]] = []  # of each piece, with its version: a tensor may be changed in place
    before_end: dict[nn.Module, int] = {}

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        if module in path_of:
            place = next((i for i, seen in enumerate(inputs) if is_same(seen, args[0])), None)
            if place is None:
                place = len(pieces)
                pieces.append([])
                inputs.append((args[0], version_of(args[0])))
            pieces[place].append(path_of[module])

    def end(module: nn.Module, *_: Any) -> None:
        before_end[module] = len(pieces)

    with ExitStack() as stack:
        for module in list(layers.modules[index].modules())[1:]:
            stack.enter_context(module.register_forward_pre_hook(begin))
            stack.enter_context(module.register_forward_hook(end))
        for _ in layers.run(index, advance=False, batches=1):
            pass
    weights = [{id(module.weight) for module in map(wanted.__getitem__, piece)} for piece in pieces]
    apart = sum(map(len, weights)) == len(set().union(*weights)) and len(pieces) <= MAX_PIECES
    if not apart or any(calls[module] != 1 for module in path_of):
        return Order(None, [])
    others = before_end.items()
    return Order(pieces, [(each, count) for each, count in others if calls[each] == 1 and each not in path_of])


class Replay:
    """Gives outputs of modules again, batch by batch, instead of computing them again."""

    def __init__(self, has_room: Callable[[], bool]) -> None:
        """Keep outputs as long as `has_room()`. What is not kept is computed again, with the same bits."""
        self._batch, self._has_room, self._keep = 0, has_room, False
        self._called: set[nn.Module] = set()  # in this batch
        self._kept: dict[nn.Module, dict[int, tuple[Any, list[int]]]] = {}
        self._patched = ExitStack()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self._patched.close()
        self._kept.clear()

    def begin(self, batch: int, last: bool = False) -> None:
        """Begin a batch, by its number. In the last pass nothing more is kept, and what was kept is given up."""
        if last:
            for kept in self._kept.values():
                kept.pop(batch - 1, None)
        self._batch, self._keep = batch, not last and self._has_room()
        self._called.clear()

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Keep the outputs of more modules, which are what they will be in the quantized model."""
        for module in modules:
            if module not in self._kept:
                self._kept[module] = {}
                self._patched.enter_context(patched_forward(module, self._replaying(module, module.forward)))

    def _replaying(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        kept = self._kept[module]

        def replay(*args: Any, **kwargs: Any) -> Any:
            if module in self._called:  # a second time, which the first batch did not have
                return forward(*args, **kwargs)
            self._called.add(module)
            output, versions = kept.get(self._batch, (None, None))
            # What has been changed in place, by who got it, is computed again.
            if versions is not None and versions == _versions(output):
                return output
            output = forward(*args, **kwargs)
            versions = _versions(output)
            if versions is not None and self._keep:
                kept[self._batch] = output, versions
                for inner in module.modules():
                    if inner is not module and inner in self._kept:
                        self._kept[inner].pop(self._batch, None)
            return output

        return replay


def _versions(output: Any) -> list[int] | None:
    """Those of an output's tensors; None if they are not counted, or if it has something else than tensors and None."""
    parts = output if isinstance(output, tuple) else (output,)
    if any(part is not None and (not isinstance(part, Tensor) or part.is_inference()) for part in parts):
        return None
    return [version_of(part) for part in parts if part is not None]
