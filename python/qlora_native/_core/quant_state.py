"""Read and check the quant_state of bitsandbytes' files: a JSON object beside the codes of a weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .blocks import NESTED_BLOCKSIZE
from .errors import FLOAT_DTYPES, bad, bad_type, dtype_name
from .json import parse_object

FORMATS = ("nf4", "fp4")  # those that bitsandbytes has in files
QUANT_STATE = ".quant_state.bitsandbytes__"  # the format follows
# What follows the name of a weight in the names of the tensors that belong to its codes.
STATE_SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *(QUANT_STATE + format for format in FORMATS),
)


def bytes_of(name: str, codes: Tensor, count: int) -> Tensor:
    """The codes of a file as `count` bytes. bitsandbytes stores them in any dtype (its quant_storage)."""
    if codes.dtype not in (torch.uint8, torch.int8, *FLOAT_DTYPES):
        raise bad_type(name, "codes stored as uint8, int8, float16, bfloat16 or float32", codes.dtype)
    if codes.numel() * codes.element_size() != count:
        raise bad(name, f"{count} bytes, as its quant_state says", f"{codes.dtype} {list(codes.shape)}")
    return codes.detach().contiguous().view(-1).view(torch.uint8)


def read_quant_state(key: str, packed: Tensor, nested: bool) -> dict[str, Any]:
    """Parse bitsandbytes' quant_state, and check the fields that are used here."""
    max_bytes = 1 << 16  # bitsandbytes writes some 200
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() > max_bytes or packed.is_meta:
        raise bad(key, "the bytes of a JSON object", f"{packed.dtype} {list(packed.shape)}")
    state = parse_object(bytes(packed.tolist()), key)
    if missing := sorted({"quant_type", "blocksize", "dtype", "shape"} - state.keys()):
        raise bad(key, "quant_type, blocksize, dtype and shape", f"no {', '.join(missing)}")

    def is_size(value: Any) -> bool:
        return type(value) is int and value >= 1

    shape = state["shape"]
    sizes = isinstance(shape, list) and len(shape) in (2, 3) and all(map(is_size, shape))
    if not sizes or math.prod(shape) >= 2**60:
        raise bad(f"{key}: shape", "[N, K] or [E, N, K] of at least 1 and fewer than 2^60 elements", shape)
    if state["quant_type"] not in FORMATS:
        raise bad(f"{key}: quant_type", "nf4 or fp4", repr(state["quant_type"]))
    if state["dtype"] not in list(map(dtype_name, FLOAT_DTYPES)):
        raise bad(f"{key}: dtype", "float32, bfloat16 or float16", repr(state["dtype"]))
    if nested:
        if state.get("nested_blocksize") != NESTED_BLOCKSIZE:
            raise bad(f"{key}: nested_blocksize", f"{NESTED_BLOCKSIZE}", repr(state.get("nested_blocksize")))
        offset = state.get("nested_offset")
        # Compared and not converted: an integer of a thousand digits has no float.
        if type(offset) not in (int, float) or not -3.4e38 < offset < 3.4e38:
            raise bad(f"{key}: nested_offset", "a finite fp32 number", repr(offset))
    return state
