"""Check the operands of the products and convert them to what the ops take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import FLOAT_DTYPES, bad, bad_type, check_float_dtype, check_local, check_memory, is_finite
from .weight import QuantizedWeight


def draw_seed(x: Tensor) -> Tensor:
    """Draw the seed of one dropout mask, int64 [].

    It is drawn on the CPU, which costs no kernel launch. If `x` is on a GPU and the call is compiled or captured into a
    CUDA graph, it is drawn on that GPU, so that each replay of the graph draws a new one.
    """
    on_gpu = x.is_cuda and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device if on_gpu else "cpu")


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor`, which errors call `name`, contiguous and in `dtype`.

    Its memory is checked before torch reads it, which does not check; where there is nothing to convert, our op does.
    """
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    check_memory(name, tensor)
    return tensor.to(dtype).contiguous()


def checked_input(x: Tensor, q: QuantizedWeight, max_dimensions: int, name: str = "x") -> Tensor:
    """Check `x` [..., K], which errors call `name`, and cast it as autocast does."""
    if not isinstance(q, QuantizedWeight):
        raise bad_type("q", "a QuantizedWeight", type(q).__name__)
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    check_local(name, x)
    if len(q.shape) > max_dimensions:
        raise bad("q", "a weight [N, K]; linear_grouped multiplies by several", list(q.shape))
    device = q.codes.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and x.dtype in FLOAT_DTYPES:
        check_memory(name, x)
        x = x.to(torch.get_autocast_dtype(device.type))
    K = q.shape[-1]
    if x.dtype not in FLOAT_DTYPES:
        check_float_dtype(name, x.dtype)
    if x.dim() == 0 or x.shape[-1] != K:
        raise bad(name, f"[..., {K}] for a weight {list(q.shape)}", list(x.shape))
    if x.device != device:
        raise bad(name, f"a tensor on {device}, where the weight is", x.device)
    return x


def checked_bias(bias: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Check `bias`, and return it contiguous and in the dtype of x."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise bad_type("bias", "a floating-point tensor", getattr(bias, "dtype", type(bias).__name__))
    if bias.shape != shape:
        raise bad("bias", list(shape), list(bias.shape))
    if bias.device != x.device:
        raise bad("bias", f"a tensor on {x.device}, where x is", bias.device)
    return converted("bias", bias, x.dtype)


def checked_lora(
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float | Tensor,
    dropout: float,
    weight_shape: tuple[int, int],
    x: Tensor,
    batch: tuple[int, ...] = (),
) -> tuple[Tensor | None, Tensor | None, float, float, Tensor | None]:
    """Check the adapter, and return its five op arguments: A and B contiguous, scaling, dropout, seed.

    Args:
        scaling: a number; or a tensor, which B is multiplied by, because an op takes a number, which is compiled in.
        batch: (count,) for a stack of adapters, A [count, rank, K] and B [count, N, rank]; () for a single one.
    """
    if not 0 <= dropout < 1:
        raise bad("lora_dropout", "a probability in [0, 1)", dropout)
    if lora_a is None and lora_b is None:
        return None, None, 1.0, dropout, None
    N, K = weight_shape
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(tensor, Tensor):
            raise bad_type(name, "a tensor, as lora_a and lora_b are given together", type(tensor).__name__)
        check_float_dtype(name, tensor.dtype)
        if tensor.device != x.device:
            raise bad(name, f"a tensor on {x.device}, where the weight is", tensor.device)
    count = "".join(f"{each}, " for each in batch)
    if lora_a.dim() != len(batch) + 2 or lora_a.shape[-1] != K or lora_a.shape[:-2] != batch:
        raise bad("lora_a", f"[{count}rank, {K}]", list(lora_a.shape))
    rank = lora_a.shape[-2]
    if lora_b.shape != (*batch, N, rank):
        raise bad("lora_b", f"[{count}{N}, {rank}], the rank of lora_a", list(lora_b.shape))
    if lora_b.dtype != lora_a.dtype:
        raise bad_type("lora_b", f"{lora_a.dtype}, the dtype of lora_a", lora_b.dtype)
    if isinstance(scaling, Tensor):
        if scaling.dim() or not scaling.is_floating_point():
            raise bad("lora_scaling", "a number or a tensor [] of one", f"{scaling.dtype} {list(scaling.shape)}")
        check_memory("lora_b", lora_b)
        check_memory("lora_scaling", scaling)
        lora_b, scaling = lora_b * scaling, 1.0
    elif not is_finite(scaling):
        raise bad("lora_scaling", "a finite number", scaling)
    lora_a, lora_b = converted("lora_a", lora_a, lora_a.dtype), converted("lora_b", lora_b, lora_b.dtype)
    return lora_a, lora_b, scaling, dropout, draw_seed(x) if dropout > 0 else None


def in_stored_order(q: QuantizedWeight, x: Tensor, lora: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """Put the columns of x [..., K], and of A in `lora`, into the order in which `q` stores those of W.

    A product does not depend on the order of its terms, so Y stays the same, and autograd returns the gradients of x
    and A in the order of the weight. No index occurs twice, so the gradients do not depend on the order of additions.
    """
    if q.column_order is None:
        return x, lora
    lora_a = lora[0]
    check_memory("x", x)
    if lora_a is not None:
        check_memory("lora_a", lora_a)
        lora_a = lora_a.index_select(-1, q.column_order)
    return x.index_select(-1, q.column_order), (lora_a, *lora[1:])
