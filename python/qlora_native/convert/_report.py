"""`Report`: what a conversion of files did, and the error of its rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS = 64  # rows of a weight that enter a norm at once: at most a few MB


@dataclass
class Report:
    """What a conversion did, and the error of its rounding.

    Attributes:
        merged, quantized: the number of layers that an adapter changed, and that were quantized.
        bytes: the size of all tensors written.
        errors: {layer: |Q(W) - W| / |W|} in Frobenius norms, where W is the weight before it was quantized to Q(W).
        notes: sentences for a reader of the files.
        squares: sums of squares for the total errors. "error" and "weight" are of quantized layers: of Q(W) - W, and of
            W. "missed" and "delta" are of all tensors of a merge: of what was written minus what the trained model has,
            and of what it has minus the base.
    """

    merged: int = 0
    quantized: int = 0
    bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("error", "weight", "missed", "delta"), 0.0)
    )
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

    def add_written(self, written: Tensor, base: Tensor, trained: Tensor) -> None:
        """Count a tensor of a merge, of one shape; but the base may have another number of rows.

        Args:
            written: its values as they were written.
            base: its values in the base.
            trained: its values in the model that was trained.
        """
        written, base, trained = map(torch.atleast_1d, (written, base, trained))
        rows = min(len(base), len(trained))
        self.squares["missed"] += square(written, trained)
        self.squares["delta"] += square(trained[:rows], base[:rows]) + square(trained[rows:])

    @property
    def error(self) -> float:
        """|Q(W) - W| / |W| over all quantized layers together."""
        return math.sqrt(self.squares["error"] / max(self.squares["weight"], 1e-300))

    @property
    def error_of_delta(self) -> float | None:
        """|written - trained| over |trained - base|, all tensors together; None if the adapter changed nothing."""
        delta = self.squares["delta"]
        return math.sqrt(self.squares["missed"] / delta) if delta else None

    def __str__(self) -> str:
        """A few lines for a terminal."""
        done = [f"{verb} {n} layers" for verb, n in (("merged", self.merged), ("quantized", self.quantized)) if n]
        text = ", ".join([*done, f"wrote {self.bytes:,} bytes"])
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            text += f"\nerror of rounding, relative to the weights: {self.error:.4f} in all, "
            text += f"{self.errors[worst]:.4f} in {worst}"
        if self.error_of_delta is not None:
            text += f"\nerror of all that was written, relative to what the adapter added: {self.error_of_delta:.3f}"
        return "\n".join([text, *self.notes])


def square(tensor: Tensor, other: Tensor | None = None) -> float:
    """The sum of squares of `tensor`, or of its difference from `other`, added up in float64, ROWS rows at a time."""
    total = 0.0
    rows_of = [t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (tensor, other) if t is not None]
    for start in range(0, len(rows_of[0]), ROWS):
        rows, *others = (t[start : start + ROWS].float() for t in rows_of)
        total += (rows - others[0] if others else rows).square().sum(dim=-1).double().sum().item()
    return total
