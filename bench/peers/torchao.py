"""torchao's NF4Tensor, with its double quantization (blocks of 64, scalers in blocks of 256): plain torch operations.

It decodes the whole weight for every product, and keeps only the weight for backward. It finds the nearest code by
comparing with all sixteen, which takes a gigabyte and seconds for the largest shapes.
"""

from __future__ import annotations

import copy as copying
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

NAME = "torchao"
MODULE = "torchao.quantization.quantize_.workflows.nf4"
BLOCKSIZE, SCALER_BLOCKSIZE = 64, 256
ERROR = 0.03  # its 8-bit scales are linear, not the dynamic map
copy = copying.deepcopy


def missing() -> str | None:
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # kernels for GPUs; it says that they fail
    try:
        found = find_spec("torchao") and find_spec(f"{MODULE}.nf4_tensor")
    except ModuleNotFoundError:
        return "this version has no NF4 tensors"
    return None if found else "not installed"


def supports(case: object) -> bool:
    # It takes tenths of seconds for any M, so a few cases are enough.
    product = case.operation in ("forward", "dx") and case.M in (1, 64, 512) and not case.rank
    return (product or case.operation in ("quantize", "dequantize")) and (case.via, case.memory) == (
        "function",
        "default",
    )


def quantize(weight: Tensor) -> Any:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return to_nf4(weight, BLOCKSIZE, SCALER_BLOCKSIZE)


def hold(weight: Tensor, dense: Tensor, dtype: torch.dtype) -> Any:
    return quantize(weight.to(dtype))  # its products are in the dtype that was quantized


def nbytes(held: Any) -> int:
    return held.numel() // 2


def dequantize(held: Any, dtype: torch.dtype) -> Tensor:
    return held.get_original_weight().to(dtype)


def forward(held: Any, x: Tensor) -> Tensor:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

    return linear_nf4(x, held)


def backward_input(held: Any, dy: Tensor) -> Tensor:
    return dy @ held.get_original_weight()
