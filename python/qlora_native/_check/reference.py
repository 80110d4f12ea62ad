"""What operations compute, by their definitions in plain torch and float64, and the error that each result may have.

Nothing of ours is used but the container. An error is bounded by the norms of the operands (qlora_native.testing
explains it). The low-rank parts of a product are rounded once more than the product itself, because U or V, and A and
B, are rounded to the dtype of x. By Cauchy-Schwarz |U[m,r]| <= |x_m| |a_r|, so these errors are bounded by norms too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.weight import QuantizedWeight
from ..testing import SUM_FACTOR, chain_length, product_tolerance, unit_roundoff

U32 = unit_roundoff(torch.float32)
# Roundings of the low-rank part to the dtype of x: of A, of s*B, of U (or of B and V). Where torch multiplies, the part
# is a product of its own, which is rounded before it becomes a term of the result's sum.
LOW_RANK_ROUNDINGS = 3
LOW_RANK_ROUNDINGS_BY_TORCH = 4
EXPONENTIAL = 8  # roundings of a score by scale, maximum and exponential, in fp32


def scales(q: QuantizedWeight) -> Tensor:
    """The fp32 scale of each block: types.h, each operation rounded by itself."""
    if q.nested_absmax is None:
        return q.absmax.float()
    nested = q.nested_absmax.repeat_interleave(q.layout.nested_blocksize)[: q.absmax.numel()]
    return q.nested_code[q.absmax.long()] * nested + q.offset.reshape(())


def minima(q: QuantizedWeight) -> Tensor | None:
    """The fp32 minimum of each block, or None."""
    if q.zero_point is not None:
        return -(q.zero_point.float() * scales(q))
    if q.nested_minimum is None:
        return None if q.minimum is None else q.minimum.float()
    nested = q.nested_minimum.repeat_interleave(q.layout.nested_blocksize)[: q.minimum.numel()]
    return q.nested_code[q.minimum.long()] * nested


def decode(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W [N, K] or [E, N, K]: fp32 level * fp32 scale + fp32 minimum, rounded once to `dtype`."""
    elements = math.prod(q.shape)
    codes, scale = q.codes.reshape(-1), scales(q)
    if q.bits == 4:
        level = q.code[torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)[:elements].long()]
    else:
        level = codes.view(torch.float8_e4m3fn if q.format == "fp8" else torch.int8).float()
    w = level * (scale / 127 if q.format == "int8" else scale).repeat_interleave(q.blocksize)[:elements]
    if (minimum := minima(q)) is not None:
        w = w + minimum.repeat_interleave(q.blocksize)[:elements]
    w = w.to(dtype).view(q.shape)
    if q.column_order is not None:
        w = w[..., q.column_order.long().argsort()]
    return w


def dropout_mask(seed: int, M: int, K: int, p: float) -> Tensor:
    """[M, K] of 0 and 1 in float64: Philox4x32-10 as common/philox.h lays it out. int64 wraps, so no bit is lost."""
    threshold, low = min(round(p * 65536), 65535), 0xFFFFFFFF
    m, block = torch.meshgrid(torch.arange(M), torch.arange(-(-K // 8)), indexing="ij")
    words = [block & low, m & low, m >> 32, torch.zeros_like(m)]
    key = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        products = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            ((products[1] >> 32) & low) ^ words[1] ^ key[0],
            products[1] & low,
            ((products[0] >> 32) & low) ^ words[3] ^ key[1],
            products[0] & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    halves = torch.stack([(word >> shift) & 0xFFFF for word in words for shift in (0, 16)], dim=-1)
    return (halves.reshape(M, 8 * halves.shape[1])[:, :K] >= threshold).double()


class Linear:
    """One product with its gradients in float64, and how far off an element may be.

    All is 2-D: x [M, K], w [N, K] as decoded to the dtype of x, dy [M, N].
    """

    def __init__(
        self,
        x: Tensor,
        w: Tensor,
        dy: Tensor,
        bias: Tensor | None = None,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Keep the operands; A [rank, K] and B [N, rank] have a dtype of their own, and `seed` is that of dropout."""
        self.x, self.w, self.dy, self.bias = x, w, dy, bias
        self.a, self.b, self.scaling = lora_a, lora_b, scaling
        self.keep = 1 / (1 - dropout)
        self.mask = dropout_mask(seed, *x.shape, dropout) if dropout else torch.ones(x.shape, dtype=torch.float64)

    def exact(self) -> dict[str, Tensor]:
        """{"y", "dx", "dbias", "da", "db"} in float64, of the operands as they are given (w rounded, the rest not)."""
        return self._run(lambda t: t.double())

    def _run(self, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        x, w, dy, mask = (convert(t) for t in (self.x, self.w, self.dy, self.mask * self.keep))
        leaves = {"dx": x, "dbias": self.bias, "da": self.a, "db": self.b}
        leaves = {name: convert(leaf.detach()).requires_grad_() for name, leaf in leaves.items() if leaf is not None}
        y = F.linear(leaves["dx"], w, leaves.get("dbias"))
        if self.a is not None:
            y = y + F.linear(F.linear(leaves["dx"] * mask, leaves["da"]), leaves["db"]) * self.scaling
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def tolerance(self, exact: dict[str, Tensor], by_torch: bool = False) -> dict[str, Tensor]:
        """The error that each element of each result may have, by our sums or by torch's, whose order is unknown."""
        chain = (lambda terms, dtype: terms) if by_torch else chain_length
        x, w, dy = self.x.double(), self.w.double(), self.dy.double()
        (M, K), N, dtype = x.shape, len(w), self.x.dtype
        tolerance = {
            "y": product_tolerance(x, w, exact["y"], dtype, chain(K, dtype)),
            "dx": product_tolerance(dy, w.t(), exact["dx"], dtype, chain(N, dtype)),
        }
        if self.bias is not None:
            ones = torch.ones(1, len(dy), dtype=torch.float64)
            tolerance["dbias"] = product_tolerance(ones, dy.t(), exact["dbias"][None], dtype, M)[0]
            tolerance["y"] += unit_roundoff(dtype) * self.bias.double().abs()  # it is rounded to that dtype first
        if self.a is None or self.a.shape[0] == 0:
            return tolerance | ({} if self.a is None else {"da": torch.zeros(0), "db": torch.zeros(0)})
        a, b, s = self.a.double(), self.b.double(), abs(self.scaling)
        u = self.keep * x.norm(dim=1)[:, None] * a.norm(dim=1)  # >= |U|, [M, rank]
        v = s * self.keep * dy.norm(dim=1)[:, None] * b.norm(dim=0)  # >= |V|
        roundings = (LOW_RANK_ROUNDINGS_BY_TORCH if by_torch else LOW_RANK_ROUNDINGS) * unit_roundoff(dtype)

        def roundoff(*lengths):
            return roundings + SUM_FACTOR * U32 * sum(chain(length, dtype) ** 0.5 for length in lengths)

        tolerance["y"] += roundoff(K) * u @ (s * b.abs()).t()
        tolerance["dx"] += roundoff(N) * v @ a.abs()
        smallest = torch.finfo(dtype).smallest_normal * (1 + len(x))
        rounded = unit_roundoff(self.a.dtype)
        tolerance["da"] = rounded * exact["da"].abs() + roundoff(M, N) * v.t() @ x.abs() + smallest
        tolerance["db"] = rounded * exact["db"].abs() + roundoff(M, K) * s * dy.abs().t() @ u + smallest
        return tolerance

    def norm_tolerance(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """The Frobenius norm that the error of each result may have, where there is an adapter; {} where there is none.

        An adapter that is missing exceeds it in every dtype, while it may lie within `tolerance` of each element.
        Roundings change an operand by at most u of its norm, |P Q| <= |P| |Q|_2, and fp32 sums are bounded as there.
        """
        if self.a is None or self.a.shape[0] == 0:
            return {}
        u = unit_roundoff(self.x.dtype)
        x, w, dy, a = self.x.double(), self.w.double(), self.dy.double(), self.a.double()
        b, kept = self.scaling * self.b.double(), x * self.mask * self.keep
        low_u, low_v = kept @ a.T, self.keep * dy @ b

        def spectral(matrix: Tensor) -> Tensor:
            return torch.linalg.matrix_norm(matrix, 2)

        def sums(left: Tensor, right: Tensor) -> Tensor:
            return SUM_FACTOR * left.shape[1] ** 0.5 * U32 * left.norm() * right.norm()

        # The errors of U by the rounding of A, of U itself and in its sums, and of V likewise.
        of_u = u * (spectral(kept) * a.norm() + low_u.norm()) + sums(kept, a)
        of_v = u * (self.keep * spectral(dy) * b.norm() + low_v.norm()) + self.keep * sums(dy, b.T)
        part_u, part_v = low_u @ b.T, low_v @ a
        tolerance = {
            "y": of_u * spectral(b) + u * (spectral(low_u) * b.norm() + part_u.norm()) + sums(x, w),
            "dx": of_v * spectral(a) + u * (spectral(low_v) * a.norm() + part_v.norm()) + sums(dy, w.T),
            "da": of_v * spectral(x) + sums(low_v.T, x.T),
            "db": of_u * abs(self.scaling) * spectral(dy) + abs(self.scaling) * sums(dy.T, low_u.T),
        }
        if self.bias is not None:
            tolerance["y"] += u * len(x) ** 0.5 * self.bias.double().norm()
        for name, dtype in (("y", self.x.dtype), ("dx", self.x.dtype), ("da", self.a.dtype), ("db", self.a.dtype)):
            tolerance[name] += unit_roundoff(dtype) * exact[name].norm() + torch.finfo(dtype).smallest_normal
        return tolerance


def attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seen: Tensor, scale: float | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """{"out", "dq", "dk", "dv": (value in float64, the error that it may have)}; a query that sees no key has zeros.

    A score is a sum of D products in fp32, and its error makes a relative one of its probability. Probabilities, and
    the derivatives dS of scores, may be rounded to the dtype before they multiply, as in FlashAttention; so may the
    result, and each gradient, once.
    """
    dtype, (H, D), (KV, keys) = q.dtype, (q.shape[1], q.shape[3]), k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    u, tiny = unit_roundoff(dtype), torch.finfo(dtype).smallest_normal
    q, k, v, dout = (t.detach().double() for t in (q, k, v, dout))
    k, v = (t.repeat_interleave(H // KV, dim=1) for t in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~seen, -math.inf)
    P = torch.softmax(scores, -1).nan_to_num(0.0)
    out, dP = P @ v, dout @ v.mT
    delta = (dout * out).sum(-1, keepdim=True)
    dS = P * (dP - delta)

    norms = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1)[:, :, None]
    lse = torch.logsumexp(scores, -1, keepdim=True).abs().nan_to_num(0.0, 0.0)
    of_scores = U32 * (SUM_FACTOR * D**0.5 * scale * norms + EXPONENTIAL + lse)
    # Both a probability and the sum that divides it have the error of the scores, and sums are of `keys` terms.
    of_P = P * (u + 2 * of_scores.amax(-1, keepdim=True) + SUM_FACTOR * keys**0.5 * U32) + tiny * u
    of_out = of_P @ v.abs() + u * out.abs() + tiny
    terms = max(keys, q.shape[2], D)
    of_dP = SUM_FACTOR * D**0.5 * U32 * dout.norm(dim=-1, keepdim=True) * v.norm(dim=-1)[:, :, None]
    of_delta = (dout.abs() * of_out).sum(-1, keepdim=True)
    of_dS = (
        of_P * (dP - delta).abs() + P * (of_dP + of_delta) + (u + SUM_FACTOR * terms**0.5 * U32) * dS.abs() + tiny * u
    )
    dq, of_dq = scale * dS @ k, scale * of_dS @ k.abs()
    dk, of_dk = scale * dS.mT @ q, scale * of_dS.mT @ q.abs()
    dv, of_dv = P.mT @ dout, of_P.mT @ dout.abs()
    groups = (q.shape[0], KV, H // KV, *k.shape[2:])
    dk, of_dk, dv, of_dv = (t.view(groups).sum(2) for t in (dk, of_dk, dv, of_dv))
    gradients = {"dq": (dq, of_dq), "dk": (dk, of_dk), "dv": (dv, of_dv)}
    return {"out": (out, of_out)} | {name: (t, e + u * t.abs() + tiny) for name, (t, e) in gradients.items()}
