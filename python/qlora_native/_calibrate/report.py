"""What a calibration has done, layer by layer."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

SHOWN = 10  # fallbacks


@dataclass(frozen=True)
class Calibrated:
    """One weight.

    Attributes:
        name: the path of its layer; of an expert, with its index.
        tokens: the rows of X that were observed.
        before, after: the error of the layer's output by plain rounding and as it is, ‖X (W − Q)ᵀ‖ / ‖X Wᵀ‖.
        fallback: why the weight was rounded plainly; None if it was calibrated.
    """

    name: str
    tokens: int
    before: float
    after: float
    fallback: str | None = None


@dataclass
class CalibrationReport:
    """What `qlora_native.calibrate` has done. `print` shows a summary.

    Attributes:
        weights: every quantized weight, in the order in which they were quantized.
        seconds: how long it took.
    """

    weights: list[Calibrated] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fallbacks(self) -> list[Calibrated]:
        """The weights that were rounded plainly."""
        return [each for each in self.weights if each.fallback is not None]

    def __str__(self) -> str:
        """A few lines: how many weights, the median error of their outputs, and the first fallbacks."""
        done = [each for each in self.weights if each.fallback is None]
        lines = [f"calibrated {len(done)} of {len(self.weights)} weights in {self.seconds:.0f} s"]
        if done:
            before, after = (statistics.median(getattr(each, name) for each in done) for name in ("before", "after"))
            lines.append(f"error of a layer's output, median: {before:.2%} by plain rounding, {after:.2%} calibrated")
        lines += [f"rounded plainly: {each.name}: {each.fallback}" for each in self.fallbacks[:SHOWN]]
        if self.fallbacks[SHOWN:]:
            lines.append(f"rounded plainly: {len(self.fallbacks) - SHOWN} more (report.fallbacks has them)")
        return "\n".join(lines)
