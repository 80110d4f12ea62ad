"""The cross-entropy of a linear layer's logits, computed a chunk of rows at a time, so that memory holds one chunk.

For each chunk one product makes the logits, the op `cross_entropy_` overwrites them with their gradient, and the
products of the gradient follow at once. With the reductions "mean" and "sum" the gradients are known before backward
begins, up to one factor: forward computes those that are wanted, and backward scales them. Forward divides those of a
mean by what its rows are of a power of two, and backward by that power: divided by thousands of rows at once, a logit's
gradient in fp16 would be zero. Without a reduction each row has a factor of its own, which only backward knows, so
backward computes the logits again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .blocks import ceil_div
from .checked_devices import note_use
from .errors import FLOAT_DTYPES, bad, bad_type, check_float_dtype, check_memory, checks_memory, is_finite
from .head import Gradients, Head
from .inputs import checked_bias, checked_input, checked_lora, in_stored_order
from .ops import OpArguments, refuse_forward_mode, refuse_second_derivative, second_derivative_error
from .weight import QuantizedWeight, op_arguments

_ops = torch.ops.qlora_native
# Bytes of logits in a chunk, at most. Smaller chunks would read the weight so often that the time of a call grows.
CHUNK_BYTES = 24 << 20
_MIN_ROWS = 16


@checks_memory
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float | Tensor = 1.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.cross_entropy(z(F.linear(hidden, weight, bias)), labels)` without the logits, which exist 25 MB at a time.

    Differentiable, once, in hidden, a dense weight, bias, lora_a and lora_b. The logits are rounded to the dtype of
    hidden, as `F.linear` does; the loss is fp32. Beside the result and the gradients, a call needs memory for the
    logits of one chunk and for what `linear` needs. The gradient of a dense weight is accumulated in fp32.

    Args:
        hidden: [..., K] in fp32, bf16 or fp16.
        weight: [V, K]: a dense tensor in the dtype of hidden, or a QuantizedWeight, which stays frozen.
        labels: int64 [...], each in 0 ... V-1 or `ignore_index`. They are not shifted.
        bias: [V].
        lora_a, lora_b, lora_scaling: an adapter of the head, [rank, K] and [V, rank], as in `linear`.
        ignore_index: the label of rows that have no loss and no gradient.
        reduction: "mean" over the rows that are not ignored (NaN if all are, as in torch), "sum", or "none".
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        logit_scale: s of z(l) = s * l (Granite's 1 / logits_scaling).
        softcap: c of z(l) = c * tanh(s * l / c) (Gemma 2's final_logit_softcapping); None for no cap.
        z_loss: adds this factor times the square of the logarithm of the softmax's denominator (PaLM, section 5).
        return_logprobs: also return the log-probability of each label. It is not differentiable; with "none", no
            smoothing and no z_loss the loss is its negative, which is.

    Returns:
        The loss: fp32 [], or with "none" fp32 [...], which is 0 in ignored rows. With `return_logprobs` the pair
        (loss, log-probabilities fp32 [...]).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, or labels out of range (the message says how
            many, and the first). On a GPU the labels are not read, because that would wait for the device: a label out
            of range makes its row NaN.
    """
    refuse_forward_mode("linear_cross_entropy", (hidden, weight, bias, lora_a, lora_b))
    quantized = isinstance(weight, QuantizedWeight)
    if quantized:
        hidden = checked_input(hidden, weight, 2, "hidden")
        device, (V, K) = weight.device, weight.shape
    else:
        hidden, weight = _checked_dense(hidden, weight)
        device, (V, K) = weight.device, weight.shape
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise bad_type("labels", "an int64 tensor", getattr(labels, "dtype", type(labels).__name__))
    if labels.shape != hidden.shape[:-1] or labels.device != device:
        raise bad("labels", f"{list(hidden.shape[:-1])} on {device}", f"{list(labels.shape)} on {labels.device}")
    if reduction not in ("mean", "sum", "none"):
        raise bad("reduction", "'mean', 'sum' or 'none'", repr(reduction))
    if not 0 <= label_smoothing <= 1:
        raise bad("label_smoothing", "a number in [0, 1]", label_smoothing)
    if not is_finite(logit_scale):
        raise bad("logit_scale", "a finite number", logit_scale)
    if softcap is not None and not 0 < softcap < math.inf:
        raise bad("softcap", "a number above 0, or None", softcap)
    if not 0 <= z_loss < math.inf:
        raise bad("z_loss", "a number of at least 0", z_loss)
    if bias is not None:
        bias = checked_bias(bias, (V,), hidden)
    lora = checked_lora(lora_a, lora_b, lora_scaling, 0.0, (V, K), hidden)
    if quantized:
        hidden, lora = in_stored_order(weight, hidden, lora)
    lora_a, lora_b, lora_scaling, _, _ = lora
    if lora_a is not None and lora_a.shape[0] == 0:
        lora_a = lora_b = None
    flat = labels.reshape(-1).contiguous()
    if not (flat.is_cuda or flat.is_meta or torch.compiler.is_compiling()):
        outside = (flat != ignore_index) & ((flat < 0) | (flat >= V))
        if outside.any():
            first = int(outside.nonzero()[0])
            got = f"{int(outside.sum())} others, the first {int(flat[first])} at row {first}"
            raise bad("labels", f"0 ... {V - 1} or {ignore_index}", got)
    count = (flat != ignore_index).sum().to(torch.float32) if reduction == "mean" else None
    of_weight = (None, *op_arguments(weight)) if quantized else (weight, *OpArguments(*[None] * 9, V, K, 0, 0, 0, 0))
    loss, logprobs = LinearCrossEntropy.apply(
        reduction, count, hidden.reshape(-1, K).contiguous(), flat, *of_weight, bias, lora_a, lora_b, lora_scaling,
        ignore_index, logit_scale, softcap or 0.0, label_smoothing, z_loss,
    )  # fmt: skip
    if reduction == "none":
        loss = loss.view(labels.shape)
    return (loss, logprobs.view(labels.shape)) if return_logprobs else loss


def _checked_dense(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Check a dense weight and its input, and cast both to the dtype of the product."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise bad_type(name, "a tensor" + " or a QuantizedWeight" * (name == "weight"), type(tensor).__name__)
        check_float_dtype(name, tensor.dtype)
    if weight.dim() != 2 or weight.numel() == 0:
        raise bad("weight", "[V, K] with V >= 1 and K >= 1", list(weight.shape))
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise bad("hidden", f"[..., {weight.shape[1]}] for a weight {list(weight.shape)}", list(hidden.shape))
    if hidden.device != weight.device:
        raise bad("hidden", f"a tensor on {weight.device}, where the weight is", hidden.device)
    if weight.device.type != "meta" and torch.is_autocast_enabled(weight.device.type) and weight.dtype in FLOAT_DTYPES:
        dtype = torch.get_autocast_dtype(weight.device.type)
        return hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise bad_type("hidden", f"{weight.dtype}, the dtype of the weight", hidden.dtype)
    return hidden, weight


@torch.library.register_fake("qlora_native::cross_entropy_")
def _(logits, labels, ignore_index, scale, softcap, label_smoothing, z_loss, gradient, row_gradients=None):
    rows = logits.new_empty((logits.shape[0],), dtype=torch.float32)
    return rows, torch.empty_like(rows)


def chunks(rows: int, vocabulary: int, dtype: torch.dtype) -> list[slice]:
    """Split the rows into chunks of nearly one size, whose logits fill CHUNK_BYTES at most, if that is some rows."""
    max_rows = max(CHUNK_BYTES // (vocabulary * dtype.itemsize) // _MIN_ROWS, 1) * _MIN_ROWS
    each = ceil_div(ceil_div(rows, max(ceil_div(rows, max_rows), 1)), _MIN_ROWS) * _MIN_ROWS
    return [slice(first, min(first + each, rows)) for first in range(0, rows, max(each, 1))]


torch.library.define(
    "qlora_native::linear_cross_entropy",
    "(Tensor hidden, Tensor labels, Tensor? weight, Tensor? codes, Tensor? absmax, Tensor? nested_absmax, "
    "Tensor? nested_code, Tensor? offset, Tensor? code, Tensor? minimum, Tensor? nested_minimum, Tensor? zero_point, "
    "int N, int K, int bits, int blocksize, int nested_blocksize, int byte_format, Tensor? bias, "
    "Tensor? lora_a, Tensor? lora_b, float lora_scaling, int ignore_index, float scale, float softcap, "
    "float label_smoothing, float z_loss, bool[] wanted, Tensor? row_gradients) -> "
    "(Tensor loss, Tensor log_probability, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor da, Tensor db)",
    tags=torch.Tag.pt2_compliant_tag,
)


@checks_memory
def _operands(
    hidden, labels, weight, codes, absmax, nested_absmax, nested_code, offset, code,
    minimum, nested_minimum, zero_point, N, K, bits, blocksize, nested_blocksize, byte_format,
    bias, lora_a, lora_b, lora_scaling, ignore_index, scale, softcap, label_smoothing, z_loss, wanted, row_gradients,
):  # fmt: skip
    """Check what the ops that this one calls do not check themselves.

    Returns:
        hidden, labels, the Head, the options that `cross_entropy_` takes before its gradient, wanted and row_gradients.
    """
    if (weight is None) == (codes is None) or (codes is None) != (absmax is None):
        raise bad_type("weight, codes, absmax", "a dense weight, or codes and absmax", "both, or a part of one")
    if weight is not None:
        _checked_dense(hidden, weight)
        N, K = weight.shape
    check_float_dtype("hidden", hidden.dtype)
    if N < 1 or K < 1:
        raise bad("N, K", "numbers above 0", f"{N}, {K}")
    if (lora_a is None) != (lora_b is None):
        raise bad("lora_a, lora_b", "both or neither", "one of them")
    for name, tensor, dtype in (("labels", labels, torch.int64), ("row_gradients", row_gradients, torch.float32)):
        if tensor is not None and tensor.dtype != dtype:
            raise bad_type(name, f"a tensor of {dtype}", tensor.dtype)
    T, rank = hidden.shape[:1], () if lora_a is None else lora_a.shape[:1]
    for name, tensor, shape in (
        ("hidden", hidden, (*T, K)),
        ("labels", labels, T),
        ("bias", bias, (N,)),
        ("lora_a", lora_a, (*rank, K)),
        ("lora_b", lora_b, (N, *rank)),
        ("row_gradients", row_gradients, T),
    ):
        if tensor is not None and tensor.shape != shape:
            raise bad(name, f"{list(shape)}", list(tensor.shape))
    given = [tensor is not None for tensor in (hidden, weight, bias, lora_a)]
    if len(wanted) != 4 or any(want and not has for want, has in zip(wanted, given, strict=True)):
        raise bad("wanted", f"four bools, at most {given}: of hidden, weight, bias and adapter", list(wanted))
    quantized = OpArguments(
        codes, absmax, nested_absmax, nested_code, offset, code, minimum, nested_minimum, zero_point,
        N, K, bits, blocksize, nested_blocksize, byte_format,
    )  # fmt: skip
    options = (ignore_index, scale, softcap, label_smoothing, z_loss)
    return hidden, labels, Head(weight, quantized, bias, lora_a, lora_b, lora_scaling), options, wanted, row_gradients


@torch.library.register_kernel("qlora_native::linear_cross_entropy", None)
def _linear_cross_entropy(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the loss [T], the log-probability of each label [T], and the gradients of the sum of the losses.

    `wanted` says which gradients: of hidden, a dense weight, the bias, the adapter; the others are empty tensors.
    `row_gradients` [T] are factors of the rows' gradients.
    """
    hidden, labels, head, loss_options, wanted, row_gradients = _operands(*arguments)
    note_use(hidden)
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    log_probability = torch.empty_like(loss)
    dhidden = hidden.new_empty(hidden.shape if wanted[0] else (0,))
    gradients = Gradients(head, hidden.shape[1], tuple(wanted[1:]), hidden)
    for rows in chunks(hidden.shape[0], head.vocabulary, hidden.dtype):
        x = hidden[rows]
        logits, u = head.logits(x)
        factors = None if row_gradients is None else row_gradients[rows]
        loss[rows], log_probability[rows] = _ops.cross_entropy_(
            logits, labels[rows], *loss_options, any(wanted), factors
        )
        if not any(wanted):
            continue
        v = None
        if wanted[0] or wanted[3]:
            dx, v = head.hidden_gradient(logits)
            if wanted[0]:
                dhidden[rows] = dx
        gradients.add(x, logits, u, v)
        del logits  # so that two chunks never exist at once
    return (loss, log_probability, dhidden, *gradients.results())


@torch.library.register_fake("qlora_native::linear_cross_entropy")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, _, head, _, wanted, _ = _operands(*arguments)
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if wanted[0] else (0,))
    return (
        loss,
        torch.empty_like(loss),
        dhidden,
        *Gradients(head, hidden.shape[1], tuple(wanted[1:]), hidden).results(),
    )


refuse_second_derivative("linear_cross_entropy", "linear_cross_entropy")

# The positions, among the op's arguments, of the tensors that may be trained.
_ARGUMENTS = [each.name for each in torch.ops.qlora_native.linear_cross_entropy.default._schema.arguments]
_LABELS = _ARGUMENTS.index("labels")
_HIDDEN, _WEIGHT, _BIAS, _LORA_A, _LORA_B = map(_ARGUMENTS.index, ("hidden", "weight", "bias", "lora_a", "lora_b"))


class _DifferentiatedOnce(torch.autograd.Function):
    """Returns a gradient that was computed with the loss. What it depends on is gone, so its derivative is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        """Return a view of `gradient`. The other tensor requires gradients, so that the result does."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        """Raise an error.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(second_derivative_error("linear_cross_entropy"))


class LinearCrossEntropy(torch.autograd.Function):
    """The op with its gradients.

    Takes `reduction`, the number of rows of a mean, and then the op's arguments up to `z_loss`. Returns the loss,
    reduced or [T], and the log-probabilities [T], which are not differentiable.
    """

    @staticmethod
    def forward(ctx: Any, reduction: str, count: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Compute the loss. `count`, fp32 [] or None, divides each row's loss: the rows of the mean."""
        needed = ctx.needs_input_grad[2:]
        wanted = [needed[_HIDDEN], needed[_WEIGHT], needed[_BIAS], needed[_LORA_A] or needed[_LORA_B]]
        now = wanted if reduction != "none" else [False] * 4
        power = factors = None
        if count is not None:
            power = torch.exp2(count.clamp(min=1).log2().floor())  # backward divides by it
            factors = (power / count).expand_as(arguments[_LABELS]).contiguous()
        loss, log_probability, *gradients = torch.ops.qlora_native.linear_cross_entropy(*arguments, now, factors)
        ctx.mark_non_differentiable(log_probability)
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.wanted = reduction, wanted
        if reduction == "none":
            ctx.tensors = [i for i, each in enumerate(arguments) if isinstance(each, Tensor)]
            ctx.others = [None if i in ctx.tensors else each for i, each in enumerate(arguments)]
            ctx.save_for_backward(*(arguments[i] for i in ctx.tensors))
            return loss, log_probability
        ctx.save_for_backward(power, *gradients)
        return (loss if count is None else loss / count).sum(), log_probability

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: Any) -> tuple[Any, ...]:
        """Return the gradients of hidden, weight, bias, lora_a and lora_b, None for all other arguments."""
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dloss is None or not any(ctx.wanted):
            return tuple(results)
        check_memory("dloss", dloss)
        if ctx.reduction == "none":
            arguments = list(ctx.others)
            for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                arguments[i] = tensor
            row_gradients = dloss.float().contiguous()
            gradients = torch.ops.qlora_native.linear_cross_entropy(*arguments, ctx.wanted, row_gradients)[2:]
        else:
            power, *gradients = ctx.saved_tensors
            scale = dloss.float() if power is None else dloss.float() / power
            # In fp32: of GradScaler's factor fp16 would make infinity.
            gradients = [(gradient.float() * scale).to(gradient.dtype) for gradient in gradients]
            if torch.is_grad_enabled():  # create_graph=True
                marker = dloss.detach().requires_grad_()
                gradients = [_DifferentiatedOnce.apply(gradient, marker) for gradient in gradients]
        for place, gradient in zip((_HIDDEN, _WEIGHT, _BIAS, _LORA_A, _LORA_B), gradients, strict=True):
            if ctx.needs_input_grad[2 + place]:
                results[2 + place] = gradient
        return tuple(results)
