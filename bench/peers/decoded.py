"""Our own weight, decoded whole and multiplied by torch, which a product should never be slower than."""

from __future__ import annotations

import qlora_native as qn
from torch import Tensor

from . import ours, torch_dense

NAME = "decode, then dense"

missing = ours.missing
hold = ours.hold
copy = ours.copy
nbytes = ours.nbytes


def supports(case: object) -> bool:
    return case.operation in ("forward", "dx") and not case.rank and case.via == "function"


def forward(held: qn.QuantizedWeight, x: Tensor) -> Tensor:
    return torch_dense.forward(ours.dequantize(held, x.dtype), x)


def backward_input(held: qn.QuantizedWeight, dy: Tensor) -> Tensor:
    return torch_dense.backward_input(ours.dequantize(held, dy.dtype), dy)
