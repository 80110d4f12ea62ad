"""Layers of compressed-tensors' files (vllm-project/compressed-tensors, `compressors/` and `_dequantize`).

    W[n, k] = (q[n, k] - zero point) * scale

"pack-quantized" packs integers of 4 and 8 bits along K into words of 32 bits, each plus 8 or 128, with the first in the
lowest bits. "int-quantized" and "float-quantized" store int8 and E4M3 as they are; "naive-quantized" stores either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._core.blocks import ceil_div
from .._core.errors import bad, bad_type, check_float_dtype
from .._core.weight import QuantizedWeight
from ._checks import tensor_of
from ._codes import codes_of_words, unpacked
from ._groups import SCALE_DTYPES, affine_weight, blocksize_of, check_block_size, expanded_scales, sorted_columns
from .fp8 import fp8_weight

_TYPES = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
_STRATEGIES = ("tensor", "channel", "group", "block")


def from_compressed_tensors(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    format: str,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Make a weight from the tensors of a linear layer in a file of compressed-tensors; it decodes to the same values.

    A value is computed in fp32, and rounded once to the dtype that is asked for. The package rounds it to the dtype of
    the scales, so its `decompress` returns `dequantize(scale.dtype)`. What the config says of activations is not read:
    a server that rounds them computes other products.

    Args:
        tensors: by the part of their names behind the layer's: "weight_packed" int32 [N, ceil(K * num_bits / 32)] with
            "weight_shape" [2], or "weight" int8 or float8_e4m3fn [N, K]. "weight_scale" in fp16, bf16 or fp32, by the
            strategy [N, K / group_size], [N, 1], one element, or one for each block. "weight_zero_point", if the weight
            is not symmetric: in the shape of the scale, or packed along N in int32. "weight_g_idx" int32 [K], if
            columns are not in the order of their groups. Others are ignored.
        weights: `weights` of the layer's group in `config_groups`: its keys num_bits, type, symmetric, strategy,
            group_size and block_structure.
        format: "pack-quantized", "int-quantized", "float-quantized" or "naive-quantized".
        dtype: the `dtype` of the weight.

    Raises:
        TypeError, ValueError: a tensor is missing, or has a wrong dtype or shape; the format, strategy or number of
            bits is another; a scale is NaN or Inf, or has more than 16 bits beside zero points; a code of E4M3 is NaN;
            a zero point is out of range; or K or the group size is no multiple of 16 (32 for E4M3).
    """
    check_float_dtype("dtype", dtype)
    for name, mapping in (("tensors", tensors), ("weights", weights)):
        if not isinstance(mapping, Mapping):
            raise bad_type(name, "a mapping", type(mapping).__name__)
    if not isinstance(format, str) or format not in _TYPES:
        raise bad("format", "one of " + ", ".join(_TYPES), repr(format))
    scheme = _Scheme(weights, format)
    if scheme.type == "float":
        return _float_weight(tensors, scheme, dtype)
    return _int_weight(tensors, scheme, format, dtype)


class _Scheme:
    """The checked fields of `weights`."""

    def __init__(self, weights: Mapping[str, Any], format: str) -> None:
        self.type = weights.get("type", "int")
        if self.type not in _TYPES[format]:
            raise bad("type", f"{' or '.join(_TYPES[format])} in {format}", repr(self.type))
        self.bits = weights.get("num_bits", 8)
        allowed = (4, 8) if format == "pack-quantized" else (8,) if self.type == "float" else range(1, 9)
        if type(self.bits) is not int or self.bits not in allowed:
            raise bad("num_bits", f"{' or '.join(map(str, allowed))} in {format}", repr(self.bits))
        self.symmetric = weights.get("symmetric", True)
        group_size = weights.get("group_size")
        self.strategy = weights.get("strategy")
        if self.strategy is None:  # as QuantizationArgs infers it
            self.strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
        if self.strategy not in _STRATEGIES:
            raise bad("strategy", " or ".join(_STRATEGIES), repr(self.strategy))
        self.block: tuple[int, int] | None = None
        if self.strategy == "group":
            if type(group_size) is not int or group_size < 1:
                raise bad("group_size", "a number of elements", repr(group_size))
            self.block = (1, group_size)
        if self.strategy == "block":
            self.block = check_block_size("block_structure", weights.get("block_structure"))

    def scales(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, int]:
        """The scales [N, groups], and the columns of a group."""
        scale = _tensor(tensors, "weight_scale", *SCALE_DTYPES, like=like)
        if self.strategy == "group" and self.block is not None and shape[-1] % self.block[1]:
            raise bad("group_size", f"a divisor of K, {shape[-1]}", self.block[1])
        return expanded_scales("weight_scale", scale, shape, self.block)


def _tensor(tensors: Mapping[str, Tensor], name: str, *dtypes: torch.dtype, like: Tensor | None = None) -> Tensor:
    if name not in tensors:
        raise bad("tensors", f"the key {name!r}", "none")
    return tensor_of(name, tensors[name], *dtypes, like=like)


def _float_weight(tensors: Mapping[str, Tensor], scheme: _Scheme, dtype: torch.dtype) -> QuantizedWeight:
    if scheme.symmetric is not True:
        raise bad("symmetric", "true for numbers of E4M3", repr(scheme.symmetric))
    weight = _tensor(tensors, "weight", torch.float8_e4m3fn)
    if "weight_zero_point" in tensors:  # older versions of the package store zeros
        zeros = _tensor(tensors, "weight_zero_point", torch.float8_e4m3fn, torch.int8, *SCALE_DTYPES, like=weight)
        if zeros.float().any():
            raise bad("weight_zero_point", "zeros in a weight of E4M3", "others")
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        raise bad("weight", "[N, K] or [E, N, K], each at least 1", list(weight.shape))
    scale, group = scheme.scales(tensors, tuple(weight.shape), weight)
    return fp8_weight("weight", weight, "weight_scale", scale, group, dtype)


def _int_weight(tensors: Mapping[str, Tensor], scheme: _Scheme, format: str, dtype: torch.dtype) -> QuantizedWeight:
    if format == "pack-quantized":
        bits = scheme.bits
        stored = _tensor(tensors, "weight_packed", torch.int32)
        N, K = _stored_shape(tensors)
        if tuple(stored.shape) != (N, ceil_div(K * bits, 32)):
            raise bad("weight_packed", f"{[N, ceil_div(K * bits, 32)]} for weight_shape {[N, K]}", list(stored.shape))
    else:
        bits = 8
        stored = _tensor(tensors, "weight", torch.int8)
        if stored.dim() != 2 or stored.numel() == 0:
            raise bad("weight", "[N, K], each at least 1", list(stored.shape))
        N, K = stored.shape
    scale, group = scheme.scales(tensors, (N, K), stored)
    blocksize_of(K, group, f"affine{bits}")
    column_order = None
    if "weight_g_idx" in tensors:
        g_idx = _tensor(tensors, "weight_g_idx", torch.int32, torch.int64, like=stored)
        if not g_idx.numel() or g_idx.max() >= 0:  # -1 everywhere: the calibration did not set it
            column_order = sorted_columns("weight_g_idx", g_idx, K, group)
    if format == "pack-quantized":
        codes = codes_of_words(stored, bits, K, column_order)
    else:
        codes = (stored if column_order is None else stored[:, column_order]).contiguous().view(torch.uint8)
    return affine_weight(
        codes,
        scale,
        _zero_points(tensors, scheme, bits, (N, K), stored),
        name="weight_scale",
        bits=bits,
        shape=(N, K),
        group=group,
        dtype=dtype,
        column_order=column_order,
    )


def _stored_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    stored = _tensor(tensors, "weight_shape", torch.int64, torch.int32)
    if stored.numel() != 2 or not (stored > 0).all():
        raise bad("weight_shape", "N and K, each at least 1", stored.tolist())
    N, K = stored.reshape(2).tolist()
    return N, K


def _zero_points(
    tensors: Mapping[str, Tensor], scheme: _Scheme, bits: int, shape: tuple[int, ...], like: Tensor
) -> Tensor | None:
    """The zero points of signed levels, int8 [N, groups], or None if there are none."""
    if "weight_zero_point" not in tensors:
        if scheme.symmetric is not True:
            raise bad("tensors", "the key 'weight_zero_point' of a weight that is not symmetric", "none")
        return None
    zeros = _tensor(tensors, "weight_zero_point", torch.int8, torch.int32, like=like)
    N, middle = shape[0], 1 << bits - 1
    scale_shape = tuple(tensors["weight_scale"].shape)
    packs = zeros.dtype == torch.int32 and zeros.dim() == 2 and scheme.strategy in ("group", "channel")
    if packs and tuple(zeros.shape) == (ceil_div(N * bits, 32), *scale_shape[1:]):
        return (unpacked(zeros.t(), bits, N).t() - middle).view(torch.int8)
    if tuple(zeros.shape) != scale_shape:
        raise bad("weight_zero_point", f"{list(scale_shape)}, or packed along N", list(zeros.shape))
    low, high = zeros.min().item(), zeros.max().item()
    if low < -middle or high >= middle:
        raise bad("weight_zero_point", f"{-middle} ... {middle - 1}", f"{low} ... {high}")
    return expanded_scales("weight_zero_point", zeros.to(torch.int8), shape, scheme.block)[0]
