"""The layer that makes logits: its products, and the gradients of what is trained in it.

A dense weight is multiplied by torch or, in 16 bits on a CPU without instructions for them, by torch in fp32. There
torch widens an element wherever it multiplies it: on an Intel Xeon (Ice Lake), [256, 49152] times [49152, 576] takes 4
times as long in bf16 as in fp32, and 500 times in fp16. So panels of the weight are widened once each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from .ops import OpArguments

_ops = torch.ops.qlora_native
# Bytes of a panel, at most, and of what it is multiplied by or gives. It is multiplied out of a cache.
PANEL_BYTES = 4 << 20
# Rows of a weight's gradient that torch computes at once, rounded, before they are added.
_GRADIENT_ROWS = 4096


def has_instructions(x: Tensor) -> bool:
    """Whether torch has instructions for products of the dtype of x where x is."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return True
    if x.dtype == torch.bfloat16:
        return _C.current_isa().endswith("_bf16")
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)  # torch may be built without oneDNN
    return supported is not None and supported()


def _panels(w: Tensor, M: int) -> Iterator[slice]:
    """Cut the rows of w [N, K] into panels, which M rows are multiplied by."""
    N, K = w.shape
    rows = max(PANEL_BYTES // (4 * max(K, M)), 1)
    return (slice(first, min(first + rows, N)) for first in range(0, N, rows))


# Autocast would round the operands of products in fp32.
@torch.autocast("cpu", enabled=False)
def _product_nt(
    x: Tensor, w: Tensor, bias: Tensor | None = None, u: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """Compute x @ w.T + bias + u @ b.T, [M, N], of x [M, K], w [N, K], bias [N], u [M, rank] and b [N, rank]."""
    if has_instructions(x):
        y = torch.nn.functional.linear(x, w, bias)
        return y if u is None else y.addmm_(u, b.T)
    y = x.new_empty(x.shape[0], w.shape[0])
    x, u = x.float(), None if u is None else u.float()
    for rows in _panels(w, x.shape[0]):
        part = x @ w[rows].float().T
        if u is not None:
            part.addmm_(u, b[rows].float().T)
        y[:, rows] = part if bias is None else part.add_(bias[rows])
    return y


@torch.autocast("cpu", enabled=False)
def _product_nn(x: Tensor, w: Tensor, v: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """Compute x @ w + v @ a, [M, K], of x [M, N], w [N, K], v [M, rank] and a [rank, K]."""
    if has_instructions(x):
        y = x @ w
        return y if v is None else y.addmm_(v, a)
    y = x.new_zeros(x.shape[0], w.shape[1], dtype=torch.float32) if v is None else v.float() @ a.float()
    for rows in _panels(w, x.shape[0]):
        y.addmm_(x[:, rows].float(), w[rows].float())
    return y.to(x.dtype)


@torch.autocast("cpu", enabled=False)
def _add_product_tn(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x.T @ y to `total`, fp32 [N, K], of x [M, N] and y [M, K], some rows of `total` at once."""
    if has_instructions(x):
        for first in range(0, total.shape[0], _GRADIENT_ROWS):
            total[first : first + _GRADIENT_ROWS] += x[:, first : first + _GRADIENT_ROWS].T @ y
        return
    y = y.float()
    for rows in _panels(total, x.shape[0]):
        total[rows].addmm_(x[:, rows].T.float(), y)


@dataclass
class Head:
    """The layer that makes logits: a dense weight [V, K] or a quantized one, a bias [V], an adapter."""

    dense: Tensor | None
    quantized: OpArguments
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float

    @property
    def vocabulary(self) -> int:
        """V, the number of logits of a row."""
        return self.quantized.N if self.dense is None else self.dense.shape[0]

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute logits [rows, V], and U [rows, rank] if there is an adapter."""
        if self.dense is None:
            lora = (self.lora_a, self.lora_b, self.scaling, 0.0, None)
            y, u = _ops.linear_forward(x, *self.quantized, self.bias, *lora)
            return y, (None if self.lora_a is None else u)
        if self.lora_a is None:
            return _product_nt(x, self.dense, self.bias), None
        u = _product_nt(x, self.lora_a.to(x.dtype))
        return _product_nt(x, self.dense, self.bias, u, (self.scaling * self.lora_b).to(x.dtype)), u

    def hidden_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the gradient of x [rows, K], and V [rows, rank] if there is an adapter."""
        if self.dense is None:
            dx, v = _ops.linear_backward_input(
                dy, *self.quantized, self.lora_a, self.lora_b, self.scaling, 0.0, None, True
            )
            return dx, (None if self.lora_a is None else v)
        if self.lora_a is None:
            return _product_nn(dy, self.dense), None
        v = _product_nn(dy, (self.scaling * self.lora_b).to(dy.dtype))
        return _product_nn(dy, self.dense, v, self.lora_a.to(dy.dtype)), v


class Gradients:
    """fp32 accumulators, over chunks, of the gradients that are wanted: of a dense weight, the bias and the adapter."""

    def __init__(self, head: Head, K: int, wanted: tuple[bool, bool, bool], like: Tensor) -> None:
        """Start at zero. `wanted` says which of weight, bias and adapter have one; the others are empty tensors."""

        def zeros(wanted: bool, *shape: int) -> Tensor:
            return like.new_zeros(shape if wanted else (0,), dtype=torch.float32)

        rank = head.lora_a.shape[0] if head.lora_a is not None else 0
        self.head, (weight, bias, adapter) = head, wanted
        self.weight = zeros(weight, head.vocabulary, K)
        self.bias = zeros(bias, head.vocabulary)
        self.a, self.b = zeros(adapter, rank, K), zeros(adapter, head.vocabulary, rank)
        self.wanted = wanted

    def add(self, x: Tensor, dy: Tensor, u: Tensor | None, v: Tensor | None) -> None:
        """Add the gradients of a chunk: x [rows, K], dy [rows, V], and the adapter's U and V [rows, rank]."""
        weight, bias, adapter = self.wanted
        if weight:
            _add_product_tn(self.weight, dy, x)
        if bias:
            self.bias += dy.sum(0, dtype=torch.float32)
        if adapter:
            da, db = _ops.lora_gradients(x, dy, u, v, self.head.scaling, 0.0, None, torch.float32)
            self.a += da
            self.b += db

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of weight, bias, A and B, each rounded to the dtype of its tensor."""
        head = self.head
        of = (head.dense, head.bias, head.lora_a, head.lora_b)
        accumulators = (self.weight, self.bias, self.a, self.b)
        return tuple(a if t is None else a.to(t.dtype) for a, t in zip(accumulators, of, strict=True))  # type: ignore[return-value]
