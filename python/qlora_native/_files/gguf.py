"""Tensors of GGUF files, whose blocks ggml-common.h of llama.cpp defines and `gguf.quants.dequantize` decodes.

A block has its scales before or after its codes, which are in an order that suits llama.cpp's kernels. Here codes are
moved into the order of elements, and scales of 6 bits become bytes. No value is computed, so none changes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core.errors import bad, bad_type, check_float_dtype, is_finite_number
from .._core.formats import levels_of
from .._core.layouts import LAYOUTS, SCALE_LEVELS
from .._core.microscaling import MICROSCALED, microscaled_fields
from .._core.weight import QuantizedWeight
from ._checks import check_size, tensor_of, weight_of
from ._codes import pairs, pieces

# In all functions below, `blocks` is uint8 [n, bytes of a block], and results are [n, ...].


def _float16(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _shifted(data: Tensor, *shifts: int) -> Tensor:
    """[n, groups, bytes] -> [n, groups, shifts, bytes], shifted right."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=data.device)
    return data[:, :, None] >> by[:, None]


def _nibbles(data: Tensor, group: int) -> Tensor:
    """[n, bytes] -> [n, 2 * bytes]. The low halves of `group` bytes are elements; the high ones follow them."""
    return (_shifted(data.reshape(len(data), -1, group), 0, 4) & 15).reshape(len(data), -1)


def _repacked(data: Tensor, group: int) -> Tensor:
    """`pairs(_nibbles(data, group))`, computed on bytes that stay packed."""
    data = data.reshape(len(data), -1, group)
    even, odd = data[..., 0::2], data[..., 1::2]
    return torch.cat((even << 4 | odd & 15, even & 0xF0 | odd >> 4), dim=2).reshape(len(data), -1)


def _bits(data: Tensor, group: int) -> Tensor:
    """The bits of a mask [n, bytes] -> [n, 8 * bytes]. In each group of bytes the lowest bits come first."""
    return (_shifted(data.reshape(len(data), -1, group), *range(8)) & 1).reshape(len(data), -1)


def _q4_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"absmax": _float16(blocks, 0), "codes": _repacked(blocks[:, 2:], 16)}


def _q4_1(blocks: Tensor) -> dict[str, Tensor]:
    return {"absmax": _float16(blocks, 0), "minimum": _float16(blocks, 2), "codes": _repacked(blocks[:, 4:], 16)}


def _q5_0(blocks: Tensor) -> dict[str, Tensor]:
    q = _nibbles(blocks[:, 6:], 16) | _bits(blocks[:, 2:6], 1) << 4
    return {"absmax": _float16(blocks, 0), "codes": q - 16}


def _q5_1(blocks: Tensor) -> dict[str, Tensor]:
    q = _nibbles(blocks[:, 8:], 16) | _bits(blocks[:, 4:8], 1) << 4
    return {"absmax": _float16(blocks, 0), "minimum": _float16(blocks, 2), "codes": q}


def _q8_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"absmax": _float16(blocks, 0), "codes": blocks[:, 2:]}


def _q2_k(blocks: Tensor) -> dict[str, Tensor]:
    scales = blocks[:, :16]
    q = _shifted(blocks[:, 16:80].reshape(len(blocks), 2, 32), 0, 2, 4, 6) & 3
    return {
        "absmax": scales & 15,
        "minimum": scales >> 4,
        "nested_absmax": _float16(blocks, 80).float(),
        "nested_minimum": -_float16(blocks, 82).float(),
        "codes": pairs(q.reshape(len(blocks), 256)),
    }


def _q3_k(blocks: Tensor) -> dict[str, Tensor]:
    low = _shifted(blocks[:, None, 96:104], 0, 4).reshape(len(blocks), 16) & 15
    high = _shifted(blocks[:, None, 104:108], 0, 2, 4, 6).reshape(len(blocks), 16) & 3
    q = _shifted(blocks[:, 32:96].reshape(len(blocks), 2, 32), 0, 2, 4, 6).reshape(len(blocks), 256) & 3
    return {
        "absmax": low | high << 4,
        "nested_absmax": _float16(blocks, 108).float(),
        "codes": pairs(q | _bits(blocks[:, :32], 32) << 2),
    }


def _scales_of_k_quants(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack eight scales and eight minima of 6 bits from 12 bytes, as `get_scale_min_k4` of llama.cpp does."""
    scale, minimum, high = blocks[:, 4:16].reshape(len(blocks), 3, 4).unbind(1)
    return {
        "absmax": torch.cat((scale & 63, high & 15 | scale >> 2 & 0x30), dim=1),
        "minimum": torch.cat((minimum & 63, high >> 4 | minimum >> 2 & 0x30), dim=1),
        "nested_absmax": _float16(blocks, 0).float(),
        "nested_minimum": -_float16(blocks, 2).float(),
    }


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    return {**_scales_of_k_quants(blocks), "codes": _repacked(blocks[:, 16:], 32)}


def _q5_k(blocks: Tensor) -> dict[str, Tensor]:
    q = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32) << 4
    return {**_scales_of_k_quants(blocks), "codes": q}


def _q6_k(blocks: Tensor) -> dict[str, Tensor]:
    high = _shifted(blocks[:, 128:192].reshape(len(blocks), 2, 32), 0, 2, 4, 6).reshape(len(blocks), 256) & 3
    return {
        "absmax": blocks[:, 192:208] ^ 0x80,  # from -128 on
        "nested_absmax": _float16(blocks, 208).float(),
        "codes": (_nibbles(blocks[:, :128], 64) | high << 4) - 32,
    }


def _iq4_xs(blocks: Tensor) -> dict[str, Tensor]:
    high = _shifted(blocks[:, 2:4, None], 0, 2, 4, 6).reshape(len(blocks), 8) & 3
    return {
        "absmax": _nibbles(blocks[:, 4:8], 1) | high << 4,
        "nested_absmax": _float16(blocks, 0).float(),
        "codes": _repacked(blocks[:, 8:], 16),
    }


def _mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    return {"absmax": blocks[:, :1], "codes": _repacked(blocks[:, 1:], 16)}


def _nvfp4(blocks: Tensor) -> dict[str, Tensor]:
    scales = blocks[:, :4]
    return {"absmax": torch.where(scales == 0x7F, 0, scales), "codes": _repacked(blocks[:, 4:], 8)}  # NaN means 0


@dataclass(frozen=True)
class GGUFType:
    """How a type of GGUF stores `elements` adjacent elements of a row in `bytes` bytes."""

    elements: int
    bytes: int
    read: Callable[[Tensor], dict[str, Tensor]]


# {the name of a type: its blocks}. The name in lower case is that of the format here.
GGUF_TYPES = {
    "Q4_0": GGUFType(32, 18, _q4_0),
    "Q4_1": GGUFType(32, 20, _q4_1),
    "Q5_0": GGUFType(32, 22, _q5_0),
    "Q5_1": GGUFType(32, 24, _q5_1),
    "Q8_0": GGUFType(32, 34, _q8_0),
    "Q2_K": GGUFType(256, 84, _q2_k),
    "Q3_K": GGUFType(256, 110, _q3_k),
    "Q4_K": GGUFType(256, 144, _q4_k),
    "Q5_K": GGUFType(256, 176, _q5_k),
    "Q6_K": GGUFType(256, 210, _q6_k),
    "IQ4_NL": GGUFType(32, 18, _q4_0),
    "IQ4_XS": GGUFType(256, 136, _iq4_xs),
    "MXFP4": GGUFType(32, 17, _mxfp4),
    "NVFP4": GGUFType(64, 36, _nvfp4),
}


def gguf_rows(data: Tensor | Any, type: Any, shape: tuple[int, ...]) -> Tensor:
    """View the bytes of a GGUF tensor as rows, which may be reordered before `from_gguf` reads them.

    A block never straddles rows, so the rows of q_proj and k_proj, which llama.cpp's converter reorders in some
    architectures, move back as bytes, and values do not change.

    Args:
        data, type, shape: as in `from_gguf`.

    Returns:
        uint8 [N, bytes of a row], or [E * N, bytes of a row]. It shares the memory of `data` where that is contiguous.

    Raises:
        TypeError, ValueError: as in `from_gguf`.
    """
    name, kind = _known(type)
    shape = check_size("shape", shape)
    if not isinstance(data, Tensor) and hasattr(data, "__array_interface__"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the array of a mapped file cannot be written
            try:
                data = torch.as_tensor(data)
            except (TypeError, ValueError) as error:
                raise bad_type("data", "an array of bytes", f"another: {error}") from None
    data = tensor_of("data", data, torch.uint8)
    *leading, K = shape
    if K % kind.elements:
        raise bad("shape", f"K that is a multiple of {kind.elements}, the elements of a block of {name}", K)
    row = K // kind.elements * kind.bytes
    rows = math.prod(leading)
    if data.numel() != rows * row:
        raise bad("data", f"{rows * row} bytes, which {name} has for {list(shape)}", f"{data.numel()}")
    return data.reshape(rows, row)


def _known(type: Any) -> tuple[str, GGUFType]:
    name = getattr(type, "name", type)
    if not isinstance(name, str) or name.upper() not in GGUF_TYPES:
        raise bad("type", "one of " + ", ".join(GGUF_TYPES), name if isinstance(name, str) else repr(type))
    return name.upper(), GGUF_TYPES[name.upper()]


def from_gguf(
    data: Tensor | Any,
    type: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    scale: float = 1.0,
) -> QuantizedWeight:
    """Make a weight from the bytes of a tensor of a GGUF file; it decodes to the same values.

    `dequantize(torch.float32)` returns the bits of `gguf.quants.dequantize`. Codes of 4 bits stay 4 bits; those of 5
    and 6 bits become bytes, and those of 2 and 3 bits become 4 bits. Rows are read piece by piece, so beside `data` and
    the weight there are a few MB.

    Args:
        data: uint8, [N, bytes of a row] or any other shape with as many bytes in that order: a tensor, or an array of
            NumPy such as `gguf.GGUFReader(path).tensors[i].data`.
        type: a `gguf.GGMLQuantizationType`, or its name: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
            IQ4_NL, IQ4_XS, MXFP4 or NVFP4.
        shape: (N, K), or (E, N, K) for a stack of experts. GGUF lists dimensions in the reversed order.
        dtype: the `dtype` of the weight.
        scale: of the whole tensor, for NVFP4 alone: the value of the file's tensor `*.scale`.

    Raises:
        TypeError, ValueError: a wrong dtype; a type that is not among these; K is no multiple of the elements of a
            block; the number of bytes is another; or a scale is NaN or Inf.
    """
    name, kind = _known(type)
    check_float_dtype("dtype", dtype)
    rows = gguf_rows(data, type, shape)
    if not is_finite_number(scale) or scale <= 0:
        raise bad("scale", "a finite number above 0", scale)
    if scale != 1 and name != "NVFP4":
        raise bad("scale", "1.0 for all types but NVFP4", scale)
    format, shape = name.lower(), tuple(shape)
    fields: dict[str, Any] = _read(rows, kind, shape[-1])
    if format in MICROSCALED:
        values = MICROSCALED[format] * torch.tensor(scale, dtype=torch.float32)
        if not values.isfinite().all():
            raise bad("scale", "one by which every scale of a block is finite in fp32", scale)
        fields = microscaled_fields(format, fields["codes"], fields["absmax"], shape, "data", values)
    else:
        fields["codes"] = fields["codes"].view(*shape[:-1], -1)
        fields |= {"shape": shape, "blocksize": LAYOUTS[format].blocksize, "format": format}
    if (levels := levels_of(format)) is not None:
        fields["code"] = levels.to(rows.device) + 0.0  # llama.cpp's tables are of integers, which have no -0
    if format in SCALE_LEVELS:
        fields["nested_code"] = SCALE_LEVELS[format].to(rows.device, copy=True)
        fields["offset"] = torch.tensor(-0.0, device=rows.device)  # its sum with -0 is -0
    return weight_of("data", dtype, **fields)


def _read(rows: Tensor, kind: GGUFType, K: int) -> dict[str, Tensor]:
    """The fields that a type has, each flat, from rows of bytes."""
    fields: dict[str, Tensor] = {}
    at = 0
    for piece in pieces(len(rows), K):
        blocks = rows[piece].reshape(-1, kind.bytes)
        for name, part in kind.read(blocks).items():
            if name not in fields:
                fields[name] = part.new_empty((len(rows) * (K // kind.elements), part.shape[1]))
            fields[name][at : at + len(blocks)] = part
        at += len(blocks)
    return {name: field.view(-1) for name, field in fields.items()}
