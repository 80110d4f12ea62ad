"""PEFT's own LoRA layer over our Linear4bit: two more products and an addition beside ours, in the adapter's fp32."""

from __future__ import annotations

import copy as copying
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from . import ours

NAME = "PEFT unfused"
copy = copying.deepcopy


def missing() -> str | None:
    return None if find_spec("peft") else "not installed"


def supports(case: object) -> bool:
    # Without dropout, because its mask differs from ours, and the result could not be checked.
    through = case.via == ("function" if case.operation == "forward" else "autograd")
    return case.operation in ("forward", "dx") and case.rank > 0 and not case.dropout and through


def hold(weight: Tensor, dense: Tensor, dtype: torch.dtype) -> nn.Module:
    return ours.layer(weight)


def attach(held: nn.Module, lora_a: Tensor, lora_b: Tensor, lora_scaling: float, lora_dropout: float) -> nn.Module:
    """The layer with the adapter that the arguments of qn.linear describe."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    rank = lora_a.shape[0]
    layer = Linear(held, "default", LoraConfig(r=rank, lora_alpha=lora_scaling * rank), r=rank,
                   lora_alpha=lora_scaling * rank)  # fmt: skip
    layer.lora_A["default"].weight.data = lora_a
    layer.lora_B["default"].weight.data = lora_b
    return layer.requires_grad_(False)


def nbytes(held: nn.Module) -> int:
    return held.quantized_weight.nbytes


def forward(held: Any, x: Tensor) -> Tensor:
    return held(x)
