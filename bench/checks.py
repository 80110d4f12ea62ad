"""Check results. Every contestant's is checked before it is timed.

The oracle is plain torch in float64 with a decoder of its own. It checks a sample of rows (of blocks, for `quantize`),
because all of 4096x14336 at M=2048 in float64 would take longer than the measurement.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from qlora_native.testing import blocked_product
from torch import Tensor

from peers import PEER_ERROR

ROWS = 16
# The allowed error of qlora_native over that of fp32 accumulators in blocks, on the same rows and a sample of the
# columns. The tests allow 1.1; here it is enough to find a wrong result.
SLACK = 2.0
COLUMNS = 64


class WrongResult(Exception):
    """A contestant's result is wrong, so its time would mean nothing."""


def decode(quantized: Any, dtype: torch.dtype) -> Tensor:
    """Decode our QuantizedWeight to [N, K]: fp32 code x fp32 scale, rounded once to `dtype`."""
    codes = quantized.codes.reshape(-1)
    nibbles = torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)[: quantized.shape[0] * quantized.shape[1]]
    values = quantized.code[nibbles.int()]
    values = values.reshape(-1, quantized.blocksize) * scales(quantized)[:, None]
    return values.reshape(quantized.shape).to(dtype)


def scales(quantized: Any) -> Tensor:
    """The fp32 scale of each block."""
    if quantized.nested_absmax is None:
        return quantized.absmax
    nested = quantized.nested_absmax.repeat_interleave(256)[: quantized.absmax.numel()]
    return quantized.nested_code[quantized.absmax.int()] * nested + quantized.offset


def rows_of(M: int) -> Tensor:
    """The indices of the rows to check: the first, the last and some between."""
    return torch.linspace(0, M - 1, min(M, ROWS)).round().long()


def product(
    name: str,
    result: Tensor,
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    low_rank: Tensor | None = None,
    allowed: float | None = None,
) -> None:
    """Check rows of Y or dX against left @ right.

    Args:
        name: the contestant's.
        result: [rows, N] that a contestant computed.
        left: [rows, K] in the dtype of the activations.
        right: [K, N] in float64.
        dtype: that of the activations.
        low_rank: float64 [rows, N], the adapter's part, or None.
        allowed: the allowed relative RMS error of a peer; None for qlora_native, which may have SLACK times that of
            accumulators in blocks.

    Raises:
        WrongResult: the error is too large.
    """
    wanted = left.double() @ right
    if low_rank is not None:
        wanted = wanted + low_rank
    if allowed is None:
        some = torch.linspace(0, right.shape[1] - 1, min(right.shape[1], COLUMNS)).round().long()
        blocked = blocked_product(left, right[:, some].to(dtype).t()).to(dtype)
        allowed = SLACK * _error(blocked, left.double() @ right[:, some])
        if low_rank is not None:  # U, A and B are rounded too, each as the result is
            allowed *= (1 + 3 * (low_rank.norm() / wanted.norm()).item() ** 2) ** 0.5
    close(name, result, wanted, allowed)


def dropout(name: str, dropped: Tensor, plain: Tensor, low_rank: Tensor, p: float) -> None:
    """Check that dropout changes the adapter's part by the right amount, on average.

    If a share p of independent inputs is set to zero and the others are scaled by 1/(1-p), their sum changes by
    √(p/(1-p)) of its size. `dropped`, `plain` and `low_rank`, all [rows, N], are the result with dropout, without it,
    and the adapter's part.
    """
    moved = ((dropped.double() - plain.double()).norm() / low_rank.norm()).item()
    expected = (p / (1 - p)) ** 0.5
    if not 0.5 * expected < moved < 2 * expected:
        raise WrongResult(
            f"{name}: dropout {p:g} moved the adapter's part by {moved:.3f}, about {expected:.3f} expected"
        )


def quantized(name: str, quantized_weight: Any, weight: Tensor) -> None:
    """Check codes and scales against `weight` [N, K]."""
    blocks = weight.reshape(-1, quantized_weight.blocksize).float()
    absmax = blocks.abs().amax(dim=1)
    if not _error(scales(quantized_weight), absmax) < 0.02:
        raise WrongResult(f"{name}: scales differ from the largest magnitudes of their blocks")
    some = rows_of(len(blocks))
    scaled = blocks[some] * (1.0 / absmax[some])[:, None]
    code = quantized_weight.code
    wanted = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)  # at a tie the lower code
    codes = quantized_weight.codes.reshape(-1, quantized_weight.blocksize // 2)[some]
    found = torch.stack((codes >> 4, codes & 15), dim=2).reshape(wanted.shape)
    if not torch.equal(found.long(), wanted):
        raise WrongResult(f"{name}: {int((found != wanted).sum())} of {wanted.numel()} codes are not the nearest")


def equal(name: str, result: Tensor, wanted: Tensor) -> None:
    """Check that every bit is equal."""
    if result.dtype != wanted.dtype or not torch.equal(result, wanted):
        raise WrongResult(f"{name}: not bit-identical to the decoded weight")


def close(name: str, result: Tensor, wanted: Tensor, allowed: float = PEER_ERROR) -> None:
    """Check the relative RMS error."""
    error = _error(result, wanted)
    if not error <= allowed:  # also a NaN
        raise WrongResult(f"{name}: relative RMS error {error:.2e}, at most {allowed:.2e} expected")


def _error(result: Tensor, wanted: Tensor) -> float:
    difference = F.mse_loss(result.to(wanted.dtype), wanted, reduction="sum").sqrt()
    return (difference / wanted.norm()).item()
