"""torch's own product with the unquantized weight, in the dtype of the activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "torch dense"


def missing() -> str | None:
    return None


def supports(case: object) -> bool:
    return case.operation == "lora_gradients" or (case.operation in ("forward", "dx") and not case.rank)


def hold(weight: Tensor, dense: Tensor, dtype: torch.dtype) -> Tensor:
    return dense.to(dtype)


def copy(held: Tensor) -> Tensor:
    return held.clone()


def nbytes(held: Tensor) -> int:
    return held.nbytes


def forward(held: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, held)


def backward_input(held: Tensor, dy: Tensor) -> Tensor:
    return dy @ held


def lora_gradients(x: Tensor, dy: Tensor, u: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return v.t() @ x, scaling * (dy.t() @ u)
