"""The formats of a quantized weight: their names and codebooks, the maps of 8-bit scales, and the shape of codes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .blocks import ceil_div
from .errors import bad
from .layouts import LAYOUTS, LEVELS
from .microscaling import MICROSCALED

FORMATS = tuple(name for name, layout in LAYOUTS.items() if layout.quantizes)  # those that quantize() makes
CODEBOOKS = {
    name: torch.tensor(_C.codebook(name), dtype=torch.float32) for name in ("nf4", "fp4", "int4", *MICROSCALED)
}
DYNAMIC_MAP = torch.tensor(_C.dynamic_map(), dtype=torch.float32)
UNSIGNED_DYNAMIC_MAP = torch.tensor(_C.dynamic_map(is_signed=False), dtype=torch.float32)


def is_dynamic_map(tensor: Tensor, levels: Tensor) -> bool:
    """Whether `tensor`, a table of bitsandbytes, equals our table `levels` up to the last bits.

    bitsandbytes makes its tables with torch.linspace, whose last bits differ from processor to processor.
    """
    if tensor.shape != levels.shape or tensor.dtype != levels.dtype:
        return False
    return torch.allclose(tensor, levels.to(tensor.device), rtol=2**-20, atol=0)


def levels_of(format: str) -> Tensor | None:
    """The values of the codes of 4 bits, fp32 [16]; None for "codebook", whose values are any, and for 8 bits."""
    return CODEBOOKS.get(format, LEVELS.get(format))


def check_format(format: Any) -> None:
    """Raise ValueError unless `format` is one of FORMATS."""
    if format not in FORMATS:
        raise bad("format", "one of " + ", ".join(FORMATS), repr(format))


def codes_shape(*shape: int, bits: int) -> tuple[int, ...]:
    """The shape of the codes of W [N, K] or [E, N, K].

    Each row of W has a row of bytes. If K is odd, a byte with two codes may belong to two rows, and the codes have one
    column.
    """
    if bits == 8:
        return shape
    *leading, K = shape
    return (*leading, K // 2) if K % 2 == 0 else (ceil_div(math.prod(shape), 2), 1)
