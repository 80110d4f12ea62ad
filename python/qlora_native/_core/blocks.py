"""Blocks of elements that share a scale, and of scales that share a second-level scale: sizes, counts, and checks."""

from __future__ import annotations

from typing import Any

from .errors import bad, bad_type

DEFAULT_BLOCKSIZE = 64  # QLoRA's
FORMATS_OF_ONE_BLOCKSIZE = {"mxfp4": 32, "nvfp4": 16}
NESTED_BLOCKSIZE = 256  # scales that share a second-level scale: QLoRA's number, and the only one in bitsandbytes


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


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
