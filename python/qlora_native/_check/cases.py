"""One process of the check: `python -m qlora_native._check.cases DEVICE WHAT` prints a line of JSON for each result.

DEVICE is cpu or cuda:0, and WHAT is "all", "products", "rest" (all but products) or "sanitizer" (a few of all). The
environment chooses the instruction set, or the kernel of a GPU: QLN_FORCE_ISA, QLN_FORCE_KERNEL.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C, optim
from .._core.attention import attention
from .._core.checked_devices import EMULATED, OPTIONAL_KERNELS
from .._core.elementwise import gated_activation, rms_norm
from .._core.errors import dtype_name
from .._core.inputs import draw_seed
from .._core.layouts import LEVELS
from .._core.linear import linear, linear_grouped
from .._core.loss import linear_cross_entropy
from .._core.quantize import embedding, quantize
from .._core.weight import QuantizedWeight
from ..testing import SUM_FACTOR, assert_close_by_norm, unit_roundoff
from . import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALING = 1.7
CACHED_BYTES = 1 << 28  # more than all operands of a product
LOSS_ROUNDINGS = 6  # to the dtype of the hidden states, of what makes a loss or a gradient
# Names of results that are no kernel's of the chooser.
ADAPTER, DECODED, QUANTIZED, OPTIMIZER = "adapter's gradients", "dequantize", "quantize", "optimizers"
PRODUCTS_OF_SCALAR, LOSS, ELEMENTWISE, ATTENTION = "products", "loss", "activations, norms", "attention"
# wgmma has kernels for tiles of so many rows, by blocks alone and in pairs.
WGMMA_TILES = [f"wgmma:{rows},{blocks}" for rows in (16, 32, 64, 128, 256) for blocks in ("alone", "pairs")]


@dataclass(frozen=True)
class Product:
    """A product with its gradients: Y [M, N] = X [M, K] . W^T, and an adapter."""

    M: int
    N: int
    K: int
    format: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    bias: bool = False
    rank: int = 0
    dropout: float = 0.0
    experts: int = 0  # of which each has some rows, a weight and an adapter; the second has no rows
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        more = f", rank {self.rank}" * (self.rank > 0) + f", dropout {self.dropout}" * (self.dropout > 0)
        more += f", {self.experts} experts" * (self.experts > 0) + ", bias" * self.bias
        return f"[{self.M}, {self.K}] . [{self.N}, {self.K}]^T, {self.format}, {dtype_name(self.dtype)}{more}"


# They straddle what a kernel takes at a time: rows of X, 64 elements of a row of W, its vectors and blocks. The first
# ones, of few rows, are for the kernels of these.
PRODUCTS = (
    Product(1, 130, 333, bias=True),
    Product(8, 200, 192, rank=16, dropout=0.25),
    Product(5, 72, 1088, "fp4", 128, double_quant=False),
    Product(3, 72, 320, "affine4", rank=4),
    Product(13, 136, 192, experts=3, rank=5),
    Product(9, 136, 160, blocksize=32, rank=5, dropout=0.25),
    Product(40, 200, 704),
    Product(24, 136, 448, "fp4", rank=16),
    Product(70, 130, 333, rank=16, dropout=0.25, bias=True),
    Product(70, 200, 192, "int8", 128, double_quant=False, rank=4),
    Product(70, 72, 320, "affine4"),
    Product(70, 96, 320, "nvfp4", 16),
    Product(100, 264, 320, "int4", bias=True),
    Product(129, 136, 448, rank=16, dropout=0.25),
    Product(257, 264, 192, rank=70, bias=True),
)
# More rows than the CPU's tables have thresholds for, and with AVX-512 in fp32 a row short enough for panels.
MANY_ROWS = (Product(1030, 72, 131, rank=4, bias=True),)
# Several tiles for each multiprocessor of a GPU, clusters of blocks and shared tiles; not over the emulator.
LARGE = (Product(17, 4104, 1088, rank=16), Product(300, 2056, 1600, rank=16, bias=True))
FEW_PRODUCTS = PRODUCTS[1:10:3]  # for compute-sanitizer, under which a kernel takes many times as long
OF_TILES = (Product(70, 200, 704), Product(300, 264, 192, rank=16, dropout=0.25))


# ---- what is printed -------------------------------------------------------------------------------------------------


def emit(**fields: object) -> None:
    """Print a line of JSON at once, for what comes next may end the process."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def compare(line: str, what: str, actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """Print how near a result is to its definition."""
    actual = actual.detach().cpu()
    try:
        assert_close_by_norm(what, actual, expected, tolerance)
    except AssertionError as error:
        return emit(line=line, error=str(error))
    ratios = (actual.double() - expected).abs() / tolerance
    emit(line=line, ratio=float(ratios.max()) if ratios.numel() else 0.0)


def compare_bits(line: str, what: str, actual: Tensor, expected: Tensor) -> None:
    """Print whether all bits are the same."""
    bits = {4: torch.int32, 2: torch.int16}[expected.element_size()]
    differ = int((actual.cpu().view(bits) != expected.view(bits)).sum())
    if differ:
        emit(line=line, error=f"{what}: {differ} of {expected.numel()} elements have other bits")
    else:
        emit(line=line, ratio=0.0)


def emit_digest(line: str, what: str, tensors: Iterable[Tensor]) -> None:
    """Print a hash of the bits of tensors, for a comparison with those of scalar."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(bytes(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist()))
    emit(line=line, what=what, digest=hashed.hexdigest())


def compare_norms(line: str, what: str, actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Print how near a result is as a whole: the Frobenius norm of its error, and the one that it may have."""
    error = (actual.detach().cpu().double() - expected).norm()
    compare(line, f"the norm of the error of {what}", error, torch.zeros_like(error), allowed)


# ---- products --------------------------------------------------------------------------------------------------------


def kernels_of(compute: Callable[[], list[Tensor]]) -> tuple[list[str], list[Tensor]]:
    """The kernels that QLN_PRINT_CONFIG=1 says a computation was done by, and its results. Scalar chooses none."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            results = [result.cpu() for result in compute()]  # waits for a GPU
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    # A CPU prints "Y [1, 130] of W [130, 333] in float32: small_m", a GPU "[1, 333] to [1, 130] ...: gemv, 9 blocks".
    found = re.findall(r"^(?:Y |dX |)\[[^:]*: (\w+)", text, re.MULTILINE)
    return sorted(set(found)) or [PRODUCTS_OF_SCALAR], results


def random_weight(case: Product, generator: torch.Generator) -> QuantizedWeight:
    """Rows of different sizes; of "affine4", a format of files, random codes and zero points."""
    shape = (case.experts, case.N, case.K) if case.experts else (case.N, case.K)
    if case.format == "affine4":
        blocks = case.N * case.K // case.blocksize
        return QuantizedWeight(
            codes=torch.randint(256, (case.N, case.K // 2), dtype=torch.uint8, generator=generator),
            absmax=(0.02 * torch.randn(blocks, generator=generator)).half(),
            nested_absmax=None,
            nested_code=None,
            offset=None,
            code=LEVELS["affine4"].clone(),
            shape=shape,
            blocksize=case.blocksize,
            format=case.format,
            dtype=torch.bfloat16,
            zero_point=torch.randint(-8, 8, (blocks,), generator=generator).to(torch.int8),
        )
    weight = torch.randn(shape, generator=generator) * (0.3 + torch.rand((*shape[:-1], 1), generator=generator))
    return quantize(0.05 * weight, case.format, case.blocksize, case.double_quant)


def check_product(case: Product, device: str, forced: str) -> None:
    """Compare Y, dX, dA and dB with their definitions. A result counts for the kernel that made it.

    Where `forced` names a kernel, results of others are left to the processes that force these.
    """
    generator = torch.Generator().manual_seed(case.M + 1000 * case.N + case.K)

    def randn(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype)

    q = random_weight(case, generator)
    experts = (case.experts,) * (case.experts > 0)
    x, dy = randn(case.M, case.K, dtype=case.dtype), randn(case.M, case.N, dtype=case.dtype)
    bias = randn(*experts, case.N) if case.bias else None
    a = randn(*experts, case.rank, case.K, scale=case.K**-0.5) if case.rank else None
    b = randn(*experts, case.N, case.rank, scale=0.1) if case.rank else None
    leaves = [None if t is None else t.clone().to(device).requires_grad_() for t in (x, a, b)]
    adapter = (bias if bias is None else bias.to(device), *leaves[1:], SCALING, case.dropout)
    ends = [0, case.M // 3, case.M // 3, case.M] if case.experts else [0, case.M]
    torch.manual_seed(1)
    if case.experts:
        offsets = torch.tensor(ends, device=device)
        forward = lambda: linear_grouped(leaves[0], q.to(device), offsets, *adapter)  # noqa: E731
    else:
        forward = lambda: linear(leaves[0], q.to(device), *adapter)  # noqa: E731
    graph: list[Tensor] = []
    taken, (y,) = kernels_of(lambda: [graph.append(forward()), graph[0].detach()][1:])
    if forced and taken != [forced]:
        return
    results, kernels = {"y": y}, {"y": taken}
    if forced != "gemv":  # which is for Y alone
        wanted = {name: leaf for name, leaf in zip(("dx", "da", "db"), leaves, strict=True) if leaf is not None}
        backward = lambda: list(torch.autograd.grad(graph[0], list(wanted.values()), dy.to(device)))  # noqa: E731
        taken, gradients = kernels_of(backward)
        results |= dict(zip(wanted, gradients, strict=True))
        kernels["dx"] = taken
    torch.manual_seed(1)
    seed = int(draw_seed(x)) if case.dropout else 0
    w = reference.decode(q, case.dtype)
    for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if begin == end:
            continue
        each = [t if t is None or not case.experts else t[i] for t in (bias, a, b)]
        of_group = reference.Linear(
            x[begin:end], w[i] if case.experts else w, dy[begin:end], *each, SCALING, case.dropout, seed
        )
        exact = of_group.exact()
        tolerance = of_group.tolerance(exact, by_torch=any("panels" in taken for taken in kernels.values()))
        norms = of_group.norm_tolerance(exact)
        for name, result in results.items():
            rows = result[begin:end] if name in ("y", "dx") else result[i] if case.experts else result
            for kernel in kernels.get(name, [ADAPTER]):
                if name in kernels and forced and kernel != forced:
                    continue
                compare(kernel, f"{name} of {case}", rows, exact[name], tolerance[name])
                if name in norms:
                    compare_norms(kernel, f"{name} of {case}", rows, exact[name], norms[name])


def check_products(device: str, cases: Iterable[Product], dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Check products in each dtype, by the kernel that QLN_FORCE_KERNEL names, or those that are chosen."""
    forced = re.split("[:,]", os.environ.get("QLN_FORCE_KERNEL", ""))[0]
    for case in cases:
        for dtype in dtypes:
            emit(line=forced or "products", begin=str(replace(case, dtype=dtype)))
            check_product(replace(case, dtype=dtype), device, forced)


def check_forced_tiles(device: str) -> None:
    """Check each tile of wgmma, if it is forced; the shapes of `PRODUCTS` choose some."""
    for tile in WGMMA_TILES:
        os.environ["QLN_FORCE_KERNEL"] = tile
        check_products(device, OF_TILES, (torch.bfloat16,))


# ---- the other operations --------------------------------------------------------------------------------------------


def check_weights(device: str) -> None:
    """Compare codes and scales with those of scalar, and decoded weights with their definition, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for format in ("nf4", "fp4", "int4", "int8", "mxfp4", "nvfp4"):
        for dtype in DTYPES:
            weight = (0.05 * torch.randn(33, 352, generator=generator)).to(dtype)
            what = f"{format}, {dtype_name(dtype)}"
            emit(line=QUANTIZED, begin=what)
            q = quantize(weight.to(device), format, None, False)
            emit_digest(QUANTIZED, what, q.tensors().values())
            emit(line=DECODED, begin=what)
            for each in (q, quantize(weight.to(device), format)):
                w = reference.decode(each.to("cpu"), dtype)
                compare_bits(DECODED, what, each.dequantize(dtype), w)
                rows = torch.tensor([32, 0, 7])
                compare_bits(DECODED, f"rows of {what}", embedding(rows.to(device), each, dtype), w[rows])


def check_optimizers(device: str) -> None:
    """Compare the parameters after three steps with those of scalar, bit for bit."""
    for optimizer_class in (optim.AdamW8bit, optim.Lion8bit, optim.AdEMAMix8bit):
        for dtype in DTYPES:
            what = f"{optimizer_class.__name__}, {dtype_name(dtype)}"
            emit(line=OPTIMIZER, begin=what)
            generator = torch.Generator().manual_seed(0)
            randn = lambda size, scale: scale * torch.randn(size, generator=generator)  # noqa: B023, E731
            params = [torch.nn.Parameter(randn(n, 0.02).to(device, dtype)) for n in (3, 257, 5000)]
            optimizer = optimizer_class(params, lr=1e-2, weight_decay=0.1, min_8bit_size=256)
            for _ in range(3):
                for param in params:
                    param.grad = randn(param.shape, 1e-3).to(device, dtype)
                optimizer.step()
            emit_digest(OPTIMIZER, what, params)


def check_loss(device: str) -> None:
    """Compare the loss of a linear layer's logits and its gradients with float64, by a dense and a 4-bit weight."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1030, (37,), generator=generator)
    labels[::5] = -100
    for dtype in DTYPES:
        hidden = torch.randn(37, 96, generator=generator).to(dtype)
        dense = (torch.randn(1030, 96, generator=generator) / 96**0.5).to(dtype)
        q = quantize(dense)
        for head, w in ((dense, dense), (q, reference.decode(q, dtype))):
            what = f"{'4-bit' if head is q else 'dense'} weight, {dtype_name(dtype)}"
            emit(line=LOSS, begin=what)
            x = hidden.to(device).requires_grad_()
            loss = linear_cross_entropy(x, head.to(device), labels.to(device))
            (dx,) = torch.autograd.grad(loss, x)
            exact = hidden.double().requires_grad_()
            logits = exact @ w.double().T
            logits = logits + (logits.to(dtype).double() - logits).detach()  # they are rounded to the dtype
            expected = F.cross_entropy(logits, labels)
            (wanted,) = torch.autograd.grad(expected, exact)
            for name, actual, value in (("the loss", loss.to(dtype), expected.detach()), ("the gradient", dx, wanted)):
                allowed = SUM_FACTOR * LOSS_ROUNDINGS**0.5 * unit_roundoff(dtype) * value.norm()
                compare_norms(LOSS, f"{name}, {what}", actual, value, allowed)


def check_elementwise(device: str) -> None:
    """Compare gated activations and RMS norms, and their gradients, with float64."""
    generator = torch.Generator().manual_seed(0)

    def check(what: str, dtype: torch.dtype, ours: Callable[..., Tensor], exact: Callable[..., Tensor], *sizes: tuple):
        operands = [torch.randn(size, generator=generator).to(dtype) for size in (*sizes, sizes[0])]
        emit(line=ELEMENTWISE, begin=what)
        results = []
        for function, convert in ((ours, lambda t: t.to(device)), (exact, lambda t: t.double())):
            *leaves, dy = (convert(t) for t in operands)
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            y = function(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        for actual, value in zip(*results, strict=True):
            # Each is some operations in fp32, rounded once; that of a norm's weight is a sum over rows.
            allowed = (4 * unit_roundoff(dtype) + 64 * 2**-24) * value.abs().max()
            compare(ELEMENTWISE, what, actual, value, allowed)

    norm = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w  # noqa: E731
    for dtype in DTYPES:
        for name, exact in (("silu", F.silu), ("gelu_tanh", lambda t: F.gelu(t, approximate="tanh"))):
            check(
                f"{name}, {dtype_name(dtype)}",
                dtype,
                lambda gate, up, name=name: gated_activation(gate, up, name),
                lambda gate, up, exact=exact: exact(gate) * up,
                (7, 333),
                (7, 333),
            )
        check(f"rms_norm, {dtype_name(dtype)}", dtype, lambda x, w: rms_norm(x, w, 1e-5), norm, (7, 333), (333,))


def check_attention() -> None:
    """Compare causal attention and its gradients with float64."""
    for B, H, KV, T, D in ((2, 3, 1, 33, 80), (1, 2, 2, 70, 64)):
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(0)
            sizes = ((B, T, H, D), (B, T, KV, D), (B, T, KV, D), (B, T, H, D))
            q, k, v, dout = (torch.randn(size, generator=generator).to(dtype).transpose(1, 2) for size in sizes)
            what = f"{T} queries of {D}, {dtype_name(dtype)}"
            emit(line=ATTENTION, begin=what)
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = attention(*leaves, is_causal=True)
            results = (out.detach(), *torch.autograd.grad(out, leaves, dout))
            seen = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
            wanted = reference.attention(q, k, v, dout, seen)
            for actual, (name, (value, tolerance)) in zip(results, wanted.items(), strict=True):
                compare(ATTENTION, f"{name}, {what}", actual, value, tolerance)


# ---- the process -----------------------------------------------------------------------------------------------------


def use_kernel(device: str, kernel: str) -> None:
    """Compute the products of a GPU by a kernel where it can, and by the general one elsewhere.

    What another kernel does wrong, or hangs in, is then no error of this one. "" is the general kernel for all.
    """
    os.environ["QLN_FORCE_KERNEL"] = kernel
    _C.disable_cuda_kernels(torch.device(device).index or 0, [name for name in OPTIONAL_KERNELS if name != kernel])


def steps(device: str, what: str) -> Iterator[Callable[[], None]]:
    """The checks of this process, in order."""
    on_cpu = device == "cpu" and not EMULATED
    if what in ("all", "products"):
        yield lambda: check_products(device, PRODUCTS + (MANY_ROWS if on_cpu else () if EMULATED else LARGE))
        if os.environ.get("QLN_FORCE_KERNEL") == "wgmma":
            yield lambda: check_forced_tiles(device)
    if what == "sanitizer":
        for kernel in ("general", *OPTIONAL_KERNELS):
            yield lambda kernel=kernel: use_kernel(device, kernel)
            yield lambda: check_products(device, FEW_PRODUCTS, (torch.bfloat16,))
        yield lambda: use_kernel(device, "")
    if what != "products":
        yield from (lambda check=check: check(device) for check in REST)
        if on_cpu:
            yield check_attention


REST = (check_weights, check_optimizers, check_loss, check_elementwise)


def main(device: str, what: str) -> None:
    """Do the checks that the command line names."""
    if device != "cpu" or EMULATED:
        use_kernel(device, os.environ.get("QLN_FORCE_KERNEL", ""))
    torch.empty(CACHED_BYTES, dtype=torch.uint8, device=device)  # torch keeps it, so no kernel fails for want of memory
    torch.backends.cuda.matmul.allow_tf32 = False  # these would be torch's errors
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for step in steps(device, what):
        step()
    emit(end=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
