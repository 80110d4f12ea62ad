"""Layers of AWQ files in the version "gemm" (AutoAWQ, `WQLinear_GEMM` and `dequantize_gemm`).

    W[n, k] = scales[k // group_size, n] * (q[k, n] - z[k // group_size, n])

The weight is stored transposed. A word of 32 bits holds the codes of eight adjacent rows of W for one k, and those of
zero points likewise, in an order that suits the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.errors import bad, check_float_dtype
from .._core.weight import QuantizedWeight
from ._checks import check_number, check_shape, tensor_of
from ._codes import pairs, pieces, unpacked
from ._groups import SCALE_DTYPES, affine_weight, blocksize_of, check_group_size

_PER_WORD = 8
# Element i of eight has the bits 4j ... 4j + 3 of its word, with j = _PLACES[i].
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def from_awq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    version: str = "gemm",
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Make a weight from the tensors of a linear layer in an AWQ file; it decodes to the same values.

    A value is scale * (code - zero point) in fp32, where it is exact, and rounded once to the dtype that is asked for.
    AutoAWQ rounds it to fp16 first, so its weight is `dequantize(torch.float16)`.

    Args:
        qweight: int32 [K, N/8].
        qzeros: int32 [K/group_size, N/8].
        scales: fp16, bf16 or fp32 [K/group_size, N].
        bits: 4.
        group_size: columns of W that share a scale; -1 is all.
        version: "gemm". Versions "gemv", "gemv_fast" and "marlin" have other layouts, and "gemv_fast" other values.
        dtype: the `dtype` of the weight.

    Raises:
        TypeError, ValueError: a wrong dtype or shape; another version or number of bits; K or the group size is no
            multiple of 16; or a scale is NaN or Inf, or has more than 16 bits beside zero points.
    """
    check_float_dtype("dtype", dtype)
    check_number("bits", bits, 4)
    if not isinstance(version, str) or version.lower() != "gemm":
        raise bad("version", "gemm", repr(version))
    qweight = tensor_of("qweight", qweight, torch.int32)
    qzeros = tensor_of("qzeros", qzeros, torch.int32, like=qweight)
    scales = tensor_of("scales", scales, *SCALE_DTYPES, like=qweight)
    if qweight.dim() != 2 or qweight.numel() == 0:
        raise bad("qweight", "[K, N/8]", list(qweight.shape))
    K, N = qweight.shape[0], _PER_WORD * qweight.shape[1]
    group = check_group_size(group_size, K)
    blocksize_of(K, group, "affine4")
    if K % group:
        raise bad("group_size", f"a divisor of K, {K}", group)
    check_shape("scales", scales, (K // group, N))
    check_shape("qzeros", qzeros, (K // group, N // _PER_WORD))
    codes = torch.empty((N, K // 2), dtype=torch.uint8, device=qweight.device)
    for words in pieces(qweight.shape[1], _PER_WORD * K):
        rows = slice(_PER_WORD * words.start, _PER_WORD * words.stop)
        codes[rows] = pairs(_in_order(qweight[:, words]).t())
    zeros = (_in_order(qzeros).t() - 8).view(torch.int8)
    return affine_weight(codes, scales.t(), zeros, name="scales", bits=4, shape=(N, K), group=group, dtype=dtype)


def _in_order(words: Tensor) -> Tensor:
    """int32 [rows, columns / 8] -> unsigned codes, uint8 [rows, columns]."""
    columns = _PER_WORD * words.shape[1]
    codes = unpacked(words, 4, columns).view(len(words), -1, _PER_WORD)
    return codes[..., list(_PLACES)].view(len(words), columns)
