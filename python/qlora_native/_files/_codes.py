"""Codes: how files pack them into words, and how they are packed here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._core.microscaling import swapped_codes

# Elements that are unpacked at once: their temporary tensors take a few MB.
_PIECE = 1 << 20


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words], lowest bits first -> unsigned codes, uint8 [rows, columns]."""
    data = words.contiguous().view(torch.uint8)
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), dim=2).view(len(data), -1)
    return data[:, :columns]


def pairs(q: Tensor) -> Tensor:
    """Codes below 16 [rows, columns] -> [rows, columns / 2], with the first of two in the high half of a byte."""
    return q[:, 0::2] << 4 | q[:, 1::2]


def pieces(rows: int, K: int) -> Iterator[slice]:
    """Ranges of rows that are unpacked at once."""
    step = max(1, _PIECE // K)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def codes_of_words(words: Tensor, bits: int, K: int, column_order: Tensor | None = None) -> Tensor:
    """The codes of a weight from int32 [N, words], which may be a transposed view and holds unsigned codes.

    Returns:
        uint8 [N, K/2], with the first of two codes in the high half of a byte; or [N, K], signed bytes.
    """
    codes = torch.empty((len(words), K * bits // 8), dtype=torch.uint8, device=words.device)
    for rows in pieces(len(words), K):
        if column_order is not None:
            q = unpacked(words[rows], bits, K)[:, column_order]
            codes[rows] = pairs(q) if bits == 4 else q ^ 0x80
        else:
            data = words[rows].contiguous().view(torch.uint8)[:, : codes.shape[1]]
            codes[rows] = swapped_codes(data) if bits == 4 else data ^ 0x80
    return codes
