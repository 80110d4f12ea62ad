"""bitsandbytes with NF4 and double quantization, in the layout it trains in.

Its forward decodes the whole weight and multiplies (`matmul_4bit`). Its backward does the same, and is repeated here
from its MatMul4Bit. bitsandbytes_packed is the layout to which it converts a layer for inference.
"""

from __future__ import annotations

import copy as copying
import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

NAME = "bitsandbytes"
BLOCKSIZE = 64


def missing() -> str | None:
    if find_spec("bitsandbytes") is None:
        return "not installed"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional download is missing
    return None


def supports(case: object) -> bool:
    return case.operation in ("quantize", "dequantize", "forward", "dx") and not case.rank


def quantize(weight: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")


def hold(weight: Tensor, dense: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
    codes, state = quantize(weight)
    state.dtype = dtype
    return codes, state


def copy(held: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return copying.deepcopy(held)


def nbytes(held: tuple[Tensor, Any]) -> int:
    return held[0].nbytes


def dequantize(held: tuple[Tensor, Any], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    held[1].dtype = dtype
    return dequantize_4bit(*held)


def forward(held: tuple[Tensor, Any], x: Tensor) -> Tensor:
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x, held[0], quant_state=held[1])


def backward_input(held: tuple[Tensor, Any], dy: Tensor) -> Tensor:
    return torch.matmul(dy, dequantize(held, dy.dtype))
