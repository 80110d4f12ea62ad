"""A weight in bitsandbytes' files: its tensors, and the quant_state beside its codes, which is a JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .blocks import NESTED_BLOCKSIZE, ceil_div
from .errors import FLOAT_DTYPES, bad, bad_type, check_memory, dtype_name
from .formats import CODEBOOKS, codes_shape
from .json import parse_object

FILE_FORMATS = ("nf4", "fp4")  # those that bitsandbytes has in files
QUANT_STATE = ".quant_state.bitsandbytes__"  # the format follows
# What follows the name of a weight in the names of the tensors that belong to its codes.
STATE_SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *(QUANT_STATE + format for format in FILE_FORMATS),
)


def bitsandbytes_entries(fields: Mapping[str, Any], transposed: bool) -> dict[str, Tensor]:
    """Make the entries of `QuantizedWeight.to_bitsandbytes` from its fields, by what follows the weight's name."""
    format = fields["format"]
    if format not in FILE_FORMATS:
        raise bad("format", "nf4 or fp4, the formats of bitsandbytes", format)
    for name, value in fields.items():
        check_memory(name, value)
    if not torch.equal(fields["code"].cpu(), CODEBOOKS[format]):
        raise bad("code", f"the codebook of {format}", "another, which bitsandbytes would not use")
    state: dict[str, Any] = {
        "quant_type": format,
        "blocksize": fields["blocksize"],
        "dtype": dtype_name(fields["dtype"]),
        "shape": list(fields["shape"]),
    }
    if transposed:
        state["transposed"] = True
    entries = {"": fields["codes"].reshape(-1, 1), ".absmax": fields["absmax"], ".quant_map": fields["code"].clone()}
    if fields["nested_absmax"] is not None:
        entries[".nested_absmax"] = fields["nested_absmax"]
        entries[".nested_quant_map"] = fields["nested_code"].clone()
        state["nested_blocksize"] = NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = fields["offset"].item()
    entries[QUANT_STATE + format] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return entries


def bitsandbytes_fields(state_dict: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Make the fields of a QuantizedWeight from the entries that bitsandbytes has written for the weight `name`."""

    def entry(suffix: str) -> Tensor:
        if name + suffix not in state_dict:
            raise bad("state_dict", f"the key {name + suffix!r}", "none")
        tensor = state_dict[name + suffix]
        if not isinstance(tensor, Tensor):
            raise bad_type(name + suffix, "a tensor", type(tensor).__name__)
        check_memory(name + suffix, tensor)
        return tensor

    begin = name + QUANT_STATE
    packed = [key for key in state_dict if isinstance(key, str) and key.startswith(begin)]
    if len(packed) != 1:
        raise bad("state_dict", f"one key {begin + 'nf4'!r} or __fp4", f"{len(packed)}")
    nested = f"{name}.nested_absmax" in state_dict
    state = read_quant_state(packed[0], entry(packed[0].removeprefix(name)), nested)
    shape = state["shape"]
    codes = _bytes_of(name, entry(""), ceil_div(math.prod(shape), 2))
    return {
        "codes": codes.view(codes_shape(*shape, bits=4)),
        "absmax": entry(".absmax"),
        "nested_absmax": entry(".nested_absmax") if nested else None,
        "nested_code": entry(".nested_quant_map") if nested else None,
        "offset": torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device) if nested else None,
        "code": entry(".quant_map"),
        "shape": tuple(shape),
        "blocksize": state["blocksize"],
        "format": state["quant_type"],
        "dtype": getattr(torch, state["dtype"]),
    }


def _bytes_of(name: str, codes: Tensor, count: int) -> Tensor:
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
    if state["quant_type"] not in FILE_FORMATS:
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
