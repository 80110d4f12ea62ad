"""Is a computed product right? A bound and a yardstick that follow from the operands, for the tests and for your own.

An element y[m,n] is the sum of K products x[m,k] * w[n,k], taken in fp32 and rounded once to a dtype with unit roundoff
u. Neither check below depends on what another library makes of the same operands: each machine has another library,
and it may round more or less than ours.

**The bound: how far off may one element be?** In whatever order a sum is taken, it is a binary tree, and each node
rounds a partial sum T_i. To first order the error is

    E = sum over nodes of delta_i * T_i,   |delta_i| <= 2**-24

(Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 4.2). The nodes of one level of
the tree hold disjoint sets S of terms, and the Cauchy-Schwarz inequality gives |T_S| <= |x_S| |w_S| with the norms of
these parts. So the squares of one level's partial sums add up to at most |x|^2 |w|^2, and those of all h levels to
h |x|^2 |w|^2. The delta_i behave like independent random variables of mean zero (section 2.8 there), and then

    |E| <= L * 2**-24 * sqrt(h) * |x| |w|   but for a probability of 2 exp(-L^2 / 2)

by Hoeffding's inequality (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci.
Comput. 41, 2019). With the rounding of the result, `product_tolerance` is

    u |y|  +  SUM_FACTOR * sqrt(h) * 2**-24 * |x_m| |w_n|

The h of our order is `chain_length`: the largest number of additions that any one term goes through. This bound holds
for all operands, so it is wide for random ones, whose partial sums are about sqrt(K) times smaller.

**The yardstick: how exact is the result as a whole?** Its error is at most ERROR_RATIO times that of `blocked_product`,
which adds up the terms of each block of BLOCK one by one, and then the sums of the blocks one by one. Dense products in
fp32 are commonly computed like this; here it is written in operations that IEEE 754 defines to the last bit. On random
operands it finds what the bound does not: one chain over K = 14336 has 8 times the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "ERROR_RATIO",
    "assert_close_by_norm",
    "assert_error_ratio",
    "blocked_product",
    "chain_length",
    "product_tolerance",
    "relative_error",
    "unit_roundoff",
]

# The promise: the median over seeds of the error is at most this many times that of sums in blocks.
ERROR_RATIO = 1.1
# The L of the bound: one element of 3e7 could exceed it if every inequality above were attained, which none is.
SUM_FACTOR = 6.0
# Terms of a block. No fp32 sum of ours that becomes an fp32 result adds up more before it starts afresh.
BLOCK = 128
# Standard deviations of chance that are allowed beyond a ratio of errors.
RATIO_DEVIATIONS = 4.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype: `2**-24` for fp32, `2**-8` for bf16, `2**-11` for fp16.

    Args:
        dtype: a floating-point dtype.
    """
    return torch.finfo(dtype).eps / 2


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in Frobenius norms, in float64; 0 / 0 is 0.

    Args:
        actual, expected: tensors of the same shape.
    """
    expected = expected.double()
    difference = (actual.double() - expected).norm().item()
    norm = expected.norm().item()
    return difference / norm if norm > 0 else (float("inf") if difference > 0 else 0.0)


def chain_length(terms: int, dtype: torch.dtype) -> int:
    """The largest number of fp32 additions that a term goes through in one of our sums, whatever the kernel.

    Args:
        terms: of the sum; K for a forward product.
        dtype: of the activations. In fp32 a sum starts afresh after at most BLOCK terms; a total adds up at most one
            partial sum for each 32 terms; and at most 16 more additions join lanes, warps and the adapter's part. In
            bf16 and fp16 one chain may hold all terms, as the rounding of the result hides its error.
    """
    if dtype != torch.float32:
        return terms
    return min(terms, BLOCK + -(-terms // 32) + 16)


def product_tolerance(
    x: Tensor, weight: Tensor, expected: Tensor, dtype: torch.dtype, chain: int | None = None
) -> Tensor:
    """The error that each element of x . weight^T may have.

    Args:
        x: [M, K] the operands as they were multiplied.
        weight: [N, K] likewise.
        expected: [M, N] the product in float64.
        dtype: of the activations and of the result.
        chain: the largest number of additions that a term goes through, by default `chain_length`. K is right for any
            order.

    Returns:
        [M, N] in float64, with room for the smallest number that `dtype` (and fp32) holds.
    """
    x, weight = x.double(), weight.double()
    norms = x.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    levels = chain_length(x.shape[1], dtype) if chain is None else chain
    sums = SUM_FACTOR * levels**0.5 * unit_roundoff(torch.float32) * norms
    return unit_roundoff(dtype) * expected.abs() + sums + torch.finfo(dtype).smallest_normal


def assert_close_by_norm(name: str, actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """Raise AssertionError, with the worst element, unless |actual - expected| <= tolerance everywhere.

    Args:
        name: what it is, for the message.
        actual: any shape and dtype; a NaN fails.
        expected: float64, the same shape.
        tolerance: float64, broadcast to that shape; from `product_tolerance`.
    """
    assert actual.shape == expected.shape, f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.double() - expected).abs()
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).expand_as(error)
    excess = torch.where(error <= tolerance, 0.0, (error / tolerance).nan_to_num(float("inf"), float("inf")))
    if excess.max() > 0:
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {excess.numel()} elements are off by more than allowed. The worst, "
            f"{list(worst)}: expected {expected[worst].item():.9g}, got {actual[worst].item():.9g}, an error of "
            f"{error[worst].item():.3g} where {tolerance[worst].item():.3g} is allowed"
        )


def blocked_product(x: Tensor, weight: Tensor, block: int = BLOCK) -> Tensor:
    """x . weight^T by fused multiply-adds in fp32, in blocks of the inner dimension: the same bits on every machine.

    It is slow, so give it a sample of the rows of both.

    Args:
        x: [M, K] in fp32, bf16 or fp16.
        weight: [N, K] likewise.
        block: terms that are added up one by one, starting from zero. With K the sum is one chain.

    Returns:
        [M, N] in fp32, on the device of `x`.
    """
    (M, K), N = x.shape, len(weight)
    block = max(1, min(block, K))
    blocks = -(-K // block)
    padding = (0, blocks * block - K)  # adding a zero rounds nothing
    x, weight = (torch.nn.functional.pad(t.double(), padding).view(len(t), blocks, block) for t in (x, weight))
    partial_sums = torch.zeros(blocks, M, N, device=x.device)
    for x_k, w_k in zip(x.permute(2, 1, 0), weight.permute(2, 1, 0), strict=True):
        # In float64 the product of two fp32 is exact, and the sum's first rounding there almost never shows.
        partial_sums = (partial_sums + x_k[:, :, None] * w_k[:, None, :]).float()
    total = torch.zeros(M, N, device=x.device)
    for partial in partial_sums:
        total = total + partial
    return total


def assert_error_ratio(
    name: str, errors: Sequence[float], yardsticks: Sequence[float], elements: int, ratio: float = ERROR_RATIO
) -> None:
    """Raise AssertionError if the median of errors / yardsticks exceeds `ratio` by more than chance explains.

    Args:
        name: what it is, for the message.
        errors: the relative error of what is tested, one for each seed; a NaN fails.
        yardsticks: that of `blocked_product` rounded to the same dtype, for the same seeds and elements.
        elements: the number of independent elements behind each error. Two root-mean-square errors of n elements differ
            by chance by about sqrt(2 / n), and the medians of s seeds by 1.25 / sqrt(s) of that; RATIO_DEVIATIONS times
            this is allowed beyond `ratio`. Fewer than a few hundred elements say little.
        ratio: of the errors.
    """
    ratios = [e / y if y > 0 else (1.0 if e == 0 else float("inf")) for e, y in zip(errors, yardsticks, strict=True)]
    seeds = len(ratios)
    deviation = (2 / elements) ** 0.5 * (1.0 if seeds == 1 else 1.25 / seeds**0.5)
    allowed = ratio * (1 + RATIO_DEVIATIONS * deviation)
    assert all(r == r for r in ratios) and median(ratios) <= allowed, (
        f"{name}: the relative errors {', '.join(f'{e:.3e}' for e in errors)} are {median(ratios):.3f} times those of "
        f"fp32 sums in blocks of {BLOCK}, in the median over seeds; at most {allowed:.3f} is allowed for {elements} "
        "elements"
    )
