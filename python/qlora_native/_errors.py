"""Errors of bad arguments: each names the argument, what was expected and what came, as qlora_native::Error does."""

from __future__ import annotations

import sys
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS_OF_ONE_BLOCKSIZE = {"mxfp4": 32, "nvfp4": 16}
DEFAULT_BLOCKSIZE = 64  # QLoRA's, for all other formats


def bad(argument: str, expected: str, got: Any) -> ValueError:
    """The error for a wrong value."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def bad_type(argument: str, expected: str, got: Any) -> TypeError:
    """The error for a wrong type or dtype."""
    return TypeError(f"{argument}: expected {expected}, got {got}")


def is_finite_number(value: Any) -> bool:
    """Whether `value` is an int or a float that is finite as a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def check_float_dtype(argument: str, dtype: Any) -> None:
    """Raise TypeError unless `dtype` is fp32, bf16 or fp16."""
    if dtype not in FLOAT_DTYPES:
        raise bad_type(argument, "torch.float32, torch.bfloat16 or torch.float16", dtype)


def check_memory(argument: str, tensor: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raise unless `tensor` is dense and its storage still holds all of its elements.

    FSDP and offloading free a storage while tensors still refer to it. Subclasses such as DTensor, or the fake tensors
    of the compiler, are not checked. A meta tensor passes only if `like` is None or a meta tensor too.
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
    """The checked `blocksize`; if it is None, the default of `format`."""
    if blocksize is None:
        return FORMATS_OF_ONE_BLOCKSIZE.get(format, DEFAULT_BLOCKSIZE)
    check_blocksize(blocksize, format)
    return blocksize


def check_blocksize(blocksize: Any, format: str = "nf4") -> None:
    """Raise unless `blocksize` is a power of two in 32 ... 4096, or equals the only one that `format` has."""
    if not isinstance(blocksize, int):
        raise bad_type("blocksize", "an int", type(blocksize).__name__)
    if format in FORMATS_OF_ONE_BLOCKSIZE:
        only = FORMATS_OF_ONE_BLOCKSIZE[format]
        if blocksize != only:
            raise bad("blocksize", f"{only}, the only one of {format}", blocksize)
        return
    if not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise bad("blocksize", "a power of two, 32 ... 4096", blocksize)
