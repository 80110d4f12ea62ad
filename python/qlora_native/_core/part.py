"""A part of a quantized weight, for one of several processes: some of its rows, columns or experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .blocks import ceil_div
from .errors import bad
from .formats import codes_shape
from .microscaling import MICROSCALED
from .quantize import decoded_scales
from .weight import QuantizedWeight


def check_parts(name: str, shape: Sequence[int], blocksize: int, dim: int, count: int) -> None:
    """Raise ValueError unless a weight of `shape` can be cut along `dim` into `count` equal parts of whole blocks."""
    if shape[dim] % count or _matrix(shape, dim, count)[1] % blocksize:
        what = "columns" if dim == -1 else "rows" if len(shape) == 2 else "experts"
        expected = f"{what} that divide into {count} equal parts of whole blocks of {blocksize} elements"
        raise bad(name, expected, f"the shape {list(shape)}")


def _matrix(shape: Sequence[int], dim: int, count: int) -> tuple[int, int]:
    """(rows, columns taken by each part) of the matrix, of which a cut along `dim` takes some columns of all rows."""
    rows = 1 if dim == 0 else math.prod(shape[:-1])
    return rows, math.prod(shape) // rows // count


def part_of(q: QuantizedWeight, dim: int, index: int, count: int) -> QuantizedWeight:
    """Copy one of `count` equal parts of a weight. It decodes to the bits that it has in the whole.

    Double-quantized scales become fp32 where the cut divides the groups of 256 that share a second-level scale: among
    columns nearly always, and among rows or experts if a part is no multiple of 256 blocks.

    Args:
        q: [N, K], or [E, N, K].
        dim: 0 for rows, or experts; -1 for columns.
        index, count: which part, and how many there are.

    Returns:
        A weight that is shorter in `dim`. Its tensors share no memory with those of `q`, but for the tables.

    Raises:
        ValueError: the parts are not equal, or not whole blocks; or the format is one of files.
    """
    if not q.layout.quantizes:
        raise bad("format", "one that weights are quantized to", f"{q.format}, which cannot be cut")
    check_parts("shape", q.shape, q.blocksize, dim, count)
    rows, taken = _matrix(q.shape, dim, count)

    def cut(tensor: Tensor, elements: int) -> Tensor:
        """The part of a tensor that has one entry for so many elements of the weight."""
        entries = taken // elements
        return tensor.reshape(rows, -1)[:, index * entries : (index + 1) * entries].clone().view(-1)

    shape = list(q.shape)
    shape[dim] //= count
    codes = cut(q.codes, 8 // q.bits).view(codes_shape(*shape, bits=q.bits))
    absmax, nested_absmax, group = cut(q.absmax, q.blocksize), q.nested_absmax, q.layout.nested_blocksize
    nested_code, offset = q.nested_code, q.offset
    if nested_absmax is not None and q.format in MICROSCALED:
        nested_absmax = nested_absmax[: ceil_div(len(absmax), group)].clone()  # all are 1
    elif nested_absmax is not None and taken % (group * q.blocksize) == 0:
        nested_absmax = cut(nested_absmax, group * q.blocksize)
    elif nested_absmax is not None:
        absmax, nested_absmax, nested_code, offset = cut(decoded_scales(q), q.blocksize), None, None, None
    return replace(
        q,
        codes=codes,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        offset=offset,
        shape=tuple(shape),
    )
