"""How a bad argument is reported: which one, what was expected, what came. The same words as qlora_native::Error."""

from __future__ import annotations

from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bad(argument: str, expected: str, got: Any) -> ValueError:
    """The error for a wrong value."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def bad_type(argument: str, expected: str, got: Any) -> TypeError:
    """The error for a wrong type or dtype."""
    return TypeError(f"{argument}: expected {expected}, got {got}")


def check_float_dtype(argument: str, dtype: Any) -> None:
    """Raise TypeError unless `dtype` is one that the library computes in."""
    if dtype not in FLOAT_DTYPES:
        raise bad_type(argument, "torch.float32, torch.bfloat16 or torch.float16", dtype)


def check_blocksize(blocksize: Any) -> None:
    """Raise unless `blocksize` is a power of two in 32 ... 4096."""
    if not isinstance(blocksize, int):
        raise bad_type("blocksize", "an int", type(blocksize).__name__)
    if not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise bad("blocksize", "a power of two, 32 ... 4096", blocksize)
