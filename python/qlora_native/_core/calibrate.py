"""What calibrated quantization computes on the CPU: second moments of inputs, scales that suit them, error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the ops)
from .blocks import ceil_div
from .errors import bad, bad_type, check_float_dtype, checks_memory, is_finite_number

_ops = torch.ops.qlora_native
_MAX_STEPS = 1024  # kMaxScaleSteps of cpp/src/common/calibration.h


@checks_memory
def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to `gram`, in place and in fp32.

    The result is exactly symmetric, and has the same bits for any number of threads. Rows are added in chains of 256.

    Args:
        gram: fp32 [K, K], contiguous and symmetric: what stands below its diagonal is not read, but overwritten.
        x: [..., K] in fp32, bf16 or fp16, the inputs of a layer. It is copied if its rows are not contiguous.

    Raises:
        TypeError: no tensors, or another dtype.
        ValueError: another shape, other strides of `gram`, or a tensor that is not on the CPU.
    """
    _check_on_cpu("gram", gram)
    _check_on_cpu("x", x)
    check_float_dtype("x", x.dtype)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise bad("x", "[..., K] with K >= 1", list(x.shape))
    K = x.shape[-1]
    _check_fp32("gram", gram, K, K)
    _ops.gram(gram, x.detach().reshape(-1, K))


@checks_memory
def weighted_scales(
    weight: Tensor,
    importance: Tensor,
    code: Tensor | None,
    *,
    blocksize: int = 64,
    lo: float = 0.5,
    hi: float = 1.15,
    steps: int = 40,
) -> Tensor:
    """Return for each block of a weight the scale with the least error, weighted by the importance of its columns.

    The error is the sum of importance[k] * (w - decoded)^2. With importance = diag(X^T X) it is that of the layer's
    output for uncorrelated inputs.

    Args:
        weight: fp32 [N, K], contiguous, finite.
        importance: fp32 [K], finite and at least 0. A block in which all of it is 0 has equally important elements.
        code: fp32 [16], the codebook of a 4-bit format; None is 8 bits.
        blocksize: elements of the flat weight that share a scale, a power of two in 16 ... 4096.
        lo: the first candidate, as a part of the block's absmax; greater than 0.
        hi: the last one, at least `lo`.
        steps: how many candidates there are, equally spaced. Of equal errors the first wins.

    Returns:
        fp32 [ceil(N * K / blocksize)]; 0 for a block of zeros.

    Raises:
        TypeError: no tensors, or another dtype.
        ValueError: another shape or device, a bad number, or a NaN or Inf.
    """
    bits = _check_weight(weight, code, blocksize)
    _check_fp32("importance", importance, weight.shape[1])
    for name, value in (("lo", lo), ("hi", hi)):
        if not is_finite_number(value):
            raise bad(name, "a finite number", value)
    if type(steps) is not int or not 1 <= steps <= _MAX_STEPS:
        raise bad("steps", f"an int in 1 ... {_MAX_STEPS}", steps)
    return _ops.weighted_scales(weight.detach(), importance, code, bits, blocksize, lo, hi, steps)


@checks_memory
def quantize_with_feedback(
    weight: Tensor, order: Tensor, factor: Tensor, scales: Tensor, code: Tensor | None, *, blocksize: int = 64
) -> Tensor:
    """Return the codes of a weight for given scales, by error feedback (Frantar et al., "GPTQ", algorithm 1).

    Columns are quantized in the given order, and what one loses is added to those that follow. All arithmetic is fp32.

    Args:
        weight: fp32 [N, K], contiguous, finite.
        order: int64 [K], a permutation of the columns.
        factor: fp32 [K, K], the upper Cholesky factor of the inverse of the damped x^T x, whose rows and columns are in
            this order. What stands below its diagonal is not read. It is copied if it is not contiguous.
        scales: fp32 [ceil(N * K / blocksize)], finite: the stored ones, as they decode. They may be negative or 0.
        code: fp32 [16], the codebook of a 4-bit format; None is 8 bits.
        blocksize: elements of the flat weight that share a scale, a power of two in 16 ... 4096.

    Returns:
        uint8 [ceil(N * K / 2)], or [N * K] with 8 bits, as `QuantizedWeight.codes` has them in its shape.

    Raises:
        TypeError: no tensors, or another dtype.
        ValueError: another shape or device, a NaN or Inf, an `order` that is no permutation, a `factor` whose diagonal
            is not above 0, or one so ill-conditioned that what is fed back becomes infinite.
    """
    bits = _check_weight(weight, code, blocksize)
    N, K = weight.shape
    _check_on_cpu("order", order)
    if order.dtype != torch.int64:
        raise bad_type("order", "torch.int64", order.dtype)
    if order.shape != (K,):
        raise bad("order", f"[{K}]", list(order.shape))
    _check_fp32("factor", factor, K, K, contiguous=False)
    _check_fp32("scales", scales, ceil_div(N * K, blocksize))
    operands = (order.contiguous(), factor.contiguous(), scales)
    return _ops.quantize_with_feedback(weight.detach(), *operands, code, bits, blocksize)


def _check_on_cpu(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise bad_type(name, "a tensor", type(tensor).__name__)
    if tensor.device.type not in ("cpu", "meta"):
        raise bad(name, "a tensor on the CPU, which alone has this operation", f"one on {tensor.device}")


def _check_fp32(name: str, tensor: Tensor, *shape: int, contiguous: bool = True) -> None:
    _check_on_cpu(name, tensor)
    if tensor.dtype != torch.float32:
        raise bad_type(name, "torch.float32", tensor.dtype)
    if tensor.shape != shape:
        raise bad(name, str(list(shape)), list(tensor.shape))
    if contiguous and not tensor.is_contiguous():
        raise bad(name, "a contiguous tensor", f"strides {list(tensor.stride())}")


def _check_weight(weight: Tensor, code: Tensor | None, blocksize: int) -> int:
    """Check a weight and the format of its codes, and return the bits of a code."""
    if not isinstance(weight, Tensor):
        raise bad_type("weight", "a tensor", type(weight).__name__)
    if weight.dim() != 2 or weight.numel() == 0:
        raise bad("weight", "[N, K], each at least 1", list(weight.shape))
    _check_fp32("weight", weight, *weight.shape)
    if type(blocksize) is not int:
        raise bad_type("blocksize", "an int", type(blocksize).__name__)
    if not 16 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise bad("blocksize", "a power of two, 16 ... 4096", blocksize)
    if code is None:
        return 8
    _check_fp32("code", code, 16)
    return 4


# ---- fakes ----


@torch.library.register_fake("qlora_native::gram")
def _(gram, x):
    return None


@torch.library.register_fake("qlora_native::weighted_scales")
def _(weight, importance, code, bits, blocksize, lo, hi, steps):
    return weight.new_empty((ceil_div(weight.numel(), blocksize),))


@torch.library.register_fake("qlora_native::quantize_with_feedback")
def _(weight, order, factor, scales, code, bits, blocksize):
    elements = weight.numel()
    return weight.new_empty((elements if bits == 8 else ceil_div(elements, 2),), dtype=torch.uint8)
