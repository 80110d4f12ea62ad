"""Blocks of elements that share a scale, and of scales that share a second-level scale: sizes, counts, and checks."""

from __future__ import annotations

from typing import Any

from .errors import bad, bad_type
from .layouts import LAYOUTS

DEFAULT_BLOCKSIZE = 64  # QLoRA's
NESTED_BLOCKSIZE = 256  # scales that share a second-level scale: QLoRA's number, and the only one in bitsandbytes


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def chosen_blocksize(blocksize: int | None, format: str) -> int:
    """The checked `blocksize`; if it is None, the default of `format`."""
    if blocksize is None:
        return LAYOUTS[format].blocksize or DEFAULT_BLOCKSIZE
    check_blocksize(blocksize, format)
    return blocksize


def check_blocksize(blocksize: Any, format: str = "nf4") -> None:
    """Raise unless `blocksize` is a power of two up to 4096 that `format` has, or equals the only one that it has."""
    if not isinstance(blocksize, int):
        raise bad_type("blocksize", "an int", type(blocksize).__name__)
    layout = LAYOUTS[format]
    if layout.blocksize is not None:
        if blocksize != layout.blocksize:
            raise bad("blocksize", f"{layout.blocksize}, the only one of {format}", blocksize)
        return
    if not layout.min_blocksize <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise bad("blocksize", f"a power of two, {layout.min_blocksize} ... 4096", blocksize)
