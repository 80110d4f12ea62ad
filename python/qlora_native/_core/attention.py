"""Attention on the CPU: softmax(scale * q k^T) v of each head, without a matrix of scores, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the ops)
from .errors import FLOAT_DTYPES, bad, bad_type, check_float_dtype, checks_memory, is_finite_number
from .ops import differentiable, refuse_second_derivative

_ops = torch.ops.qlora_native


@checks_memory
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_ranges: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of each head, a block of scores at a time (Dao et al., "FlashAttention"), on the CPU.

    Scores and accumulators are fp32, probabilities are rounded to the dtype before they multiply v, and the result is
    rounded once. Differentiable, once, in q, k and v. It keeps them, the result, and one number for each query of each
    head; no head of k or v is repeated. Under `torch.autocast` the operands are cast, as torch casts those of
    `scaled_dot_product_attention`.

    Args:
        q: [B, H, Tq, D] in fp32, bf16 or fp16. It is copied, as k and v are, if a row is not contiguous.
        k: [B, KV, Tk, D] in the dtype of q; head h of q belongs to head h // (H // KV) of k and v.
        v: as k.
        scale: greater than 0; None is 1 / sqrt(D).
        is_causal: let query i see the keys 0 ... i alone.
        key_ranges: int32 [B, Tq, 2] or [1, Tq, 2], for each query a pair (begin, end) within 0 ... Tk: it sees the keys
            begin ... end - 1. Sliding windows, padding on either side and sequences that share a row are such ranges.
            A query whose range is empty gets zeros.

    Returns:
        [B, H, Tq, D] in the dtype of q, a view of memory [B, Tq, H, D].

    Raises:
        TypeError: no tensors, or another dtype.
        ValueError: another shape or device, a bad number, keys that there are not, or is_causal beside key_ranges.
    """
    operands = {"q": q, "k": k, "v": v}
    for name, tensor in operands.items():
        if not isinstance(tensor, Tensor):
            raise bad_type(name, "a tensor", type(tensor).__name__)
        if tensor.device.type != "cpu":
            use = "torch.nn.functional.scaled_dot_product_attention elsewhere"
            raise bad(name, f"a tensor on the CPU; use {use}", f"one on {tensor.device}")
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        q, k, v = (each.to(dtype) if each.dtype in FLOAT_DTYPES else each for each in operands.values())
    _check_shapes(q, k, v)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    elif not (is_finite_number(scale) and scale > 0):
        raise bad("scale", "a finite number > 0", scale)
    if key_ranges is not None:
        if is_causal:
            raise bad("is_causal, key_ranges", "one of them", "both")
        key_ranges = _checked_ranges(key_ranges, q)
    elif is_causal:
        key_ranges = _causal_ranges(q.shape[2], k.shape[2])
    return _attention_op(q, k, v, scale, key_ranges)[0]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_float_dtype("q", q.dtype)
    if q.dim() != 4 or q.shape[1] == 0 or q.shape[3] == 0:
        raise bad("q", "[B, H, Tq, D] with H, D >= 1", list(q.shape))
    B, H, _, D = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise bad_type(name, f"{q.dtype}, as q", tensor.dtype)
    if k.dim() != 4 or k.shape[0] != B or k.shape[3] != D or k.shape[1] == 0 or H % k.shape[1]:
        raise bad("k", f"[{B}, KV, Tk, {D}] where KV divides {H}", list(k.shape))
    if v.shape != k.shape:
        raise bad("v", f"{list(k.shape)}, as k", list(v.shape))


def _checked_ranges(ranges: Any, q: Tensor) -> Tensor:
    """The op checks their values."""
    if not isinstance(ranges, Tensor) or ranges.dtype != torch.int32:
        raise bad_type("key_ranges", "an int32 tensor", getattr(ranges, "dtype", type(ranges).__name__))
    B, _, Tq, _ = q.shape
    if ranges.dim() != 3 or ranges.shape[0] not in (1, B) or ranges.shape[1:] != (Tq, 2):
        raise bad("key_ranges", f"[{B} or 1, {Tq}, 2]", list(ranges.shape))
    if ranges.device != q.device:
        raise bad("key_ranges", f"a tensor on {q.device}, where q is", ranges.device)
    return ranges.contiguous()


def _causal_ranges(queries: int, keys: int) -> Tensor:
    """[1, queries, 2]: query i sees the keys 0 ... i, as far as there are any."""
    ends = torch.arange(1, queries + 1, dtype=torch.int32, device="cpu").clamp(max=keys)
    return torch.stack((torch.zeros_like(ends), ends), -1)[None]


# ---- fakes ----


def new_heads(like: Tensor) -> Tensor:
    """What the ops of attention return for a tensor [B, H, T, D]: tokens one after another, with all heads of each."""
    B, H, T, D = like.shape
    return like.new_empty((B, T, H, D)).transpose(1, 2)


@torch.library.register_fake("qlora_native::attention")
def _(q, k, v, scale, key_ranges=None):
    return new_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("qlora_native::attention_backward")
def _(dout, q, k, v, out, lse, scale, key_ranges=None):
    return new_heads(q), new_heads(k), new_heads(v)


# ---- autograd ----


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, *ranges = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, *ranges)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    others = (None,) * (len(ctx.needs_input_grad) - 3)
    if dout is None:
        return (None, None, None, *others)
    q, k, v, out, lse, *ranges = ctx.saved_tensors
    return (*_ops.attention_backward(dout, q, k, v, out, lse, ctx.scale, *ranges), *others)


_attention_op = differentiable("attention", "attention", _save, _backward)
refuse_second_derivative("attention_backward", "attention")
