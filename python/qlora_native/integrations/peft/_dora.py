"""The row norms of W + s B A, by which DoRA divides, computed without decoding W at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import functional
from ...nn import Linear4bit


class RowNorms:
    """The norms of the rows of W + s B A of one layer, while its adapter is trained.

        |w + s b A|^2 = |w|^2 + 2 s (A w) . b + s^2 b (A A^T) b^T       w: a row of W [N, K], b: a row of B [N, r]

    The first term does not depend on the adapter and is kept from one call to the next. A W^T is a 4-bit product of r
    rows. So only the first call decodes W.
    """

    def __init__(self) -> None:
        """Start without a weight, which the first call sets."""
        self._squares: Tensor | None = None  # |w|^2, fp32 [N], of the weight described by:
        self._of: list[tuple[Tensor, int, int]] = []  # (tensor, address, version)

    @torch.no_grad()
    def __call__(self, layer: Linear4bit, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """Compute the norms, fp32 [N], for `lora_a` [r, K] and `lora_b` [N, r]. They are not differentiable."""
        squares = self._squares_of(layer)
        a, b = lora_a.detach().float(), lora_b.detach().float()
        with torch.autocast(a.device.type, enabled=False):
            cross = functional.linear(a, layer.quantized_weight).t() * b
            own = (b @ (a @ a.t())) * b
        return (squares + (2 * scaling * cross + scaling**2 * own).sum(dim=1)).clamp(min=0).sqrt()

    def _squares_of(self, layer: Linear4bit) -> Tensor:
        # A weight that was replaced or overwritten has other tensors, other memory or another version. References to
        # the old tensors are kept, so that no new tensor can get their address.
        of = [(t, t.data_ptr(), 0 if t.is_inference() else t._version) for t in layer.weight_tensors().values()]
        same = len(of) == len(self._of) and all(
            new[0] is old[0] and new[1:] == old[1:] for new, old in zip(of, self._of, strict=True)
        )
        if not same:
            self._squares, self._of = layer.dequantize(torch.float32).square().sum(dim=1), of
        return self._squares
