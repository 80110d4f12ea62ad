"""What a calibration has done, layer by layer."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

SHOWN = 10  # So many fallbacks are printed.
BUDGETED = ("nf4", "fp4")  # These formats take a budget; what it gives more bits has another.


@dataclass(frozen=True)
class Calibrated:
    """One weight.

    Attributes:
        name: the path of its layer; of an expert, with its index.
        tokens: the rows of X that were observed.
        before, after: the error of the layer's output by plain rounding and by calibration, ‖X (W − Q)ᵀ‖ / ‖X Wᵀ‖; of a
            weight that a budget gave more bits, as it was before it got them.
        fallback: why the weight was rounded plainly; None if it was calibrated, or if a budget gave it more bits.
        format: of the weight as it is: one of `qlora_native.quantize`, or the dtype of a weight that was not quantized.
        sensitivity: with a budget, how far the output of its transformer layer moves if this weight alone is rounded
            plainly, as the mean over tokens of ‖ΔY‖² / ‖Y‖²: in the format of the model, and in 8 bits if it may have
            them. None for experts, and for weights outside the layers that are run one after another.
    """

    name: str
    tokens: int
    before: float
    after: float
    fallback: str | None = None
    format: str = "nf4"
    sensitivity: tuple[float, ...] | None = None


@dataclass
class CalibrationReport:
    """What `qlora_native.calibrate` has done. `print` shows a summary.

    Attributes:
        weights: every weight, in the order in which they were quantized; with a budget some have a format of more bits.
        seconds: how long it took.
        bits: with a budget, the mean bits of an element of all weights, with scales and tables.
    """

    weights: list[Calibrated] = field(default_factory=list)
    seconds: float = 0.0
    bits: float | None = None

    @property
    def fallbacks(self) -> list[Calibrated]:
        """The weights that were rounded plainly."""
        return [each for each in self.weights if each.fallback is not None]

    def __str__(self) -> str:
        """A few lines: how many weights, the median error of their outputs, their formats, and the first fallbacks."""
        raised = [] if self.bits is None else [each for each in self.weights if each.format not in BUDGETED]
        done = [each for each in self.weights if each.fallback is None and each not in raised]
        lines = [f"calibrated {len(done)} of {len(self.weights)} weights in {self.seconds:.0f} s"]
        if done:
            before, after = (statistics.median(getattr(each, name) for each in done) for name in ("before", "after"))
            lines.append(f"error of a layer's output, median: {before:.2%} by plain rounding, {after:.2%} calibrated")
        if self.bits is not None:
            formats = Counter(each.format for each in self.weights).most_common()
            counted = ", ".join(f"{count} weights in {name}" for name, count in formats)
            lines.append(f"{self.bits:.2f} bits an element: {counted}")
        lines += [f"rounded plainly: {each.name}: {each.fallback}" for each in self.fallbacks[:SHOWN]]
        if self.fallbacks[SHOWN:]:
            lines.append(f"rounded plainly: {len(self.fallbacks) - SHOWN} more (report.fallbacks has them)")
        return "\n".join(lines)
