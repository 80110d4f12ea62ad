"""The expected results of the operations: those of the package's own check (_check/reference.py), with yardsticks for
how exact a result is as a whole, and random weights of files.
"""

import hashlib
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

import qlora_native as qn
from qlora_native._check import reference
from qlora_native._check.reference import decode, scales  # noqa: F401  (for tests)
from qlora_native._core.formats import codes_shape
from qlora_native._core.layouts import LAYOUTS, LEVELS, SCALE_LEVELS
from qlora_native._core.microscaling import scale_table
from qlora_native.testing import blocked_product, relative_error

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


def distance_to_nearest(levels, values):
    """How far each value is from the nearest of `levels`, in float64."""
    levels = levels.double().sort().values
    above = torch.searchsorted(levels, values).clamp(1, len(levels) - 1)
    return torch.minimum((levels[above] - values).abs(), (levels[above - 1] - values).abs())


class Linear(reference.Linear):
    """A product as the package's own check has it, with yardsticks: sums in blocks, and torch's dense operations.

    torch itself sums dy to dbias, so that has a tolerance and no yardstick.
    """

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


def spread(size, count):
    """At most `count` of the indices below `size`, from first to last."""
    return torch.linspace(0, max(size - 1, 0), min(size, count)).round().long()
