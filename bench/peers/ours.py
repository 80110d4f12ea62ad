"""qlora_native itself, with the functions of an adapter and a few more for the op, the layer and LoRA."""

from __future__ import annotations

import copy as copying
from typing import Any

import qlora_native as qn
import torch
from qlora_native._core.weight import op_arguments
from torch import Tensor

NAME = "qlora_native"
BLOCKSIZE = 64


def missing() -> str | None:
    return None


def supports(case: object) -> bool:
    return True


def quantize(weight: Tensor, format: str = "nf4") -> qn.QuantizedWeight:
    return qn.quantize(weight, format, BLOCKSIZE if format == "nf4" else None, double_quant=True)


def hold(weight: Tensor, dense: Tensor, dtype: torch.dtype) -> qn.QuantizedWeight:
    return quantize(weight)


def copy(held: qn.QuantizedWeight) -> qn.QuantizedWeight:
    return copying.deepcopy(held)


def nbytes(held: qn.QuantizedWeight) -> int:
    return held.nbytes


def dequantize(held: qn.QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return qn.dequantize(held, dtype=dtype)


def forward(held: qn.QuantizedWeight, x: Tensor, **lora: Any) -> Tensor:
    """`lora`: the arguments of qn.linear that describe the adapter."""
    return qn.linear(x, held, **lora)


def layer(weight: Tensor) -> qn.nn.Linear4bit:
    """The layer over `weight` [N, K], as `from_linear` makes it."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return qn.nn.Linear4bit.from_linear(linear, format="nf4", blocksize=BLOCKSIZE, double_quant=True)


def forward_op(held: qn.QuantizedWeight, x: Tensor) -> Tensor:
    return torch.ops.qlora_native.linear_forward(x, *op_arguments(held), None, *_lora_arguments())[0]


def backward_input(held: qn.QuantizedWeight, dy: Tensor, **lora: Any) -> Tensor:
    return torch.ops.qlora_native.linear_backward_input(dy, *op_arguments(held), *_lora_arguments(**lora), True)[0]


def lora_gradients(x: Tensor, dy: Tensor, u: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return torch.ops.qlora_native.lora_gradients(x, dy, u, v, scaling, 0.0, None, torch.float32)


def _lora_arguments(
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float = 1.0,
    lora_dropout: float = 0.0,
) -> tuple[Any, ...]:
    return lora_a, lora_b, lora_scaling, lora_dropout, None
