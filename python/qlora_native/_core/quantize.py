"""Quantize a weight, and decode it or rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import NESTED_BLOCKSIZE, ceil_div, chosen_blocksize
from .errors import bad, bad_type, check_float_dtype, check_local, checks_memory
from .formats import CODEBOOKS, DYNAMIC_MAP, check_format, codes_shape
from .microscaling import MICROSCALED
from .weight import QuantizedWeight, check_quantized, in_order, op_arguments


@checks_memory
def quantize(
    weight: Tensor,
    format: str = "nf4",
    blocksize: int | None = None,
    double_quant: bool = True,
    codebook: Tensor | Sequence[float] | None = None,
) -> QuantizedWeight:
    """Quantize a weight in blocks, each element to the nearest level of its block's scale.

    Args:
        weight: [N, K] in fp32, bf16 or fp16, any strides; or [E, N, K], the weights of a layer's experts, which are
            copied if they are not contiguous.
        format: "nf4" (QLoRA, appendix E), "fp4" (bitsandbytes' e2m1), "int4" (16 linear levels), "int8" (255 linear
            levels), "mxfp4" (OCP Microscaling Formats v1.0, sections 5.3 and 6.3: blocks of 32, scales that are powers
            of two), "nvfp4" (blocks of 16, E4M3 scales times one fp32 scale of the weight, by ModelOpt's rule) or
            "codebook".
        blocksize: elements that share a scale, a power of two in 32 ... 4096; None is 64, or the only one of "mxfp4"
            (32) and "nvfp4" (16). Blocks run over the flat weight.
        double_quant: keep the scales in 8 bits (QLoRA, section 3), for 4.127 bits an element at blocksize 64 instead of
            4.5. "mxfp4" and "nvfp4" always have scales of 8 bits: 4.25 and 4.5 bits an element.
        codebook: 16 ascending finite values, of which each element gets one, times its scale. Sets the format to
            "codebook".

    Returns:
        The quantized weight, on the device of `weight`. Not differentiable.

    Raises:
        TypeError: `weight` is not a tensor of one of these dtypes, or `blocksize` is not an int.
        ValueError: `weight` has another number of dimensions, is empty, has a NaN or Inf (the message says how many and
            where the first is), or is so near the largest of fp32 that it decodes to Inf; the format or the blocksize
            is unknown; or the codebook is not 16 ascending finite values.
    """
    if not isinstance(weight, Tensor):
        raise bad_type("weight", "a tensor", type(weight).__name__)
    check_local("weight", weight)
    check_float_dtype("weight", weight.dtype)
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        raise bad("weight", "[N, K] or [E, N, K], each at least 1", list(weight.shape))
    check_format(format)
    blocksize = chosen_blocksize(blocksize, format)
    if codebook is not None:
        if format not in ("codebook", "nf4"):  # "nf4" is the default, so the caller may not have chosen it
            raise bad("codebook", f"None with format {format!r}", "a codebook")
        format = "codebook"
    rows = weight.detach().reshape(-1, weight.shape[-1])
    if format in MICROSCALED:
        return _quantize_microscaled(rows, weight, format, blocksize)
    bits = 8 if format == "int8" else 4
    code = None if bits == 8 else code_tensor(format, codebook, weight.device)
    nested_code = DYNAMIC_MAP.to(weight.device, copy=True) if double_quant else None

    codes, absmax, nested_absmax, offset, non_finite = torch.ops.qlora_native.quantize(
        rows, code, nested_code, bits, blocksize
    )
    _check_found(non_finite, weight)
    q = QuantizedWeight(
        codes=codes.view(codes_shape(*weight.shape, bits=bits)),
        absmax=absmax,
        nested_absmax=nested_absmax if double_quant else None,
        nested_code=nested_code,
        offset=offset if double_quant else None,
        code=code,
        shape=tuple(weight.shape),
        blocksize=blocksize,
        format=format,
        dtype=weight.dtype,
    )
    try:
        return q.check_values()
    except ValueError:
        raise bad("weight", f"values that {format} decodes to finite ones", f"up to {rows.abs().max():.9g}") from None


def quantized_like(q: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """Quantize `weight` as `q` is quantized, with its dtype."""
    codebook = q.code if q.format == "codebook" else None
    again = quantize(weight, q.format, q.blocksize, q.nested_absmax is not None, codebook)
    return replace(again, dtype=q.dtype)


def double_quantized(q: QuantizedWeight) -> QuantizedWeight:
    """Put the fp32 scales of `q` into 8 bits (QLoRA, section 3), as `quantize` would have done. Shares the codes."""
    nested_code = DYNAMIC_MAP.to(q.device, copy=True)
    absmax, nested_absmax, offset = torch.ops.qlora_native.quantize_absmax(q.absmax, nested_code)
    return replace(q, absmax=absmax, nested_absmax=nested_absmax, nested_code=nested_code, offset=offset)


def decoded_scales(q: QuantizedWeight) -> Tensor:
    """The scales of the blocks, fp32 [blocks], as products decode them: two roundings if they are double-quantized."""
    if q.nested_absmax is None:
        return q.absmax
    nested = q.nested_absmax.repeat_interleave(q.layout.nested_blocksize)[: q.absmax.numel()]
    return q.nested_code[q.absmax.long()] * nested + q.offset


def _quantize_microscaled(rows: Tensor, weight: Tensor, format: str, blocksize: int) -> QuantizedWeight:
    codes, scales, nested_code, non_finite = torch.ops.qlora_native.quantize_microscaled(rows, blocksize)
    _check_found(non_finite, weight)
    fp32 = {"dtype": torch.float32, "device": weight.device}
    return QuantizedWeight(
        codes=codes.view(codes_shape(*weight.shape, bits=4)),
        absmax=scales,
        nested_absmax=torch.ones(ceil_div(scales.numel(), NESTED_BLOCKSIZE), **fp32),
        nested_code=nested_code,
        offset=torch.zeros((), **fp32),
        code=code_tensor(format, None, weight.device),
        shape=tuple(weight.shape),
        blocksize=blocksize,
        format=format,
        dtype=weight.dtype,
    )


def _check_found(non_finite: Tensor, weight: Tensor) -> None:
    """Raise ValueError if `non_finite` says that `weight` [N, K] or [E, N, K] has a NaN or Inf."""
    if weight.is_meta:
        return
    count, first = non_finite.tolist()
    if count:
        index: list[int] = []
        for size in reversed(weight.shape):
            first, last = divmod(first, size)
            index.insert(0, last)
        raise bad("weight", "finite values", f"{count} NaN or Inf, the first at {index}")


def code_tensor(format: str, codebook: Tensor | Sequence[float] | None, device: torch.device) -> Tensor:
    """The 16 levels of a format or codebook, as a new tensor on `device`."""
    if format != "codebook":
        return CODEBOOKS[format].to(device, copy=True)
    if codebook is None:
        raise bad("codebook", "16 values with format 'codebook'", None)
    code = torch.as_tensor(codebook, dtype=torch.float32).detach()
    if code.shape != (16,):
        raise bad("codebook", "16 values", f"shape {list(code.shape)}")
    if code.is_meta:
        raise bad("codebook", "a tensor with values", "one on the meta device")
    if not code.isfinite().all():
        raise bad("codebook", "finite values", code.tolist())
    if not (code[1:] >= code[:-1]).all():
        raise bad("codebook", "ascending values", code.tolist())
    return code.to(device, copy=True, memory_format=torch.contiguous_format)


def dequantize(q: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Decode a weight: fp32 code * fp32 scale, rounded once. Bit-identical to bitsandbytes for its formats.

    Args:
        q: W [N, K] or [E, N, K].
        dtype: fp32, bf16 or fp16; None is the dtype of the weight that was quantized.

    Returns:
        W in the shape of `q`, on its device. Not differentiable.

    Raises:
        TypeError: `q` is not a QuantizedWeight, or `dtype` is not fp32, bf16 or fp16.
    """
    if not isinstance(q, QuantizedWeight):
        raise bad_type("q", "a QuantizedWeight", type(q).__name__)
    return q.dequantize(dtype)


@checks_memory
def embedding(ids: Tensor, q: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Decode rows of W: `F.embedding(ids, dequantize(q))` without decoding the other rows.

    Args:
        ids: int64 or int32 [...], the rows of W to look up.
        q: W [V, K].
        dtype: of the result: fp32, bf16 or fp16; None is the dtype of the weight that was quantized.

    Returns:
        [..., K]. Not differentiable: W is frozen.

    Raises:
        TypeError: `q` is not a QuantizedWeight, or `ids` or `dtype` has another type.
        ValueError: `q` has another number of dimensions, `ids` is on another device, or an id is not a row of W. On a
            GPU ids are not read, because that would wait for the device: such a row of the result is NaN.
    """
    check_quantized(q, "[V, K]", 2)
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise bad_type("ids", "an int64 or int32 tensor", getattr(ids, "dtype", type(ids).__name__))
    if ids.device != q.device:
        raise bad("ids", f"a tensor on {q.device}, where q is", ids.device)
    dtype = q.dtype if dtype is None else dtype
    check_float_dtype("dtype", dtype)
    rows = torch.ops.qlora_native.dequantize_rows(*op_arguments(q), dtype, ids.reshape(-1).to(torch.int64))
    rows = rows if q.column_order is None else in_order(rows, q.column_order)
    return rows.view(*ids.shape, q.shape[1])
