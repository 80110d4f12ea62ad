"""How a bad argument is reported: which one, what was expected, what came. The same words as qlora_native::Error."""

from __future__ import annotations

import sys
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS_OF_ONE_BLOCKSIZE = {"mxfp4": 32, "nvfp4": 16}
DEFAULT_BLOCKSIZE = 64  # of the other formats: QLoRA's


def bad(argument: str, expected: str, got: Any) -> ValueError:
    """The error for a wrong value."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def bad_type(argument: str, expected: str, got: Any) -> TypeError:
    """The error for a wrong type or dtype."""
    return TypeError(f"{argument}: expected {expected}, got {got}")


def is_finite_number(value: Any) -> bool:
    """Whether it is an int or a float, and a float can hold it."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def check_float_dtype(argument: str, dtype: Any) -> None:
    """Raise TypeError unless `dtype` is one that the library computes in."""
    if dtype not in FLOAT_DTYPES:
        raise bad_type(argument, "torch.float32, torch.bfloat16 or torch.float16", dtype)


def check_memory(argument: str, tensor: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raise unless `tensor` is dense and all of it lies in its storage, which may have been freed under it.

    A subclass (a DTensor, a fake of the compiler) answers for itself. A meta tensor passes where `like` is one too.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return
    if tensor.layout is not torch.strided:
        raise bad_type(argument, "a dense tensor", tensor.layout)
    if tensor.is_meta:
        if like is not None and not like.is_meta:
            raise bad(argument, "a tensor with values", "one on the meta device")
    elif tensor.numel():
        last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise bad(argument, "a tensor with memory", "one whose storage was freed")


def chosen_blocksize(blocksize: int | None, format: str) -> int:
    """`blocksize`, or where it is None that of `format`, checked as `check_blocksize` does."""
    if blocksize is None:
        return FORMATS_OF_ONE_BLOCKSIZE.get(format, DEFAULT_BLOCKSIZE)
    check_blocksize(blocksize, format)
    return blocksize


def check_blocksize(blocksize: Any, format: str = "nf4") -> None:
    """Raise unless `blocksize` is a power of two in 32 ... 4096, or the one of `format`."""
    if not isinstance(blocksize, int):
        raise bad_type("blocksize", "an int", type(blocksize).__name__)
    if format in FORMATS_OF_ONE_BLOCKSIZE:
        only = FORMATS_OF_ONE_BLOCKSIZE[format]
        if blocksize != only:
            raise bad("blocksize", f"{only}, the only one of {format}", blocksize)
        return
    if not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise bad("blocksize", "a power of two, 32 ... 4096", blocksize)
