"""Products with a dense weight: torch's or, in 16 bits on a CPU without instructions for them, torch's of fp32.

There torch widens an element wherever it multiplies it. On an Intel Xeon (Ice Lake), [256, 49152] times [49152, 576]
takes it 4 times as long in bf16 as in fp32, and 500 times in fp16. So panels of the weight are widened once each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _C

# Bytes of a panel, at most, and of what it is multiplied by or gives. It is multiplied out of a cache.
PANEL_BYTES = 4 << 20


def has_instructions(x: Tensor) -> bool:
    """Whether torch has instructions for products of the dtype of x where x is."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return True
    if x.dtype == torch.bfloat16:
        return _C.current_isa().endswith("_bf16")
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)  # torch may be built without oneDNN
    return supported is not None and supported()


def _panels(w: Tensor, M: int) -> Iterator[slice]:
    """Cut the rows of w [N, K] into panels, which M rows are multiplied by."""
    N, K = w.shape
    rows = max(PANEL_BYTES // (4 * max(K, M)), 1)
    return (slice(first, min(first + rows, N)) for first in range(0, N, rows))


# Autocast would round the operands of products in fp32.
@torch.autocast("cpu", enabled=False)
def product_nt(
    x: Tensor, w: Tensor, bias: Tensor | None = None, u: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """Compute x @ w.T + bias + u @ b.T, [M, N], of x [M, K], w [N, K], bias [N], u [M, rank] and b [N, rank]."""
    if has_instructions(x):
        y = torch.nn.functional.linear(x, w, bias)
        return y if u is None else y.addmm_(u, b.T)
    y = x.new_empty(x.shape[0], w.shape[0])
    x, u = x.float(), None if u is None else u.float()
    for rows in _panels(w, x.shape[0]):
        part = x @ w[rows].float().T
        if u is not None:
            part.addmm_(u, b[rows].float().T)
        y[:, rows] = part if bias is None else part.add_(bias[rows])
    return y


@torch.autocast("cpu", enabled=False)
def product_nn(x: Tensor, w: Tensor, v: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """Compute x @ w + v @ a, [M, K], of x [M, N], w [N, K], v [M, rank] and a [rank, K]."""
    if has_instructions(x):
        y = x @ w
        return y if v is None else y.addmm_(v, a)
    y = x.new_zeros(x.shape[0], w.shape[1], dtype=torch.float32) if v is None else v.float() @ a.float()
    for rows in _panels(w, x.shape[0]):
        y.addmm_(x[:, rows].float(), w[rows].float())
    return y.to(x.dtype)


@torch.autocast("cpu", enabled=False)
def add_product_tn(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x.T @ y to `total`, fp32 [N, K], of x [M, N] and y [M, K], a panel of `total` at once."""
    wide = None if has_instructions(x) else y.float()
    for rows in _panels(total, x.shape[0]):
        if wide is None:
            total[rows] += x[:, rows].T @ y
        else:
            total[rows].addmm_(x[:, rows].T.float(), wide)
