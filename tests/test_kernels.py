"""Guards the kernels of a product on the CPU (product/config.h), forced on products of every kind: tiles, and panels.

Tiles are chosen on processors that have them; panels of decoded weight are multiplied by torch.
tests/cpp/test_cpu_product_config.cpp tests the choice.
"""

import itertools
import os

import cases
import oracle
import process
import pytest
import test_conformance as conformance
import test_grouped as grouped
import torch

import qlora_native as qn
from qlora_native import _C
from qlora_native.testing import assert_error_ratio


def run(call, **environment):
    """What a call prints in a process of its own, and the kernels of its products."""
    done = process.succeed("-c", f"from test_kernels import *; {call}", QLN_PRINT_CONFIG="1", **environment)
    printed = [line for line in done.stderr.splitlines() if line.startswith(("Y [", "dX ["))]
    return done.stdout.strip(), [line.rsplit(": ", 1)[1] for line in printed]


def ragged_cases():
    """Every dtype over ragged shapes, formats and adapters, without the dropout that panels leave to other kernels."""
    for dtype, (M, N, K), rank in itertools.product(
        cases.DTYPES, ((3, 34, 190), (9, 37, 333), (40, 64, 256), (129, 80, 200), (5, 3, 65)), (None, 1, 16, 70)
    ):
        yield cases.Product(M, N, K, dtype, bias=M % 2 == 1, rank=rank, lora_dtype=dtype if M == 9 else torch.float32)
    for dtype, format, blocksize in itertools.product(cases.DTYPES, cases.FORMATS, (32, 4096)):
        yield cases.Product(17, 37, 333, dtype, format, blocksize, double_quant=blocksize == 32)
    for dtype in (torch.float32, torch.bfloat16):  # several panels of W, forward and backward
        yield cases.Product(20, 9100, 480, dtype, bias=True, rank=16)
        yield cases.Product(20, 480, 9100, dtype, rank=16)


def check_products(*products, by_torch=True):  # whose product multiplies panels
    for case in products:
        try:
            conformance.check_product(case, by_torch=by_torch)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


def without_dropout():
    return (*ragged_cases(), *(case for case in cases.large_m() if case.dropout == 0))


def bf16(products):
    """Those that an emulated processor with AMX multiplies by tiles or by panels."""
    return [case for case in products if case.dtype == torch.bfloat16]


def test_products_by_panels_are_within_the_bounds():
    _, kernels = run("check_products(*without_dropout())", QLN_FORCE_KERNEL="panels")
    assert kernels and set(kernels) == {"panels"}


def check_exactness():
    """Against torch's products with W, A and B, as PEFT computes them; and in 16 bits against sums in blocks, where the
    adapter and the bias give little of the result."""
    M, N, K, rank = 96, 256, 1024, 16
    for dtype, (adapter, of_bias) in itertools.product(cases.DTYPES, ((0.1, 0.1), (0.1, 10.0), (10.0, 0.0))):
        by_torch = dtype == torch.float32 or adapter > 0.1 or of_bias > 0.1
        errors = {"y": [], "dx": []}
        for seed in range(conformance.SEEDS):
            generator = torch.Generator().manual_seed(seed)
            sizes = (N, K), (M, K), (M, N), (rank, K), (N, rank), (N,)
            w, x, dy, a, b, bias = (torch.randn(size, generator=generator) for size in sizes)
            q = qn.quantize(w / K**0.5)
            x, dy = x.to(dtype).requires_grad_(), dy.to(dtype)
            a, b, bias = a / K**0.5, adapter * b / rank**0.5, of_bias * bias
            y = qn.linear(x, q, bias, a, b)
            (dx,) = torch.autograd.grad(y, x, dy)
            reference = oracle.Linear(x.detach(), oracle.decode(q, dtype), dy, bias, a, b)
            dense = reference.dense()  # with as many threads as ours, since torch's sums differ with them
            with oracle.one_thread():
                exact, blocked = reference.exact(), reference.blocked()
                for name, result in (("y", y.detach()), ("dx", dx)):
                    error, yardstick = reference.errors(name, result, blocked, exact)
                    if by_torch:
                        yardstick = reference.errors(name, dense[name], blocked, exact)[0]
                    errors[name].append((error, yardstick))
        for name, pairs in errors.items():
            what = f"{name} in {dtype}, {adapter}, {of_bias}"
            assert_error_ratio(what, *zip(*pairs, strict=True), reference.independent(name))


def test_products_by_panels_are_as_exact_as_those_of_torch():
    _, kernels = run("check_exactness()", QLN_FORCE_KERNEL="panels")
    assert kernels and set(kernels) == {"panels"}


def test_products_by_panels_beside_tiles_are_within_the_bounds():
    call, isa = "check_products(*bf16(without_dropout()))", {"QLN_FORCE_ISA": "amx_emulated"}
    _, kernels = run(call, QLN_FORCE_KERNEL="panels", **isa)
    assert kernels and set(kernels) == {"panels"}


def test_products_of_large_m_are_by_tiles():
    """What a processor with AMX chooses, on any. Emulated tiles are slow, so the widest product is left out."""
    call = "check_products(*bf16(case for case in cases.large_m() if case.N < 1000))"
    _, kernels = run(call, QLN_FORCE_ISA="amx_emulated")
    assert set(kernels) == {"tiles"}


def test_gradient_with_dropout_takes_another_kernel():
    _, kernels = run("check_dropout()", QLN_FORCE_KERNEL="panels")
    assert kernels == ["vectors", "vectors"]


def check_experts(*dtypes):
    for dtype in dtypes:
        for rows in grouped.ROUTINGS.values():
            grouped.test_groups_are_products_of_their_own(dtype, rows, True)
        grouped.test_one_adapter_may_serve_all_groups(dtype)


def check_adapters(*dtypes):
    for dtype in dtypes:
        grouped.test_index_gives_each_row_its_adapter(dtype, [0, 0, 1, 2, 2])


# What a machine with AMX has beside the kernels of others.
MACHINES = pytest.mark.parametrize(
    ("dtypes", "environment"),
    [("*cases.DTYPES", {}), ("torch.bfloat16", {"QLN_FORCE_ISA": "amx_emulated"})],
    ids=["here", "amx_emulated"],
)


@MACHINES
def test_experts_by_panels_are_products_of_their_own(dtypes, environment):
    _, kernels = run(f"check_experts({dtypes})", QLN_FORCE_KERNEL="panels", **environment)
    assert set(kernels) == {"panels"}


@MACHINES
def test_rows_of_one_weight_with_several_adapters_are_multiplied_without_panels(dtypes, environment):
    _, kernels = run(f"check_adapters({dtypes})", QLN_FORCE_KERNEL="panels", **environment)
    assert kernels and "panels" not in kernels


def check_dropout():
    conformance.check_product(cases.Product(40, 64, 256, torch.float32, rank=16, dropout=0.25))


def print_digest():
    """Products that are chosen for tiles, and products that are not."""
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    results = []
    for M, N, K in ((4, 200, 513), (16, 257, 1100), (33, 130, 700), (300, 96, 1030), (64, 1400, 704), (70, 66, 64)):
        torch.manual_seed(M)
        for format in ("nf4", "int8"):
            q = qn.quantize(torch.randn(N, K), format, double_quant=format == "nf4")
            x = torch.randn(M, K).bfloat16().requires_grad_()
            bias, a, b = (torch.randn(size).requires_grad_() for size in ((N,), (19, K), (N, 19)))
            y = qn.linear(x, q, bias, a, b, 0.5, 0.25)
            results += [y, *torch.autograd.grad(y, (x, bias, a, b), torch.randn_like(y))]
    print(oracle.digest(results))


def test_emulated_tiles_give_the_same_bits_for_any_number_of_threads():
    digests = {run("print_digest()", QLN_FORCE_ISA="amx_emulated", THREADS=str(threads))[0] for threads in (1, 2, 3)}
    assert len(digests) == 1


@pytest.mark.skipif("amx_bf16" not in _C.available_isas(), reason="this processor has no AMX")
def test_emulated_tiles_give_the_bits_of_the_processors():
    (emulated, kernels), (processors, more) = (
        run("print_digest()", QLN_FORCE_ISA=isa, QLN_FORCE_KERNEL="tiles") for isa in ("amx_emulated", "amx_bf16")
    )
    assert set(kernels) == set(more) == {"tiles"}
    assert emulated == processors


def test_unknown_kernel_is_named_beside_the_known():
    with pytest.raises(AssertionError, match="expected small_m, vectors, tiles or panels, got .other"):
        run("check_dropout()", QLN_FORCE_KERNEL="other")
