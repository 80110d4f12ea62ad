"""Multiply by a quantized weight, with a LoRA adapter inside the same product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import bad, bad_type, checks_memory
from .inputs import checked_bias, checked_input, checked_lora, in_stored_order
from .ops import linear_forward, refuse_forward_mode
from .weight import QuantizedWeight, op_arguments


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
    multiplied; accumulators are fp32, and y is rounded once. Under `torch.autocast`, x is cast as for `F.linear`.
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
    x, lora = in_stored_order(q, x, lora)
    return linear_forward(x, *op_arguments(q), bias, *lora)[0]


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
    batch = () if not isinstance(lora_a, Tensor) or lora_a.dim() == 2 else (groups,)
    lora = checked_lora(lora_a, lora_b, lora_scaling, lora_dropout, (N, K), x, batch)
    rows, lora = in_stored_order(q, rows, lora)
    y, _ = linear_forward(rows, *op_arguments(q), bias, *lora, offsets, experts[0] if experts else 1)
    y = y if back is None else Permuted.apply(y, *back)
    return y.view(*x.shape[:-1], N)


class Permuted(torch.autograd.Function):
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
    return Permuted.apply(rows, order, inverse), torch.searchsorted(values, each), (inverse, order)


def _checked_offsets(offsets: Tensor, rows: Tensor) -> int:
    """Check the dtype and shape of offsets, and return the number of groups. On a CPU the core checks the values."""
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        raise bad_type("offsets", "an int64 tensor", getattr(offsets, "dtype", type(offsets).__name__))
    if offsets.dim() != 1 or offsets.numel() < 2:
        raise bad("offsets", "[groups + 1]", list(offsets.shape))
    if offsets.device != rows.device:
        raise bad("offsets", f"a tensor on {rows.device}, where x is", offsets.device)
    return offsets.numel() - 1
