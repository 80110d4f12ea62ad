"""FP8 weights: E4M3 codes with scales of the tensor, of rows, or of rectangular blocks (DeepSeek-V3, `weight_dequant`).

    W[n, k] = fp32(weight[n, k]) * scale[n // 128, k // 128]

A scale covers rows too. Here each row has its own copy of it, so rows can be moved or cut out. Blocks at the edges of
the weight may be incomplete.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.blocks import ceil_div
from .._core.errors import bad, check_float_dtype
from .._core.layouts import LAYOUTS
from .._core.microscaling import check_scales, scale_table
from .._core.weight import QuantizedWeight, check_finite
from ._checks import tensor_of, weight_of
from ._groups import SCALE_DTYPES, blocksize_of, check_block_size, expanded_scales, per_block


def from_fp8(
    weight: Tensor,
    scale: Tensor,
    *,
    block_size: tuple[int, int] | None = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Make a weight from FP8 codes and their scales; it decodes to the same values.

    These are `weight` and `weight_scale_inv` of DeepSeek-V3's and transformers' files, whose scales are multiplied in
    spite of their name, and `weight` and `weight_scale` of others. The codes are shared, not copied.

    Args:
        weight: float8_e4m3fn [N, K] or [E, N, K].
        scale: fp32, bf16 or fp16, or powers of two in float8_e8m0fnu or their bytes in uint8. [ceil(N / rows),
            ceil(K / columns)] with a block size; without one, [N, 1], or one element. Experts have E in front of it.
        block_size: (rows, columns) that share a scale, `weight_block_size` of a config; None if it has none. Shapes do
            not tell it where blocks are incomplete.
        dtype: the `dtype` of the weight.

    Raises:
        TypeError, ValueError: a wrong dtype, such as E4M3FNUZ, or a wrong shape; a code is NaN; a scale is NaN or Inf;
            or K or the columns of a block are no multiple of 32.
    """
    check_float_dtype("dtype", dtype)
    weight = tensor_of("weight", weight, torch.float8_e4m3fn)
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        raise bad("weight", "[N, K] or [E, N, K], each at least 1", list(weight.shape))
    scale = tensor_of("scale", scale, *SCALE_DTYPES, torch.float8_e8m0fnu, torch.uint8, like=weight)
    block = None if block_size is None else check_block_size("block_size", block_size)
    scale, group = expanded_scales("scale", scale, tuple(weight.shape), block)
    return fp8_weight("weight", weight, "scale", scale, group, dtype)


def fp8_weight(
    name: str, weight: Tensor, scale_name: str, scale: Tensor, group: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Make a weight of codes [..., N, K] and scales [..., N, groups]. The names are those of errors."""
    K = weight.shape[-1]
    blocksize = blocksize_of(K, group, "fp8")
    fields: dict[str, Any] = {}
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = scale.contiguous().view(torch.uint8)
        check_scales(scale_name, scale, "mxfp4")
        device, blocks = weight.device, weight.numel() // blocksize
        fields = {
            "nested_absmax": torch.ones(ceil_div(blocks, LAYOUTS["fp8"].nested_blocksize), device=device),
            "nested_code": scale_table("mxfp4").to(device),
            "offset": torch.tensor(-0.0, device=device),
        }
    else:
        check_finite(scale_name, scale)
    return weight_of(
        name,
        dtype,
        codes=weight.contiguous().view(torch.uint8),
        absmax=per_block(scale, K, group, blocksize),
        shape=tuple(weight.shape),
        blocksize=blocksize,
        format="fp8",
        **fields,
    )
