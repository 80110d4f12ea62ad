"""Observe the inputs of layers: the Gram matrix XᵀX of what each one multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._core.calibrate import add_gram
from .._core.errors import bad
from .batches import mask_of
from .experts import ObservedExperts
from .layers import Stop, is_same, patched_forward, version_of


class Inputs:
    """The inputs of some linear layers. Layers with the same input, as q, k and v, share one matrix.

    Attributes:
        tokens: {name of the layer: rows of X that it has multiplied}.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._grams: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}  # the first layer that had the same input
        self._last: dict[str, tuple[Tensor, int]] = {}  # the input of each layer in this batch, and its version
        self._mask: Tensor | None = None
        self.tokens: dict[str, int] = dict.fromkeys(modules, 0)

    def key(self, name: str) -> str:
        """The first of the layers that have the same input as this one."""
        return self._leader.get(name, name)

    def gram(self, keys: list[str], name: str) -> Tensor | None:
        """The sum of XᵀX [K, K] in fp32 over all rows of some keys; None if no batch has reached them.

        Raises:
            ValueError: an input had a NaN or Inf; the message has `name`.
        """
        found = [self._grams[key] for key in keys if key in self._grams]
        total = sum(found[1:], start=found[0]) if found else None
        check_finite_gram(total, name)
        return total

    @contextmanager
    def observed(self, stop: bool = False) -> Iterator[Inputs]:
        """Observe the layers as long as the context lasts.

        Args:
            stop: they have one input, and what they would give is not wanted: none of them multiplies, and the forward
                ends when the last one has been called.
        """
        with ExitStack() as stack:
            for name, module in self._modules.items():
                forward = self._only_observing if stop else self._observing
                stack.enter_context(patched_forward(module, partial(forward, name, module.forward)))
            yield self
        self._last.clear()

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Begin a batch. Rows whose attention_mask is 0 are padding, and do not count."""
        self._mask = mask_of(batch)
        self._last.clear()

    def _observing(self, name: str, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._add(name, x, *args)
        return forward(x, *args, **kwargs)

    def _only_observing(self, name: str, _: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._add(name, x, *args)
        if self.key(name) != self.key(next(iter(self._last))):
            raise _not_shared(name)
        if len(self._last) == len(self._modules):
            raise Stop
        return x.new_zeros(*x.shape[:-1], self._modules[name].out_features)

    def _add(self, name: str, x: Tensor, *args: Any) -> None:
        same = next((other for other, seen in self._last.items() if is_same(seen, x)), None)
        self._last[name] = x, version_of(x)
        module = self._modules[name]
        if isinstance(module, ObservedExperts):
            module.observe(x, *args)
            return
        self.tokens[name] += count_within(self._mask, x)
        leader = name if same is None else self._leader.get(same, same)
        if self._leader.setdefault(name, leader) != name:
            if self._leader[name] != leader:
                raise _not_shared(name)
            return
        rows = rows_within(self._mask, x.detach())
        if name not in self._grams:
            self._grams[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
        add_gram(self._grams[name], rows)


def _not_shared(name: str) -> RuntimeError:
    return RuntimeError(f"{name} shared its input with others in the first batch, and does not in another one")


def count_within(mask: Tensor | None, x: Tensor) -> int:
    """How many rows `rows_within` has."""
    return int(mask.sum()) if _fits(mask, x) else x.numel() // x.shape[-1]


def rows_within(mask: Tensor | None, x: Tensor) -> Tensor:
    """The rows [tokens, K] of x [B, T, K] or [B * T, K] that `mask` [B, T] has; all rows of an x of another shape."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[mask.flatten()] if _fits(mask, x) else rows


def _fits(mask: Tensor | None, x: Tensor) -> bool:
    if mask is None or x.dim() not in (2, 3):
        return False
    return x.shape[:-1] == mask.shape if x.dim() == 3 else len(x) == mask.numel()


def check_finite_gram(gram: Tensor | None, name: str) -> None:
    """Raise ValueError if XᵀX of the layer `name` has a NaN or Inf."""
    if gram is not None and not all(end.isfinite() for end in gram.aminmax()):
        raise bad(f"the inputs of {name}", "finite values", "NaN or Inf")
