"""bitsandbytes in the layout its Linear4bit switches to in eval mode, on processors with AVX-512 BF16.

It has no backward, rounds the scales to bf16 and drops the double quantization, so it is not a peer for training, but
it is what a user gets at inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import bitsandbytes as trained

NAME = "bitsandbytes packed"
MAX_M = 64  # the layout is made for few rows

copy = trained.copy
nbytes = trained.nbytes
forward = trained.forward


def missing() -> str | None:
    if reason := trained.missing():
        return reason
    from bitsandbytes.functional import has_avx512bf16

    return None if has_avx512bf16() else "needs AVX-512 BF16"


def supports(case: object) -> bool:
    plain = not case.rank and case.via == "function" and case.dtype == "bfloat16"
    return plain and case.operation == "forward" and case.M <= MAX_M


def hold(weight: Tensor, dense: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    return _convert_weight_packed_for_cpu(*trained.quantize(weight))
