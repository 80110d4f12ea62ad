"""The expected results of the operations, by their definitions in plain torch and float64.

Nothing of ours is used but the container. Each result has the error that it may have, from the norms of the operands
(qlora_native.testing explains it). The low-rank parts are rounded once more than a plain product, because U or V, and A
and B, are rounded to the dtype of x. By Cauchy-Schwarz |U[m,r]| <= |x_m| |a_r|, so these errors are bounded by norms
too.
"""

import hashlib
import math
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

import qlora_native as qn
from qlora_native._core.formats import codes_shape
from qlora_native._core.layouts import LAYOUTS, LEVELS, SCALE_LEVELS
from qlora_native._core.microscaling import scale_table
from qlora_native.testing import (
    SUM_FACTOR,
    blocked_product,
    chain_length,
    product_tolerance,
    relative_error,
    unit_roundoff,
)

U32 = unit_roundoff(torch.float32)
# Roundings of the low-rank part to the dtype of x: of A, of s*B, of U (or of B and V). Where torch multiplies, the part
# is a product of its own, which is rounded before it becomes a term of the result's sum.
LOW_RANK_ROUNDINGS = 3
LOW_RANK_ROUNDINGS_BY_TORCH = 4
# Elements of a result that are compared with sums in blocks, which take long.
SAMPLE = 2048


@contextmanager
def one_thread():
    """For many small operations of torch, whose threads wait for each other longer than they work, and on a busy
    machine many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digest(tensors):
    """A hash over the bits of tensors."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def scales(q):
    """The fp32 scale of each block: types.h, each operation rounded by itself."""
    if q.nested_absmax is None:
        return q.absmax.float()
    nested = q.nested_absmax.repeat_interleave(q.layout.nested_blocksize)[: q.absmax.numel()]
    return q.nested_code[q.absmax.long()] * nested + q.offset.reshape(())


def minima(q):
    """The fp32 minimum of each block, or None."""
    if q.zero_point is not None:
        return -(q.zero_point.float() * scales(q))
    if q.nested_minimum is None:
        return None if q.minimum is None else q.minimum.float()
    nested = q.nested_minimum.repeat_interleave(q.layout.nested_blocksize)[: q.minimum.numel()]
    return q.nested_code[q.minimum.long()] * nested


def decode(q, dtype):
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


def random_of_file(format, shape, blocksize=None, scale_dtype=None, zero_point=False, column_order=False, seed=0):
    """A weight in a format of files, of random codes, scales and minima. Subnormal and negative scales occur."""
    layout = LAYOUTS[format]
    generator = torch.Generator().manual_seed(seed)
    elements = math.prod(shape)
    blocksize = blocksize or layout.blocksize or 128
    blocks = -(-elements // blocksize)
    nested_blocks = -(-blocks // layout.nested_blocksize)
    byte = lambda *size, high=256: torch.randint(high, size, dtype=torch.uint8, generator=generator)  # noqa: E731
    normal = lambda size: 0.02 * torch.randn(size, generator=generator)  # noqa: E731
    nested = layout.nested and scale_dtype is None
    # In K-quants scales and minima have 6 bits, 4 in q2_k, and 8 with a sign in q6_k.
    high = {"q2_k": 16, "q6_k": 256, "fp8": 1}.get(format, 64)
    dtype = scale_dtype or (layout.scales[0] if layout.scales else None)
    codes = byte(*codes_shape(*shape, bits=layout.bits))
    if format == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    if format in ("q5_0", "q6_k"):
        codes = byte(*shape, high=64) - 32
    if format in ("q5_1", "q5_k"):
        codes = byte(*shape, high=32)
    absmax = byte(blocks, high=high) + (120 if format == "fp8" else 0) if nested else normal(blocks).to(dtype)
    if not nested:
        absmax[::7] = 2.0**-20  # subnormal in fp16
    levels = SCALE_LEVELS.get(format)
    middle = 8 if layout.bits == 4 else 128
    zeros = (byte(blocks, high=2 * middle).to(torch.int16) - middle).to(torch.int8) if zero_point else None
    nested_absmax = torch.ones(nested_blocks) if format == "fp8" else normal(nested_blocks).half().float()
    minimum = {"stored": lambda: normal(blocks).to(dtype), "nested": lambda: byte(blocks, high=high)}.get(
        layout.minimum
    )
    return qn.QuantizedWeight(
        codes=codes,
        absmax=absmax,
        nested_absmax=nested_absmax if nested else None,
        nested_code=(scale_table("mxfp4") if levels is None else levels.clone()) if nested else None,
        offset=torch.tensor(-0.0) if nested else None,
        code=None if layout.bits == 8 else LEVELS[format].clone(),
        shape=shape,
        blocksize=blocksize,
        format=format,
        dtype=torch.bfloat16,
        minimum=None if minimum is None else minimum(),
        nested_minimum=-normal(nested_blocks).half().float() if layout.minimum == "nested" else None,
        zero_point=zeros,
        column_order=torch.randperm(shape[-1], generator=generator).int() if column_order else None,
    )


def dropout_mask(seed, M, K, p):
    """[M, K] of 0 and 1: Philox4x32-10 as common/philox.h lays it out."""
    threshold = min(round(p * 65536), 65535)
    m, block = np.meshgrid(np.arange(M, dtype=np.uint64), np.arange(-(-K // 8), dtype=np.uint64), indexing="ij")
    low = np.uint64(0xFFFFFFFF)
    words = [block & low, m & low, m >> np.uint64(32), np.zeros_like(m)]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        products = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (products[1] >> np.uint64(32)) ^ words[1] ^ np.uint64(key[0]),
            products[1] & low,
            (products[0] >> np.uint64(32)) ^ words[3] ^ np.uint64(key[1]),
            products[0] & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    halves = np.stack([word >> np.uint64(shift) & np.uint64(0xFFFF) for word in words for shift in (0, 16)], axis=-1)
    kept = halves.reshape(M, 8 * halves.shape[1])[:, :K] >= threshold
    return torch.from_numpy(kept.astype(np.float64))


def distance_to_nearest(levels, values):
    """How far each value is from the nearest of `levels`, in float64."""
    levels = levels.double().sort().values
    above = torch.searchsorted(levels, values).clamp(1, len(levels) - 1)
    return torch.minimum((levels[above] - values).abs(), (levels[above - 1] - values).abs())


class Linear:
    """One product with its gradients: in float64, by sums in blocks, and as torch's dense operations give it; and how
    far off an element may be. All is 2-D: x [M, K], w [N, K] as decoded to the dtype of x, dy [M, N].

    torch itself sums dy to dbias, so that has a tolerance and no yardstick.
    """

    def __init__(self, x, w, dy, bias=None, lora_a=None, lora_b=None, scaling=1.0, dropout=0.0, seed=0):
        self.x, self.w, self.dy, self.bias = x, w, dy, bias
        self.a, self.b, self.scaling = lora_a, lora_b, scaling
        self.keep = 1 / (1 - dropout)
        self.mask = dropout_mask(seed, *x.shape, dropout) if dropout else torch.ones(x.shape, dtype=torch.float64)

    def exact(self):
        """{"y", "dx", "dbias", "da", "db"} in float64, of the operands as they are given (w rounded, the rest not)."""
        return self._run(lambda t: t.double())

    def dense(self, device="cpu"):
        """The same by torch on `device` in the dtype of x, as PEFT computes it."""
        results = self._run(lambda t: t.to(device, self.x.dtype))
        return {name: t.cpu() for name, t in results.items()}

    def accumulated(self, device="cpu"):
        """{"y", "dx"} by torch's product with w that is added to the adapter's part, as panels are multiplied on a CPU;
        {} where there is no such part, or one with dropout."""
        if self.a is None or self.keep != 1:
            return {}
        x, w, dy, a, b = (
            t.detach().to(device, self.x.dtype) for t in (self.x, self.w, self.dy, self.a, self.scaling * self.b)
        )
        part = F.linear(F.linear(x, a), b, None if self.bias is None else self.bias.detach().to(x))
        return {"y": torch.addmm(part, x, w.t()).cpu(), "dx": torch.addmm(dy @ b @ a, dy, w).cpu()}

    def _run(self, convert):
        x, w, dy, mask = (convert(t) for t in (self.x, self.w, self.dy, self.mask * self.keep))
        leaves = {"dx": x, "dbias": self.bias, "da": self.a, "db": self.b}
        leaves = {name: convert(leaf.detach()).requires_grad_() for name, leaf in leaves.items() if leaf is not None}
        y = F.linear(leaves["dx"], w, leaves.get("dbias"))
        if self.a is not None:
            y = y + F.linear(F.linear(leaves["dx"] * mask, leaves["da"]), leaves["db"]) * self.scaling
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def sample(self, name):
        """Which elements of a result the yardstick is for: (rows, columns), spread over all of it."""
        (M, K), N = self.x.shape, len(self.w)
        rank = 0 if self.a is None else len(self.a)
        rows, columns = {"y": (M, N), "dx": (M, K), "da": (rank, K), "db": (N, rank)}[name]
        count = min(rows, max(SAMPLE // max(columns, 1), 32))
        return spread(rows, count), spread(columns, SAMPLE // max(count, 1))

    def blocked(self):
        """{"y", "dx", "da", "db"}: the sampled elements by `blocked_product`, rounded where ours are (linear.h)."""
        x, w, dy, dtype = self.x, self.w, self.dy, self.x.dtype
        kept = (x.double() * self.mask).to(dtype)
        low_rank = self.a is not None and len(self.a) > 0
        if low_rank:
            a, b, scaled_b = self.a.to(dtype), self.b.to(dtype), (self.scaling * self.b.float()).to(dtype)
            u = (blocked_product(kept, a) * self.keep).to(dtype)
            v = (blocked_product(dy, b.t()) * (self.scaling * self.keep)).to(dtype)
        rows, columns = self.sample("y")
        y = blocked_product(x[rows], w[columns])
        if low_rank:
            y = y + blocked_product(u[rows], scaled_b[columns])
        if self.bias is not None:
            y = y + self.bias.to(dtype)[columns].float()
        rows, columns = self.sample("dx")
        dx = blocked_product(dy[rows], w.t()[columns])
        if low_rank:
            dx = dx + blocked_product(v[rows], a.t()[columns]) * self.mask[rows][:, columns].float()
        results = {"y": y.to(dtype), "dx": dx.to(dtype)}
        if low_rank:
            rows, columns = self.sample("da")
            results["da"] = blocked_product(v.t()[rows], kept.t()[columns]).to(self.a.dtype)
            rows, columns = self.sample("db")
            results["db"] = (blocked_product(dy.t()[rows], u.t()[columns]) * self.scaling).to(self.b.dtype)
        return results

    def errors(self, name, actual, blocked, exact):
        """The relative errors of a result and of its sums in blocks, over the sampled elements."""
        rows, columns = self.sample(name)
        right = exact[name][rows][:, columns]
        return relative_error(actual[rows][:, columns], right), relative_error(blocked[name], right)

    def independent(self, name):
        """The number of independent errors in a sample: those of an adapter's gradient are those of U or V."""
        rows, columns = self.sample(name)
        count = len(rows) * len(columns)
        return min(count, len(self.x) * len(self.a)) if name in ("da", "db") else count

    def tolerance(self, exact, by_torch=False):
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


def spread(size, count):
    """At most `count` of the indices below `size`, from first to last."""
    return torch.linspace(0, max(size - 1, 0), min(size, count)).round().long()
