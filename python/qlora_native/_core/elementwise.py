"""What a transformer block computes between its products: a gated activation and an RMS norm, each one op.

Autograd over the parts of either keeps a tensor for each part, those of a norm in fp32. These keep their operands. What
a gated activation returns is not kept by the product that follows either, which computes it again (`Recompute`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the ops)
from .errors import bad, bad_type, check_float_dtype, check_memory, checks_memory, is_finite
from .ops import Recompute, differentiable, refuse_second_derivative

_ops = torch.ops.qlora_native
ACTIVATIONS = ("silu", "gelu_tanh")  # by their numbers in the ops


@checks_memory
def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """h = f(gate) * up, a gated linear unit's (Shazeer, "GLU variants improve transformer"), in one pass.

    It is computed in fp32 and rounded once. Differentiable, once, in gate and up, which are all that it keeps. Where
    `linear` multiplies the result by a weight with an adapter, it keeps gate and up in the place of h, and makes h
    again for the adapter's gradient.

    Args:
        gate: [..., N] in fp32, bf16 or fp16, any strides; halves of one tensor are not copied.
        up: the same shape, dtype and device.
        activation: f: "silu" (SwiGLU) or "gelu_tanh" (GEGLU with the tanh of Gemma).

    Returns:
        h [..., N] in the dtype of gate.

    Raises:
        TypeError: no tensors, or another dtype.
        ValueError: another shape or device, no last dimension, or an activation of another name.
    """
    if activation not in ACTIVATIONS:
        raise bad("activation", " or ".join(map(repr, ACTIVATIONS)), repr(activation))
    _check("gate", gate, gate)
    _check("up", up, gate)
    number = ACTIVATIONS.index(activation)
    h = _gated_op(gate, up, number)
    if h.requires_grad and not torch.compiler.is_compiling():
        Recompute(h, partial(_compute_gated, activation=number), (gate, up))
    return h


@checks_memory
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, shift: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (shift + weight) over the last dimension (Zhang and Sennrich, RMSNorm).

    It is computed in fp32 and rounded once. Differentiable, once, in x and weight; it keeps x and one number a row.

    Args:
        x: [..., N] in fp32, bf16 or fp16.
        weight: [N] in the dtype of x.
        eps: at least 0.
        shift: 1.0 where weights are kept as their distance from 1 (Gemma).

    Returns:
        y [..., N] in the dtype of x.

    Raises:
        TypeError: no tensors, or another dtype.
        ValueError: another shape, device or number.
    """
    _check("x", x, x)
    if not isinstance(weight, Tensor) or weight.dtype != x.dtype:
        raise bad_type(
            "weight", f"a tensor of {x.dtype}, the dtype of x", getattr(weight, "dtype", type(weight).__name__)
        )
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise bad("weight", f"{list(x.shape[-1:])} on {x.device}", f"{list(weight.shape)} on {weight.device}")
    if not (is_finite(eps) and eps >= 0):
        raise bad("eps", "a number of at least 0", eps)
    if not is_finite(shift):
        raise bad("shift", "a finite number", shift)
    return _norm_op(x, weight.contiguous(), shift, eps)[0]


def _check(name: str, tensor: Tensor, first: Tensor) -> None:
    """`first`: the operand whose shape, dtype and device the others have."""
    if not isinstance(tensor, Tensor):
        raise bad_type(name, "a tensor", type(tensor).__name__)
    check_float_dtype(name, tensor.dtype)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise bad(name, "[..., N] with N >= 1", list(tensor.shape))
    if tensor.dtype != first.dtype:
        raise bad_type(name, f"{first.dtype}, as the other operand", tensor.dtype)
    if tensor.shape != first.shape or tensor.device != first.device:
        raise bad(name, f"{list(first.shape)} on {first.device}", f"{list(tensor.shape)} on {tensor.device}")


def _compute_gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """The op without its derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.gated_activation.default(gate, up, activation)


# ---- fakes ----


def _new_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)  # contiguous, whatever the strides of `tensor`


@torch.library.register_fake("qlora_native::gated_activation")
def _(gate, up, activation):
    return _new_like(gate)


@torch.library.register_fake("qlora_native::gated_activation_backward")
def _(dh, gate, up, activation):
    return _new_like(gate), _new_like(gate)


@torch.library.register_fake("qlora_native::rms_norm")
def _(x, weight, shift, eps):
    return _new_like(x), x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.float32)


@torch.library.register_fake("qlora_native::rms_norm_backward")
def _(dy, x, weight, shift, r):
    return _new_like(x)


# ---- autograd ----


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
    dgate, dup = _ops.gated_activation_backward(dh, *ctx.saved_tensors, ctx.activation)
    return dgate, dup, None


_gated_op = differentiable("gated_activation", "gated_activation", _save_gated, _gated_backward)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.shift, _ = inputs
    r = output[1]
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, r)


def _norm_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, r = ctx.saved_tensors
    dx = _ops.rms_norm_backward(dy, x, weight, ctx.shift, r) if ctx.needs_input_grad[0] else None
    dweight = _norm_weight_gradient(dy, x, r).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return dx, dweight, None, None


def _norm_weight_gradient(dy: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """The sum over rows of dy * x * r, in fp32: [N]."""
    for name, tensor in (("dy", dy), ("x", x), ("r", r)):
        check_memory(name, tensor)
    N = x.shape[-1]
    total = x.new_zeros(N, dtype=torch.float32)
    for each_dy, each_x, each_r in zip(*(t.split(1024) for t in (dy.reshape(-1, N), x.reshape(-1, N), r)), strict=True):
        total += (each_dy.float() * each_x.float() * each_r[:, None]).sum(0)
    return total


_norm_op = differentiable("rms_norm", "rms_norm", _save_norm, _norm_backward)
refuse_second_derivative("gated_activation_backward", "gated_activation")
refuse_second_derivative("rms_norm_backward", "rms_norm")
