"""What `torch.utils.flop_counter.FlopCounterMode` counts for our ops: as much as for the dense products they replace.

Importing the counter imports triton where there is one, so the formulas are registered when a program imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def _linear_forward(x, codes, absmax, nested_absmax, nested_code, offset, code, N, K, bits, blocksize,
                    bias, lora_a, *others, **named):  # fmt: skip
    return 2 * prod(x[:-1]) * (N * K + _rank(lora_a) * (N + K))


def _linear_backward_input(dy, codes, absmax, nested_absmax, nested_code, offset, code, N, K, bits, blocksize,
                           lora_a, lora_b, lora_scaling, lora_dropout, seed, need_dx, *others, **named):  # fmt: skip
    return 2 * prod(dy[:-1]) * (_rank(lora_a) * N + need_dx * K * (N + _rank(lora_a)))


def _lora_gradients(x, dy, u, *others, **named):
    return 2 * prod(x[:-1]) * u[1] * (x[-1] + dy[-1])


def _linear_cross_entropy(hidden, labels, weight, codes, absmax, nested_absmax, nested_code, offset, code, N, K, bits,
                          blocksize, bias, lora_a, lora_b, *others, **named):  # fmt: skip
    (T, K), N, rank = hidden, N if weight is None else weight[0], _rank(lora_a)
    of_hidden, of_weight, _, of_adapter = others[-2]
    product = N * K + rank * (N + K)
    v = rank * N * (of_hidden or of_adapter)
    return 2 * T * (product + v + of_hidden * K * (N + rank) + of_weight * N * K + of_adapter * rank * (N + K))


def _attention(q, k, *others, **named):
    return _products_of_heads(2, q, k)  # scores, and probabilities times v


def _attention_backward(dout, q, k, *others, **named):
    return _products_of_heads(5, q, k)  # scores again, and the gradients of probabilities, q, k and v


def _products_of_heads(count: int, q: Sequence[int], k: Sequence[int]) -> int:
    """Products over all pairs of query and key, whatever is masked, as torch counts its own attention."""
    return count * 2 * prod(q) * k[2]


def _rank(lora_a: Sequence[int] | None) -> int:
    return 0 if lora_a is None else lora_a[-2]


FORMULAS: dict[str, Callable[..., int]] = {
    "linear_forward": _linear_forward,
    "linear_backward_input": _linear_backward_input,
    "lora_gradients": _lora_gradients,
    "linear_cross_entropy": _linear_cross_entropy,
    "attention": _attention,
    "attention_backward": _attention_backward,
}


def _register(counter: ModuleType) -> None:
    for op, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.qlora_native, op))(formula)


class _WhenImported(MetaPathFinder):
    """Finds the counter as Python does, and registers the formulas once it has been executed."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_formulas() -> None:
    """Register the formulas now if the counter has been imported, or else when it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
