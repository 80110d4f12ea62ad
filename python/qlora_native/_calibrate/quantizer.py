"""Quantize the weights whose inputs were observed, and report each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .._core.errors import weight_named
from .._core.weight import QuantizedWeight
from .experts import ObservedExperts
from .feedback import Factored, Options, calibrated, factored, output_errors
from .observe import check_finite_gram
from .report import Calibrated, CalibrationReport

FEW_TOKENS = 4  # an expert needs a token for so many of its columns


class Quantizer:
    """Quantizes weights for observed inputs, and to the nearest levels where these do not suffice.

    Attributes:
        report: of each weight.
    """

    def __init__(self, options: Options, sensitivity: Mapping[str, tuple[float, ...]]) -> None:
        """Take the format, and how far each weight moves its layer, as far as that is known when it is quantized."""
        self.report = CalibrationReport()
        self._options, self._sensitivity = options, sensitivity

    def linear(
        self, name: str, weight: Tensor, gram: Tensor | None, found: Factored | None, tokens: int
    ) -> QuantizedWeight:
        """Quantize a linear layer's weight, and report it."""
        plain, q = self._both(f"{name}.", weight, [found])
        errors = output_errors(weight, gram, plain, q) if found is not None else [0.0, 0.0]
        self._report(name, tokens, errors, None if found is not None else _why_not(gram), q)
        return q

    def experts(self, name: str, experts: ObservedExperts) -> QuantizedWeight:
        """Quantize the weights of observed experts, and report each."""
        weight = experts.dense()
        E, N, K = weight.shape
        inputs: list[Factored | None] = [None] * E
        reasons: list[str | None] = [None] * E
        for e, gram in enumerate(experts.grams):
            check_finite_gram(gram, f"{name}[{e}]")
            if gram is not None and experts.tokens[e] < K // FEW_TOKENS:
                reasons[e] = f"{experts.tokens[e]} tokens reached it, and {K // FEW_TOKENS} are needed"
            elif N * K % self._options.chosen_blocksize:
                reasons[e] = "its blocks reach into the next expert"
            else:
                inputs[e] = None if gram is None else factored(gram)
                reasons[e] = _why_not(gram) if inputs[e] is None else None
        plain, q = self._both(f"{name}, ", weight, inputs)
        for e, gram in enumerate(experts.grams):
            usable = inputs[e] is not None
            errors = output_errors(weight[e], gram, plain, q, first=e * N) if usable else [0.0, 0.0]
            self._report(f"{name}[{e}]", experts.tokens[e], errors, reasons[e], q)
        experts.grams.clear()
        return q

    def _both(
        self, prefix: str, weight: Tensor, inputs: Sequence[Factored | None]
    ) -> tuple[QuantizedWeight, QuantizedWeight]:
        """A weight rounded to the nearest levels, and calibrated where it can be."""
        with weight_named(prefix):
            plain = self._options.round_to_nearest(weight)
            return plain, calibrated(weight, inputs, self._options) if any(inputs) else plain

    def _report(self, name: str, tokens: int, errors: list[float], fallback: str | None, q: QuantizedWeight) -> None:
        sensitivity = self._sensitivity.get(name)
        self.report.weights.append(Calibrated(name, tokens, *errors, fallback, q.format, sensitivity))


def _why_not(gram: Tensor | None) -> str:
    """Why a matrix has no factor."""
    if gram is None:
        return "no batch reached it"
    return "the Gram matrix of its inputs is singular" if gram.diagonal().any() else "its inputs are all 0"
