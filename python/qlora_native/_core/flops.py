"""What torch's FlopCounterMode counts for our ops: as much as for the dense products that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from . import loss as _loss  # noqa: F401  (defines an op, beside those that _C registers)


def _linear_forward(x, codes, absmax, nested_absmax, nested_code, offset, code,
                    minimum, nested_minimum, zero_point, N, K, bits, blocksize, nested_blocksize, byte_format,
                    bias, lora_a, *others, **named):  # fmt: skip
    return 2 * prod(x[:-1]) * (N * K + _rank(lora_a) * (N + K))


def _linear_backward_input(dy, codes, absmax, nested_absmax, nested_code, offset, code,
                           minimum, nested_minimum, zero_point, N, K, bits, blocksize, nested_blocksize, byte_format,
                           lora_a, lora_b, lora_scaling, lora_dropout, seed, need_dx, *others, **named):  # fmt: skip
    return 2 * prod(dy[:-1]) * (_rank(lora_a) * N + need_dx * K * (N + _rank(lora_a)))


def _lora_gradients(x, dy, u, *others, **named):
    return 2 * prod(x[:-1]) * u[1] * (x[-1] + dy[-1])


def _linear_cross_entropy(hidden, labels, weight, codes, absmax, nested_absmax, nested_code, offset, code,
                          minimum, nested_minimum, zero_point, N, K, bits, blocksize, nested_blocksize, byte_format,
                          bias, lora_a, lora_b, *others, **named):  # fmt: skip
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


for _op, _formula in {
    "linear_forward": _linear_forward,
    "linear_backward_input": _linear_backward_input,
    "lora_gradients": _lora_gradients,
    "linear_cross_entropy": _linear_cross_entropy,
    "attention": _attention,
    "attention_backward": _attention_backward,
}.items():
    register_flop_formula(getattr(torch.ops.qlora_native, _op))(_formula)
