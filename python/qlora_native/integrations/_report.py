"""`Report`: what a conversion of files did, and the error of its rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

ROWS = 64  # rows of a weight that enter a norm at once: at most a few MB


@dataclass
class Report:
    """What a conversion did, and the error of its rounding.

    Attributes:
        merged, quantized: the number of layers that were merged and quantized.
        bytes: the size of all tensors written.
        errors: {layer: |Q(W) - W| / |W|} in Frobenius norms, where W is the weight before it was quantized to Q(W).
        notes: sentences for a reader of the files.
        squares: sums of squares of the differences, of the weights and of the adapter's changes, for the total errors.
    """

    merged: int = 0
    quantized: int = 0
    bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=lambda: {"error": 0.0, "weight": 0.0, "delta": 0.0})
    notes: list[str] = field(default_factory=list)

    def add_rounding(self, layer: str, rounded: Tensor, weight: Tensor) -> None:
        """Count a quantized layer, and the error of its rounding.

        Args:
            layer: its name.
            rounded: the decoded quantized weight [N, K].
            weight: the weight before [N, K].
        """
        error, norm = square(rounded, weight), square(weight)
        self.quantized += 1
        self.errors[layer] = math.sqrt(error / max(norm, 1e-300))
        self.squares["error"] += error
        self.squares["weight"] += norm

    @property
    def error(self) -> float:
        """|Q(W) - W| / |W| over all quantized layers together."""
        return math.sqrt(self.squares["error"] / max(self.squares["weight"], 1e-300))

    @property
    def error_of_delta(self) -> float | None:
        """|Q(W) - W| over the norm of the adapter's change, all layers together; None if it changed nothing."""
        delta = self.squares["delta"]
        return math.sqrt(self.squares["error"] / delta) if delta else None

    def __str__(self) -> str:
        """A few lines for a terminal."""
        done = [f"{verb} {n} layers" for verb, n in (("merged", self.merged), ("quantized", self.quantized)) if n]
        text = ", ".join([*(done or ["changed no layer"]), f"wrote {self.bytes:,} bytes"])
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            text += f"\nerror of rounding, relative to the weights: {self.error:.4f} in all, "
            text += f"{self.errors[worst]:.4f} in {worst}"
        if self.error_of_delta is not None:
            text += f"\nthe same, relative to what the adapter added: {self.error_of_delta:.3f}"
        return "\n".join([text, *self.notes])


def square(tensor: Tensor, other: Tensor | None = None) -> float:
    """The sum of squares of `tensor`, or of its difference from `other`, added up in float64, ROWS rows at a time."""
    total = 0.0
    for start in range(0, len(tensor), ROWS):
        rows = tensor[start : start + ROWS].float()
        if other is not None:
            rows = rows - other[start : start + ROWS].float()
        total += rows.square().sum(dim=-1).double().sum().item()
    return total
