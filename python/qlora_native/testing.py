"""Is a computed matrix right? Tolerances that follow from the operands, for the tests and for your own.

A sum of K products in fp32, rounded once to a dtype with unit roundoff u, may be off by

    u * |y|  +  SUM_FACTOR * sqrt(K) * 2**-24 * |x_m| * |w_n|          (element y[m,n] of X . W^T; norms of the rows)

The first part is the final rounding. The second is the sum's: its K roundings are each at most 2**-24 of a partial
sum, which |x_m| * |w_n| bounds (Cauchy-Schwarz), and as they are independent they grow with the root of K (Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, section 2.8).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ERROR_RATIO",
    "assert_close_by_norm",
    "assert_error_ratio",
    "product_tolerance",
    "relative_error",
    "unit_roundoff",
]

# The promise: at most this many times the error of F.linear(x, dequantize(w)) against float64.
ERROR_RATIO = 1.1
# Standard deviations that the sum's error may reach; none of 1e9 elements goes beyond.
SUM_FACTOR = 6.0
# Fewer elements say too little about a ratio of root-mean-square errors: that of 1024 varies by 3 %.
RATIO_ELEMENTS = 1024


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to `dtype`: 2**-24 for fp32, 2**-8 for bf16, 2**-11 for fp16."""
    return torch.finfo(dtype).eps / 2


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, Frobenius norms in float64; 0 of 0 is 0."""
    expected = expected.double()
    difference = (actual.double() - expected).norm().item()
    norm = expected.norm().item()
    return difference / norm if norm > 0 else (float("inf") if difference > 0 else 0.0)


def product_tolerance(left: Tensor, right: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The error that each element of left . right^T may have.

    Args:
        left: [M, K] the operands as they were multiplied.
        right: [N, K] likewise.
        expected: [M, N] the product in float64.
        dtype: of the result.

    Returns:
        [M, N] in float64, with room for the smallest number that `dtype` (and fp32) holds.
    """
    left, right = left.double(), right.double()
    norms = left.norm(dim=1, keepdim=True) * right.norm(dim=1)
    sums = SUM_FACTOR * left.shape[1] ** 0.5 * unit_roundoff(torch.float32) * norms
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


def assert_error_ratio(name: str, actual: Tensor, dense: Tensor, expected: Tensor, ratio: float = ERROR_RATIO) -> None:
    """Raise AssertionError unless the relative error of `actual` is at most `ratio` times that of `dense`.

    Args:
        actual: what is tested.
        dense: what torch's dense operations give for the same operands in the same dtype.
        expected: the result in float64. With fewer than RATIO_ELEMENTS elements nothing is said.
    """
    if expected.numel() < RATIO_ELEMENTS:
        return
    error, allowed = relative_error(actual, expected), relative_error(dense, expected)
    assert error <= ratio * allowed, (
        f"{name}: relative error {error:.3e}, {error / max(allowed, 1e-300):.3f} times that of the dense product "
        f"({allowed:.3e}); at most {ratio} times is promised"
    )
