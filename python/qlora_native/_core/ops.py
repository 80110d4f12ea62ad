"""Fakes and autograd formulas of the torch ops. Schemas and implementations: python/bindings/ops.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C  # noqa: F401  (registers the ops)
from .blocks import NESTED_BLOCKSIZE, ceil_div
from .checked_devices import note_use
from .errors import check_memory
from .mapped import before_use

_ops = torch.ops.qlora_native
_library = torch.library.Library("qlora_native", "FRAGMENT")  # its kernels live as long as it does

# {argument of linear_forward: its position}, from the schema.
_FORWARD = {argument.name: i for i, argument in enumerate(_ops.linear_forward.default._schema.arguments)}
_WEIGHT = slice(_FORWARD["codes"], _FORWARD["byte_format"] + 1)
_WEIGHT_TENSORS = slice(_FORWARD["codes"], _FORWARD["zero_point"] + 1)
_WEIGHT_TENSOR_COUNT = _WEIGHT_TENSORS.stop - _WEIGHT_TENSORS.start


class OpArguments(NamedTuple):
    """The arguments of a torch op that are a weight, of one expert.

    An op takes tensors and numbers alone, so each schema in python/bindings/ and each fake, whose parameters have the
    names of its schema, spells them out in this order; torch.library.opcheck compares the two in the tests.
    """

    codes: Tensor | None  # None, as all tensors, if a dense weight takes the place of this one
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    code: Tensor | None
    minimum: Tensor | None
    nested_minimum: Tensor | None
    zero_point: Tensor | None
    N: int
    K: int
    bits: int
    blocksize: int
    nested_blocksize: int
    byte_format: int


# ---- fakes: shapes and dtypes of the results -------------------------------------------------------------------------


def _low_rank(rows: Tensor, lora_a: Tensor | None) -> Tensor:
    """A new [M, rank] tensor, which is empty if there is no adapter."""
    if lora_a is None or lora_a.shape[-2] == 0:
        return rows.new_empty((0,))
    return rows.new_empty((math.prod(rows.shape[:-1]), lora_a.shape[-2]))


@torch.library.register_fake("qlora_native::quantize")
def _(weight, code, nested_code, bits, blocksize):
    elements = weight.numel()
    blocks = ceil_div(elements, blocksize)
    nested_blocks = ceil_div(blocks, NESTED_BLOCKSIZE) if nested_code is not None else 0
    return (
        weight.new_empty((elements if bits == 8 else ceil_div(elements, 2),), dtype=torch.uint8),
        weight.new_empty((blocks,), dtype=torch.float32 if nested_code is None else torch.uint8),
        weight.new_empty((nested_blocks,), dtype=torch.float32),
        weight.new_empty((), dtype=torch.float32),
        weight.new_empty((2,), dtype=torch.int64),
    )


@torch.library.register_fake("qlora_native::quantize_absmax")
def _(absmax, nested_code):
    blocks = absmax.numel()
    nested_blocks = ceil_div(blocks, NESTED_BLOCKSIZE)
    codes = absmax.new_empty((blocks,), dtype=torch.uint8)
    return codes, absmax.new_empty((nested_blocks,)), absmax.new_empty(())


@torch.library.register_fake("qlora_native::quantize_microscaled")
def _(weight, blocksize):
    elements = weight.numel()
    return (
        weight.new_empty((ceil_div(elements, 2),), dtype=torch.uint8),
        weight.new_empty((ceil_div(elements, blocksize),), dtype=torch.uint8),
        weight.new_empty((256,), dtype=torch.float32),
        weight.new_empty((2,), dtype=torch.int64),
    )


@torch.library.register_fake("qlora_native::dequantize")
def _(
    codes, absmax, nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point,
    N, K, bits, blocksize, nested_blocksize, byte_format, dtype,
):  # fmt: skip
    return codes.new_empty((N, K), dtype=dtype)


@torch.library.register_fake("qlora_native::dequantize_rows")
def _(
    codes, absmax, nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point,
    N, K, bits, blocksize, nested_blocksize, byte_format, dtype, rows,
):  # fmt: skip
    return codes.new_empty((rows.shape[0], K), dtype=dtype)


@torch.library.register_fake("qlora_native::linear_forward")
def _(
    x, codes, absmax, nested_absmax, nested_code, offset, code,
    minimum, nested_minimum, zero_point, N, K, bits, blocksize, nested_blocksize, byte_format,
    bias, lora_a, lora_b, lora_scaling, lora_dropout, seed, offsets=None, weights=1,
):  # fmt: skip
    note_use(x)  # for a compiled graph, which does not call the kernel of autograd
    return x.new_empty((*x.shape[:-1], N)), _low_rank(x, lora_a)


@torch.library.register_fake("qlora_native::linear_backward_input")
def _(
    dy, codes, absmax, nested_absmax, nested_code, offset, code,
    minimum, nested_minimum, zero_point, N, K, bits, blocksize, nested_blocksize, byte_format,
    lora_a, lora_b, lora_scaling, lora_dropout, seed, need_dx, offsets=None, weights=1,
):  # fmt: skip
    return dy.new_empty((*dy.shape[:-1], K) if need_dx else (0,)), _low_rank(dy, lora_a)


@torch.library.register_fake("qlora_native::lora_gradients")
def _(x, dy, u, v, lora_scaling, lora_dropout, seed, dtype, offsets=None, adapters=0):
    rank, batch = u.shape[1], (adapters,) if adapters else ()
    da = x.new_empty((*batch, rank, x.shape[-1]), dtype=dtype)
    return da, x.new_empty((*batch, dy.shape[-1], rank), dtype=dtype)


@torch.library.register_fake("qlora_native::optimizer_8bit_step")
def _(
    algorithm, params, grads, state1, state2, absmax1, absmax2, steps, group_sizes, lr, beta1, beta2, eps, weight_decay,
    inv_scale, found_inf, skipped, lr_tensors, lr_groups, beta3=(), alpha=(), t_alpha=(), t_beta3=(), check_only=False,
):  # fmt: skip
    return None


# ---- autograd --------------------------------------------------------------------------------------------------------


class Recompute:
    """How to compute a tensor again from operands that backward needs in any case, so that nothing keeps the tensor.

    It is an attribute of the tensor, because the code of a model between the two ops passes on nothing but the tensor.
    """

    def __init__(self, tensor: Tensor, function: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> None:
        """Let `tensor` be computed again as `function(*operands)`, unless something writes to it."""
        self.function, self.operands, self.version = function, operands, tensor._version
        tensor._recompute = self  # type: ignore[attr-defined]

    @classmethod
    def of(cls, tensor: Tensor) -> Recompute | None:
        """How to compute `tensor` again, or None if that is unknown, or something has written to it."""
        found = getattr(tensor, "_recompute", None)
        return found if found is not None and found.version == tensor._version else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_a, lora_b = inputs[0], inputs[_FORWARD["lora_a"]], inputs[_FORWARD["lora_b"]]
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    # x and u serve the adapter's gradients alone; without one they may go.
    adapter = ctx.needs_input_grad[_FORWARD["lora_a"]] or ctx.needs_input_grad[_FORWARD["lora_b"]]
    recompute = Recompute.of(x) if adapter else None
    kept = (x if recompute is None else None, u) if adapter else (None, None)
    ctx.recompute_x, operands = (None, ()) if recompute is None else (recompute.function, recompute.operands)
    offsets, ctx.weights = inputs[_FORWARD["offsets"] :]
    ctx.save_for_backward(*kept, *inputs[_WEIGHT_TENSORS], lora_a, lora_b, inputs[_FORWARD["seed"]], offsets, *operands)
    ctx.weight_sizes = inputs[_WEIGHT_TENSORS.stop : _WEIGHT.stop]
    ctx.lora_scaling, ctx.lora_dropout = inputs[_FORWARD["lora_scaling"]], inputs[_FORWARD["lora_dropout"]]


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if dy is None:
        return tuple(gradients)
    x, u, *others = ctx.saved_tensors
    weight, (lora_a, lora_b, seed, offsets, *operands) = others[:_WEIGHT_TENSOR_COUNT], others[_WEIGHT_TENSOR_COUNT:]
    need_dx, need_adapter = ctx.needs_input_grad[_FORWARD["x"]], u is not None
    lora = (ctx.lora_scaling, ctx.lora_dropout, seed)
    if need_dx or need_adapter:
        before_use(weight[0])
        dx, v = linear_backward_input(
            dy, *weight, *ctx.weight_sizes, lora_a, lora_b, *lora, need_dx, offsets, ctx.weights
        )
        if need_dx:
            gradients[_FORWARD["x"]] = dx
    if need_adapter:
        if lora_a.shape[-2] == 0:
            da, db = torch.empty_like(lora_a), torch.empty_like(lora_b)
        else:
            adapters = lora_a.shape[0] if lora_a.dim() == 3 else 0
            x = x if ctx.recompute_x is None else ctx.recompute_x(*operands)
            da, db = lora_gradients(x, dy, u, v, *lora, lora_a.dtype, offsets, adapters)
        gradients[_FORWARD["lora_a"]], gradients[_FORWARD["lora_b"]] = da, db
    if ctx.needs_input_grad[_FORWARD["bias"]]:
        gradients[_FORWARD["bias"]] = _bias_gradient(dy, offsets, ctx.weights)
    return tuple(gradients)


def _bias_gradient(dy: Tensor, offsets: Tensor | None, weights: int) -> Tensor:
    """Sum the rows of `dy` [..., N]: [N], or [weights, N] if each group has a bias of its own."""
    check_memory("dy", dy)
    rows = dy.reshape(-1, dy.shape[-1])
    if weights == 1:
        return rows.sum(0)
    each = torch.arange(weights, device=rows.device)
    group = torch.repeat_interleave(each, offsets.diff(), output_size=rows.shape[0])
    return (group == each[:, None]).to(rows.dtype) @ rows  # on a GPU index_add would use atomics


def refuse_forward_mode(function: str, arguments: Iterable[Any]) -> None:
    """Raise NotImplementedError if an argument of `qlora_native.<function>` has a tangent, which would be lost."""
    if forward_ad._current_level < 0:  # no dual tensor can exist, and checking each argument takes microseconds
        return
    for each in arguments:
        if isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None:
            raise NotImplementedError(
                f"qlora_native.{function}: expected reverse-mode differentiation (backward), got forward mode "
                "(jvp, jacfwd, dual tensors)"
            )


def differentiable(
    op: str, function: str, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Give an op its derivative in reverse mode, and refuse forward mode.

    Args:
        op: its name in `torch.ops.qlora_native`.
        function: the name of what users call, for errors.
        save: keeps in a context what `backward` needs of the inputs and the output.
        backward: the gradients of the inputs, from a context and those of the output.

    Returns:
        The op, to be called by position. In eager mode it skips the dispatcher's call of its own Python kernel.
    """
    overload = getattr(_ops, op).default
    defaults = tuple(argument.default_value for argument in overload._schema.arguments)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*inputs)
        save(ctx, inputs, output)
        return output

    name = "".join(part.title() for part in op.split("_"))
    formula = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    def kernel(*inputs: Any) -> Any:
        note_use(inputs[0])
        refuse_forward_mode(function, inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return formula.apply(*inputs, *defaults[len(inputs) :])  # the dispatcher leaves defaults out
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    _library.impl(op, kernel, "Autograd")

    def call(*inputs: Any) -> Any:
        return overload(*inputs) if torch.compiler.is_compiling() else kernel(*inputs)  # a compiler traces the op

    return call


def second_derivative_error(function: str) -> str:
    """The message of an error where `qlora_native.functional.<function>` is differentiated twice."""
    return f"qlora_native.{function}: expected to be differentiated once, got a second derivative"


def refuse_second_derivative(op: str, function: str) -> Callable[..., Any]:
    """Let the derivative of `op`, which is that of `qlora_native.functional.<function>`, be an error.

    Returns:
        The op, as `differentiable` returns it.
    """

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(second_derivative_error(function))

    return differentiable(op, function, lambda *_: None, refuse)


linear_forward = differentiable("linear_forward", "linear", _save, _backward)
linear_backward_input = refuse_second_derivative("linear_backward_input", "linear")
lora_gradients = refuse_second_derivative("lora_gradients", "linear")
