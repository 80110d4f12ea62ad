"""The row norms of W + s B A that DoRA divides by, without a decoded W."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..nn import Linear4bit

__all__ = ["RowNorms"]


class RowNorms:
    """Norms of the rows of W + s B A, of one layer, for an adapter that is being trained.

        |w + s b A|^2 = |w|^2 + 2 s (A w) . b + s^2 b (A A^T) b^T       w a row of W [N, K], b one of B [N, r]

    The first term does not change with the adapter, and is kept from one call to the next; A W^T is a 4-bit product
    of r rows. So W is decoded once, for the first call, and not at every step.
    """

    def __init__(self) -> None:
        """Start without a weight: the first call brings it."""
        self._squares: Tensor | None = None  # fp32 [N], of the weight with these tensors, memory and versions:
        self._of: list[tuple[Tensor, int, int]] = []

    @torch.no_grad()
    def __call__(self, layer: Linear4bit, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """fp32 [N], for `lora_a` [r, K] and `lora_b` [N, r], which are read and not differentiated through."""
        squares = self._squares_of(layer)
        a, b = lora_a.detach().float(), lora_b.detach().float()
        with torch.autocast(a.device.type, enabled=False):
            cross = functional.linear(a, layer.quantized_weight).t() * b
            own = (b @ (a @ a.t())) * b
        return (squares + (2 * scaling * cross + scaling**2 * own).sum(dim=1)).clamp(min=0).sqrt()

    def _squares_of(self, layer: Linear4bit) -> Tensor:
        # What replaces or overwrites a weight gives it other tensors, other memory or another version. The tensors are
        # held on to, so that no others can come to lie where they were.
        of = [(t, t.data_ptr(), 0 if t.is_inference() else t._version) for t in layer.weight_tensors().values()]
        same = len(of) == len(self._of) and all(
            new[0] is old[0] and new[1:] == old[1:] for new, old in zip(of, self._of, strict=True)
        )
        if not same:
            self._squares, self._of = layer.dequantize(torch.float32).square().sum(dim=1), of
        return self._squares
