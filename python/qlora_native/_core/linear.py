"""Quantize a weight, decode it, and multiply by it with a LoRA adapter inside the same product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import bad, bad_type, check_float_dtype, checks_memory, chosen_blocksize
from .formats import CODEBOOKS, DYNAMIC_MAP, ceil_div, check_format, codes_shape
from .inputs import checked_bias, checked_input, checked_lora
from .microscaling import MICROSCALED
from .ops import linear_forward, refuse_forward_mode
from .quant_state import NESTED_BLOCKSIZE
from .weight import QuantizedWeight, check_quantized


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


def double_quantized(q: QuantizedWeight) -> QuantizedWeight:
    """Put the fp32 scales of `q` into 8 bits (QLoRA, section 3), as `quantize` would have done. Shares the codes."""
    nested_code = DYNAMIC_MAP.to(q.device, copy=True)
    absmax, nested_absmax, offset = torch.ops.qlora_native.quantize_absmax(q.absmax, nested_code)
    return replace(q, absmax=absmax, nested_absmax=nested_absmax, nested_code=nested_code, offset=offset)


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
    rows = torch.ops.qlora_native.dequantize_rows(*q.op_arguments(), dtype, ids.reshape(-1).to(torch.int64))
    return rows.view(*ids.shape, q.shape[1])


@checks_memory
def linear(
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float | Tensor = 1.0,
    lora_dropout: float = 0.0,
) -> Tensor:
    """Multiply by a quantized weight, with a LoRA adapter (Hu et al., 2021) inside the same product.

    y = x @ W.T + bias + lora_scaling * (dropout(x) @ lora_a.T) @ lora_b.T, where W is decoded in parts.

    Differentiable, once, in x, bias, lora_a and lora_b. W and the adapter are rounded to the dtype of x before they are
    multiplied; sums are fp32, and y is rounded once. Under `torch.autocast`, x is cast as for `F.linear`.
    In bf16, subnormal operands and results may count as zero: they do on processors with instructions for bf16
    (AVX512_BF16, AMX, Arm's BF16), as in torch's products there, but for its smallest. In fp32 and fp16 they count.

    Args:
        x: [..., K] in fp32, bf16 or fp16, any strides; leading dimensions may be 0.
        q: W [N, K].
        bias: [N], any floating dtype.
        lora_a: [rank, K] in fp32, bf16 or fp16, together with `lora_b`. Rank 0 means no adapter.
        lora_b: [N, rank] in the dtype of `lora_a`.
        lora_scaling: any finite factor. A tensor [] multiplies `lora_b`, so a compiled graph reads it at each call, as
            PEFT's hotswapping needs.
        lora_dropout: probability in [0, 1), in steps of 1/65536, with which an element of x does not reach the adapter;
            the others are scaled by 1/(1-p). It applies whenever it is above 0, so a layer passes 0 in evaluation. One
            number drawn from torch's CPU generator determines the mask, which is not stored for backward. If
            `torch.compile` or a CUDA graph captures the call on a GPU, the number comes from the GPU's generator, so
            that each replay has another mask.

    Returns:
        y [..., N] in the dtype of x.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
    """
    x = checked_input(x, q, 2)
    N, K = q.shape
    if bias is not None:
        bias = checked_bias(bias, (N,), x)
    lora = checked_lora(lora_a, lora_b, lora_scaling, lora_dropout, (N, K), x)
    return linear_forward(x, *q.op_arguments(), bias, *lora)[0]


@checks_memory
def linear_grouped(
    x: Tensor,
    q: QuantizedWeight,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float | Tensor = 1.0,
    lora_dropout: float = 0.0,
    *,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Multiply groups of rows, each by a weight and an adapter of its own, in one call.

    The groups may be the experts of a mixture, or a batch for several fine-tunes of one model. The call differentiates
    and rounds as `linear` does.

    Args:
        x: [T, K] with `offsets`, or [..., K] with `adapter_index`, in fp32, bf16 or fp16.
        q: W [E, N, K], where group g has the weight W[g], or W [N, K], which all groups share.
        offsets: int64 [G + 1], ascending, and the last is T. Group g has the rows offsets[g] ... offsets[g+1]-1 of x,
            and may be empty. With a shared weight there may be rows before the first group; they have no adapter.
        bias: [E, N], or [N] with a shared weight.
        lora_a: [G, rank, K], an adapter for each group, or [rank, K], one for all.
        lora_b: [G, N, rank] or [N, rank].
        lora_scaling, lora_dropout: as in `linear`. The mask of dropout depends on the order of rows by group.
        adapter_index: int64 [...], used with a shared weight in place of `offsets`: the number of each row's adapter,
            or -1 for none. If the rows are not in the order of their adapters, this costs a copy of x and one of y.

    Returns:
        y [T, N], or [..., N] with `adapter_index`, in the dtype of x.

    Raises:
        TypeError, ValueError: an operand is wrong, as in `linear`; the numbers of groups, weights, adapters and biases
            differ; offsets do not ascend or do not end at T; or an index is out of range. On a GPU the values of
            offsets and indices are not read, because that would wait for the device; wrong ones touch no memory but
            that of the operands.
    """
    # Before rows are sorted, by a function that has no derivative in forward mode either.
    refuse_forward_mode("linear_grouped", (x, bias, lora_a, lora_b, lora_scaling))
    x = checked_input(x, q, 3)
    *experts, N, K = q.shape
    if (offsets is None) == (adapter_index is None):
        got = "both" if adapter_index is not None else "none"
        raise bad("offsets, adapter_index", "one of them", got)
    back = None
    rows = x.reshape(-1, K)
    if adapter_index is not None:
        if experts:
            raise bad("adapter_index", "offsets instead, where each group has a weight of its own", "an index")
        rows, offsets, back = _sorted_by_adapter(rows, adapter_index, lora_a, x.shape[:-1])
    elif x.dim() != 2:
        raise bad("x", f"[T, {K}] with offsets", list(x.shape))
    groups = _checked_offsets(offsets, rows)
    if experts and experts[0] != groups:
        raise bad("offsets", f"[{experts[0] + 1}] for a weight {list(q.shape)}", [groups + 1])
    if bias is not None:
        bias = checked_bias(bias, (*experts, N), x)
    of_each = () if not isinstance(lora_a, Tensor) or lora_a.dim() == 2 else (groups,)
    lora = checked_lora(lora_a, lora_b, lora_scaling, lora_dropout, (N, K), x, of_each)
    y, _ = linear_forward(rows, *q.op_arguments(), bias, *lora, offsets, experts[0] if experts else 1)
    y = y if back is None else _Permuted.apply(y, *back)
    return y.view(*x.shape[:-1], N)


class _Permuted(torch.autograd.Function):
    """x[order]. Its gradient gathers by the inverse order; that of torch's indexing would use atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def _sorted_by_adapter(
    rows: Tensor, index: Tensor, lora_a: Tensor | None, shape: torch.Size
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Sort rows of x by adapter.

    Returns:
        The sorted rows, the offsets of the adapters, and (order, inverse order), which is None if the rows were sorted.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise bad_type("adapter_index", "an int64 tensor", getattr(index, "dtype", type(index).__name__))
    if index.shape != shape:
        raise bad("adapter_index", f"{list(shape)}, as the rows of x", list(index.shape))
    if index.device != rows.device:
        raise bad("adapter_index", f"a tensor on {rows.device}, where x is", index.device)
    if not isinstance(lora_a, Tensor) or lora_a.dim() != 3:
        got = list(lora_a.shape) if isinstance(lora_a, Tensor) else type(lora_a).__name__
        raise bad("lora_a", "[adapters, rank, K] with adapter_index", got)
    flat, adapters = index.reshape(-1), lora_a.shape[0]
    readable = not (index.is_cuda or index.is_meta or torch.compiler.is_compiling())
    if readable and (out_of_range := (flat < -1) | (flat >= adapters)).any():
        first = int(out_of_range.nonzero()[0])
        raise bad("adapter_index", f"-1 ... {adapters - 1}", f"{int(flat[first])} at row {first}")
    each = torch.arange(adapters + 1, device=index.device)
    if readable and bool((flat.diff() >= 0).all()):
        return rows, torch.searchsorted(flat, each), None
    values, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return _Permuted.apply(rows, order, inverse), torch.searchsorted(values, each), (inverse, order)


def _checked_offsets(offsets: Tensor, rows: Tensor) -> int:
    """Check the dtype and shape of offsets, and return the number of groups. On a CPU the core checks the values."""
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        raise bad_type("offsets", "an int64 tensor", getattr(offsets, "dtype", type(offsets).__name__))
    if offsets.dim() != 1 or offsets.numel() < 2:
        raise bad("offsets", "[groups + 1]", list(offsets.shape))
    if offsets.device != rows.device:
        raise bad("offsets", f"a tensor on {rows.device}, where x is", offsets.device)
    return offsets.numel() - 1
