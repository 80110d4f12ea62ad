"""Quantize a weight so that its product with the observed inputs changes least.

What is minimized is ‖X (W − Q)ᵀ‖², which depends on X by its Gram matrix H = XᵀX alone. Scales come first: each block
gets the scale whose rounding has the least weighted error. Then the codes are chosen column by column, the most
important first, and each error is fed back into the columns that are still to come (Frantar et al., "GPTQ", 2023,
algorithm 1). The scales are those that are stored, so the error of rounding them is fed back too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .._core.blocks import chosen_blocksize
from .._core.calibrate import quantize_with_feedback, weighted_scales
from .._core.microscaling import MICROSCALED
from .._core.quantize import decoded_scales, double_quantized, embedding, quantize
from .._core.weight import QuantizedWeight, as_matrix

DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal (GPTQ, section 3.3)
MAX_DAMPING = 1.0  # from here on H says little that its diagonal does not
RATIOS = (0.5, 1.15, 40)  # of the scales that are tried, relative to absmax: the first, the last, how many
SOLVED = 256  # columns of a triangular matrix that is small enough to be inverted by solving; larger ones take products
MEASURED_ROWS = 32  # of W, in the report's error
NEIGHBOURS = (0, -1, 1)  # of a stored scale of 8 bits: those that are tried, of which the first of equals wins
TRIED_ELEMENTS = 1 << 22  # of W, whose neighbours are tried at once


@dataclass(frozen=True)
class Options:
    """How weights are quantized.

    Attributes:
        format, blocksize, double_quant, codebook: as in `qlora_native.quantize`.
        stored: rounds fp32 scales to those of a file that stores them otherwise; without double quantization alone.
    """

    format: str
    blocksize: int | None
    double_quant: bool
    codebook: Tensor | Sequence[float] | None
    stored: Callable[[QuantizedWeight], QuantizedWeight] | None = None

    @property
    def chosen_blocksize(self) -> int:
        """The blocksize, also where it is the format's own."""
        return chosen_blocksize(self.blocksize, self.format)

    def round_to_nearest(self, weight: Tensor, double_quant: bool | None = None) -> QuantizedWeight:
        """Round each element to the nearest level, without calibration."""
        double_quant = self.double_quant if double_quant is None else double_quant
        q = quantize(weight, self.format, self.blocksize, double_quant, self.codebook)
        return q if self.stored is None else self.stored(q)

    def with_scales(self, q: QuantizedWeight, scales: Tensor) -> QuantizedWeight:
        """Replace the scales of `q` by others, fp32 [blocks], in the form in which they are stored."""
        if q.format in MICROSCALED:
            return replace(q, absmax=_nearest_by_ratio(scales, q.nested_code[: len(MICROSCALED[q.format])]))
        q = replace(q, absmax=scales)
        if self.stored is not None:
            return self.stored(q)
        return double_quantized(q) if self.double_quant else q


@dataclass(frozen=True)
class Factored:
    """The Gram matrix of a layer's input, factored for the error feedback.

    Attributes:
        order: int64 [K], the columns of W, the most important first.
        factor: fp32 [K, K], upper triangular: factorᵀ · factor is the inverse of the damped H in that order.
        importance: fp32 [K], in the order of W's columns: what a squared error of a column costs, once all columns
            after it have been adapted to it.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor


def factored(gram: Tensor) -> Factored | None:
    """Factor H. The damping grows tenfold until H can be factored; None if it cannot be, as where all inputs are 0.

    Args:
        gram: fp32 [K, K], finite.
    """
    diagonal = gram.diagonal().double()
    mean = diagonal.mean().item()
    order = torch.argsort(diagonal, descending=True, stable=True)
    # With H = R·Rᵀ, R upper triangular, the inverse is UᵀU for U = R⁻¹. R is the Cholesky factor of H in reverse order.
    backwards = order.flip(0)
    damping = DAMPING
    while mean > 0 and damping <= MAX_DAMPING:
        damped = gram[backwards][:, backwards].double()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # a matrix of float64 may take a gigabyte
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            exact = _inverse(upper)
            importance = torch.empty_like(diagonal)
            importance[order] = exact.diagonal() ** -2.0
            factor = exact.float().contiguous()
            if all(end.isfinite() for end in factor.aminmax()):
                return Factored(order, factor, importance.float())
        damping *= 10
    return None


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: products take half the time of solving for identity."""
    K = len(upper)
    if K <= SOLVED:
        return torch.linalg.solve_triangular(upper, torch.eye(K, dtype=upper.dtype, device=upper.device), upper=True)
    first, second = slice(0, K // 2), slice(K // 2, K)
    inverse = torch.zeros_like(upper)
    inverse[first, first] = _inverse(upper[first, first])
    inverse[second, second] = _inverse(upper[second, second])
    inverse[first, second] = -(inverse[first, first] @ (upper[first, second] @ inverse[second, second]))
    return inverse


def calibrated(weight: Tensor, inputs: Sequence[Factored | None], options: Options) -> QuantizedWeight:
    """Quantize a weight for inputs whose Gram matrices were observed.

    Args:
        weight: W [N, K], or [E, N, K] of experts, whose blocks lie within an expert.
        inputs: those of W, or of each expert; an expert with None is rounded to the nearest level.
        options: the format, and how its scales are stored.
    """
    q = options.round_to_nearest(weight, double_quant=False)  # also checks the weight
    experts = weight.detach().reshape(len(inputs), *weight.shape[-2:])
    largest = 1.0 if q.code is None else q.code.abs().max().item()
    first, last, count = RATIOS
    scales = decoded_scales(q).clone().view(len(inputs), -1)
    for e, found in enumerate(inputs):
        if found is not None:
            rows = experts[e].float().contiguous()
            scales[e] = weighted_scales(
                rows,
                found.importance,
                q.code,
                blocksize=q.blocksize,
                lo=first / largest,
                hi=last / largest,
                steps=count,
            )
    codes = q.codes.view(len(inputs), -1).clone()
    q = options.with_scales(q, scales.view(-1))
    if q.format in MICROSCALED:
        stored = q.absmax.view(len(inputs), -1).clone()
        for e, found in enumerate(inputs):
            if found is not None:
                stored[e] = _best_neighbours(q, stored[e], experts[e], found.importance)
        q = replace(q, absmax=stored.view(-1))
    scales = decoded_scales(q).view(len(inputs), -1)
    for e, found in enumerate(inputs):
        if found is not None:
            rows = experts[e].float().contiguous()
            codes[e] = quantize_with_feedback(rows, found.order, found.factor, scales[e], q.code, blocksize=q.blocksize)
    return replace(q, codes=codes.view(q.codes.shape))


def _best_neighbours(q: QuantizedWeight, stored: Tensor, weight: Tensor, importance: Tensor) -> Tensor:
    """Of each stored scale and the two next to it, the one whose rounding has the least weighted error.

    The levels of such scales lie far apart, so that the nearest one may be worse than the next.

    Args:
        q: has the codebook, the levels of scales, and the blocksize.
        stored: uint8 [blocks], indices of levels.
        weight: W [N, K], of these blocks.
        importance: fp32 [K].
    """
    levels, code = q.nested_code[: len(MICROSCALED[q.format])], q.code.sort().values
    middles = (code[1:] + code[:-1]) / 2
    best = stored.clone()
    count = TRIED_ELEMENTS // q.blocksize
    flat = weight.reshape(-1)
    for start in range(0, len(stored), count):
        elements = torch.arange(start * q.blocksize, min((start + count) * q.blocksize, len(flat)), device=flat.device)
        padding = (0, -len(elements) % q.blocksize)
        w, cost = (
            nn.functional.pad(each, padding).view(-1, q.blocksize)
            for each in (flat[elements].float(), importance[elements % len(importance)])
        )
        least = torch.full((len(w),), torch.inf, device=w.device)
        for step in NEIGHBOURS:
            index = (stored[start : start + count].int() + step).clamp(0, len(levels) - 1)
            scale = levels[index][:, None]
            rounded = code[torch.bucketize(w / scale, middles)] * scale
            error = (cost * (w - rounded).square()).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best[start : start + count] = torch.where(better, index.to(torch.uint8), best[start : start + count])
    return best


def _nearest_by_ratio(scales: Tensor, levels: Tensor) -> Tensor:
    """The index of the ascending level that is nearest to each scale by ratio, as bytes. Scales of 0 get the lowest."""
    tiny = 2.0**-200
    log = levels.double().clamp_min(tiny).log2()
    return torch.bucketize(scales.double().clamp_min(tiny).log2(), (log[1:] + log[:-1]) / 2).to(torch.uint8)


def output_errors(weight: Tensor, gram: Tensor, *weights: QuantizedWeight, first: int = 0) -> list[float]:
    """‖X (W − Q)ᵀ‖ / ‖X Wᵀ‖ of each Q, over at most MEASURED_ROWS rows of W that lie evenly in it.

    Args:
        weight: W [N, K].
        gram: XᵀX.
        weights: each Q, whose rows from `first` on are those of W.
        first: the row of Q, or of all experts' rows, where W begins.
    """
    rows = torch.arange(0, weight.shape[0], math.ceil(weight.shape[0] / MEASURED_ROWS), device=weight.device)
    kept = weight.detach()[rows].float()

    def norm(w: Tensor) -> float:
        return math.sqrt(max(0.0, torch.dot((w @ gram).view(-1), w.view(-1)).item()))

    whole = norm(kept)
    if whole == 0:
        return [0.0] * len(weights)
    return [norm(kept - embedding(rows + first, as_matrix(q), torch.float32)) / whole for q in weights]
