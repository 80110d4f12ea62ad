"""Scales and zero points of groups of a row, as GPTQ, AWQ, compressed-tensors and FP8 have them.

Files share a scale among a group of any length, a whole row, or rows too. Here a block is a power of two of adjacent
elements of one row, so scales are repeated where a group is larger than the largest block that divides it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._core.blocks import ceil_div
from .._core.errors import bad, bad_type
from .._core.layouts import LAYOUTS, LEVELS
from .._core.weight import QuantizedWeight, check_finite
from ._checks import weight_of

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FORMATS = {4: "affine4", 8: "affine8"}
_MAX_BLOCKSIZE = 4096


def check_group_size(group_size: Any, K: int) -> int:
    """Check the elements of a row that share a scale, and return their number; -1 and None are the whole row."""
    if group_size is None:
        return K
    if type(group_size) is not int:
        raise bad_type("group_size", "an int", type(group_size).__name__)
    if group_size == -1:
        return K
    if group_size < 1:
        raise bad("group_size", "-1, or a number of elements", group_size)
    return min(group_size, K)


def blocksize_of(K: int, group: int, format: str) -> int:
    """The largest block that divides a group and a row, so that it straddles neither groups nor rows."""
    divisor = math.gcd(group, K)
    blocksize = min(divisor & -divisor, _MAX_BLOCKSIZE)
    smallest = LAYOUTS[format].min_blocksize
    if blocksize < smallest:
        raise bad("K and group_size", f"multiples of {smallest}, the smallest block of {format}", f"{K} and {group}")
    return blocksize


def check_block_size(name: str, block_size: Any) -> tuple[int, int]:
    """Check the rows and columns that share a scale."""
    if (
        not isinstance(block_size, (tuple, list))
        or len(block_size) != 2
        or not all(type(size) is int and size > 0 for size in block_size)
    ):
        raise bad_type(name, "the rows and columns of a block", repr(block_size))
    rows, columns = block_size
    return rows, columns


def expanded_scales(
    name: str, scale: Tensor, shape: tuple[int, ...], block_size: tuple[int, int] | None
) -> tuple[Tensor, int]:
    """Give each row its scales: those of blocks of `block_size`, or one of each row or of the tensor if it is None.

    Returns:
        [..., N, groups], and the number of columns in a group.
    """
    *leading, N, K = shape
    if block_size is None:
        if scale.numel() == 1:
            scale = scale.reshape(1)
        elif tuple(scale.shape) not in ((*leading, N, 1), (*leading, 1, 1)):
            raise bad(name, f"one scale, or {[*leading, N, 1]}", list(scale.shape))
        return scale.expand(*leading, N, 1), K
    rows, columns = block_size
    expected = (*leading, ceil_div(N, rows), ceil_div(K, columns))
    if tuple(scale.shape) != expected:
        raise bad(name, f"{list(expected)}, one for each block of {rows} x {columns}", list(scale.shape))
    of_row = torch.arange(N, device=scale.device) // min(rows, N)
    return scale[..., of_row, :], min(columns, K)


def per_block(values: Tensor, K: int, group: int, blocksize: int) -> Tensor:
    """Values of the groups of each row [..., groups] -> those of all blocks, flat."""
    group_of_block = torch.arange(0, K, blocksize, device=values.device) // group
    if len(group_of_block) > values.shape[-1]:
        values = values[..., group_of_block]
    return values.contiguous().view(-1)


def sorted_columns(name: str, g_idx: Tensor, K: int, group: int) -> Tensor | None:
    """The order of columns in which groups are contiguous, int32 [K], or None if they are so already.

    Args:
        name: what an error calls `g_idx`.
        g_idx: [K], integers: the group of each column.
        K, group: the length of a row, and of all groups but the last.
    """
    if tuple(g_idx.shape) != (K,):
        raise bad(name, f"[{K}], a group for each column", list(g_idx.shape))
    groups = ceil_div(K, group)
    low, high = g_idx.min().item(), g_idx.max().item()
    if low < 0 or high >= groups:
        raise bad(name, f"groups 0 ... {groups - 1}", f"{low} ... {high}")
    expected = torch.arange(K, device=g_idx.device) // group
    g_idx = g_idx.long()
    if torch.equal(g_idx, expected):
        return None
    in_order, order = g_idx.sort(stable=True)
    if not torch.equal(in_order, expected):
        raise bad(name, f"{group} columns in each group", f"{g_idx.bincount(minlength=groups).tolist()[:8]}, ...")
    return order.int()


def _in_16_bits(name: str, scales: Tensor) -> Tensor:
    """Scales beside zero points, with which level * scale has to be exact in fp32."""
    if scales.dtype != torch.float32:
        return scales
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    raise bad(name, "numbers of bfloat16 or of float16 beside zero points", "numbers of float32 with more digits")


def affine_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    name: str,
    bits: int,
    shape: tuple[int, ...],
    group: int,
    dtype: torch.dtype,
    column_order: Tensor | None = None,
) -> QuantizedWeight:
    """Make a weight whose values are (level - zero) * scale.

    Args:
        codes: as `codes_of_words` returns them.
        scales: [..., N, groups], fp16, bf16 or fp32.
        zeros: int8 in the shape of `scales`: the zero points of signed levels; None if all are 0.
        name: what an error calls the scales.
        bits: 4 or 8.
        shape: (N, K) or (E, N, K).
        group: the elements of a row that share a scale.
        dtype: the `dtype` of the weight.
        column_order: as in `QuantizedWeight`.
    """
    check_finite(name, scales)
    format, K = _FORMATS[bits], shape[-1]
    blocksize = blocksize_of(K, group, format)
    fields: dict[str, Any] = {}
    if bits == 4:
        fields["code"] = LEVELS[format].to(codes.device, copy=True)
    if zeros is not None and zeros.any():
        scales = _in_16_bits(name, scales)
        fields["zero_point"] = per_block(zeros, K, group, blocksize)
    return weight_of(
        name,
        dtype,
        codes=codes,
        absmax=per_block(scales, K, group, blocksize),
        shape=shape,
        blocksize=blocksize,
        format=format,
        column_order=column_order,
        **fields,
    )
