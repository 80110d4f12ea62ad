"""Layers of GPTQ files, and of auto-round's that are packed alike (GPTQModel, `BaseQuantLinear` and `pack_block`).

    W[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])

The weight is stored transposed: qweight packs codes along K into words of 32 bits, and qzeros packs zero points along
N, both with the first in the lowest bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.blocks import ceil_div
from .._core.errors import bad, bad_type, check_float_dtype
from .._core.weight import QuantizedWeight
from ._checks import check_number, check_shape, tensor_of
from ._codes import codes_of_words, unpacked
from ._groups import SCALE_DTYPES, affine_weight, blocksize_of, check_group_size, sorted_columns

# {checkpoint_format, or auto-round's packing_format: what a stored zero point is short of}
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0, "auto_round:auto_gptq": 1, "auto_round": 0}


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    checkpoint_format: str = "gptq",
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Make a weight from the tensors of a linear layer in a GPTQ file; it decodes to the same values.

    A value is scale * (code - zero point) in fp32, where it is exact, and rounded once to the dtype that is asked for.
    GPTQModel rounds it to fp16 first, so its weight is `dequantize(torch.float16)`.

    Args:
        qweight: int32 [K * bits/32, N].
        qzeros: int32 [groups, N * bits/32]. "gptq" stores zero points less 1, "gptq_v2" stores them as they are. Some
            files have the wrong name, so with `sym` zero points that are all 7 or all 8 (127 or 128) are 8 (128).
        scales: fp16, bf16 or fp32 [groups, N].
        g_idx: int32 [K], the group of each column of W, if the file has it. Columns that are not in the order of their
            groups (desc_act) are sorted, and the weight has a `column_order`.
        bits: 4 or 8.
        group_size: columns of a group; -1 is all.
        sym: whether all zero points are the middle of the codes.
        checkpoint_format: "gptq" or "gptq_v2"; or the packing_format of auto-round, "auto_round:auto_gptq" or
            "auto_round".
        dtype: the `dtype` of the weight.

    Raises:
        TypeError, ValueError: a wrong dtype or shape; 2 or 3 bits; K or the group size is no multiple of 16; a scale is
            NaN or Inf, or has more than 16 bits beside zero points; g_idx is out of range, or its groups differ in
            size; or a zero point less 1 is stored as 15 (255), which libraries read as 0 or as 16.
    """
    check_float_dtype("dtype", dtype)
    check_number("bits", bits, 4, 8)
    if type(sym) is not bool:
        raise bad_type("sym", "a bool", type(sym).__name__)
    if not isinstance(checkpoint_format, str) or checkpoint_format not in _ZERO_OFFSETS:
        raise bad("checkpoint_format", "one of " + ", ".join(_ZERO_OFFSETS), repr(checkpoint_format))
    qweight = tensor_of("qweight", qweight, torch.int32)
    qzeros = tensor_of("qzeros", qzeros, torch.int32, like=qweight)
    scales = tensor_of("scales", scales, *SCALE_DTYPES, like=qweight)
    per_word = 32 // bits
    if qweight.dim() != 2 or qweight.numel() == 0:
        raise bad("qweight", f"[K/{per_word}, N]", list(qweight.shape))
    K, N = per_word * qweight.shape[0], qweight.shape[1]
    group = check_group_size(group_size, K)
    blocksize_of(K, group, f"affine{bits}")
    groups = ceil_div(K, group)
    check_shape("scales", scales, (groups, N))
    check_shape("qzeros", qzeros, (groups, ceil_div(N, per_word)))
    column_order = None
    if g_idx is not None:
        column_order = sorted_columns(
            "g_idx", tensor_of("g_idx", g_idx, torch.int32, torch.int64, like=qweight), K, group
        )
    return affine_weight(
        codes_of_words(qweight.t(), bits, K, column_order),
        scales.t(),
        _zeros(unpacked(qzeros, bits, N), bits, sym, _ZERO_OFFSETS[checkpoint_format], checkpoint_format),
        name="scales",
        bits=bits,
        shape=(N, K),
        group=group,
        dtype=dtype,
        column_order=column_order,
    )


def _zeros(stored: Tensor, bits: int, sym: bool, offset: int, checkpoint_format: Any) -> Tensor | None:
    """Stored zero points [groups, N] -> those of signed levels, int8 [N, groups]; None if they are all 0."""
    middle = 1 << bits - 1
    low, high = stored.min().item(), stored.max().item()
    if sym and low == high and low in (middle - 1, middle):
        return None
    if high + offset > 2 * middle - 1:
        expected = f"zero points less 1 below {high} in {checkpoint_format}: libraries read it as 0 or as {high + 1}"
        raise bad("qzeros", expected, f"{high} in {int((stored == high).sum())} places")
    return (stored.t() - (middle - offset)).view(torch.int8)
