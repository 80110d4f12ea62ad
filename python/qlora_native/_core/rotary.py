"""The rotation of positions on the CPU: one pass in the place of the products, sums and copies of its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the ops)
from .attention import new_heads
from .errors import bad, bad_type, check_float_dtype, checks_memory
from .ops import differentiable

_ops = torch.ops.qlora_native


@checks_memory
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x o cos + (-x2, x1) o sin with x = (x1, x2), the halves of a row (Su et al., "RoFormer"; Llama's order).

    It is computed in fp32 and rounded once. Differentiable, once, in x; it keeps cos and sin.

    Args:
        x: [B, H, T, D] on the CPU, in fp32, bf16 or fp16, with an even D.
        cos: [B, T, D] or [1, T, D], in the dtype of x; it gets no gradient.
        sin: as cos.

    Returns:
        [B, H, T, D] in the dtype of x, a view of memory [B, T, H, D].

    Raises:
        TypeError: no tensors, or another dtype.
        ValueError: another shape or device.
    """
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, Tensor):
            raise bad_type(name, "a tensor", type(tensor).__name__)
        if tensor.device.type != "cpu":
            raise bad(name, "a tensor on the CPU", f"one on {tensor.device}")
    check_float_dtype("x", x.dtype)
    if x.dim() != 4 or x.shape[3] == 0 or x.shape[3] % 2:
        raise bad("x", "[B, H, T, D] with an even D", list(x.shape))
    B, _, T, D = x.shape
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != x.dtype:
            raise bad_type(name, f"{x.dtype}, as x", tensor.dtype)
        if tensor.shape not in ((B, T, D), (1, T, D)) or tensor.shape != cos.shape:
            raise bad(name, f"{[B, T, D]} or {[1, T, D]}, cos and sin alike", list(tensor.shape))
    cos, sin = cos.detach().contiguous(), sin.detach().contiguous()
    return _rotary_op(x, cos, sin)


@torch.library.register_fake("qlora_native::rotary")
def _(x, cos, sin, transposed=False):
    return new_heads(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *transposed = inputs
    ctx.transposed = bool(transposed and transposed[0])
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = _ops.rotary(dy, *ctx.saved_tensors, not ctx.transposed)
    return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


_rotary_op = differentiable("rotary", "rotary_embedding", _save, _backward)
