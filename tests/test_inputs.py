"""Guards the unusual operands of a product: any strides, no rows, tiny values, huge shapes."""

import oracle
import pytest
import torch

import qlora_native as qn
from qlora_native import _C
from qlora_native.testing import assert_close_by_norm, product_tolerance

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def views(K, dtype=torch.float32):
    """[..., K] views of every kind, by name."""
    torch.manual_seed(0)

    def randn(*size):
        return torch.randn(*size).to(dtype)

    return {
        "transposed": randn(K, 7).t(),
        "wider rows": randn(7, K + 5)[:, 2 : K + 2],
        "every third row": randn(21, K)[::3],
        "every second column": randn(7, 2 * K)[:, ::2],
        "expanded rows": randn(1, K).expand(9, K),
        "expanded elements": randn(7, 1).expand(7, K),
        "three dimensions": randn(2, 3, K),
        "batch and sequence swapped": randn(3, 2, K).transpose(0, 1),
        "heads put together": randn(2, 4, 3, K // 4).permute(0, 2, 1, 3).flatten(2),
        "sliced sequence": randn(2, 9, K)[:, 3:7],
        "reversed": randn(7, K).flip(1),
        "one vector": randn(K),
        "four dimensions, one of 1": randn(2, 1, 3, K).transpose(1, 2),
        "unaligned": randn(7 * K + 1)[1:].view(7, K),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", views(64))
def test_any_strides_give_the_same_bits(name, dtype):
    N, K = 37, 64
    q = qn.quantize(torch.randn(N, K))
    x = views(K, dtype)[name]
    expected = qn.linear(x.reshape(-1, K).contiguous(), q)
    actual = qn.linear(x, q)
    assert actual.shape == (*x.shape[:-1], N)
    assert torch.equal(actual.reshape(-1, N), expected)


@pytest.mark.parametrize("name", views(64))
def test_any_strides_give_the_same_gradient(name):
    N, K = 64, 40
    q = qn.quantize(torch.randn(N, K))
    dy = views(N)[name]
    gradients = []
    for each in (dy, dy.reshape(-1, N).contiguous()):
        torch.manual_seed(3)
        x = torch.randn(dy.numel() // N, K).view(*each.shape[:-1], K).requires_grad_()
        a, b = (torch.randn(size).requires_grad_() for size in ((3, K), (N, 3)))
        y = qn.linear(x, q, None, a, b, 0.5, 0.25)
        gradients.append([g.reshape(-1) for g in torch.autograd.grad(y, (x, a, b), each)])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_empty_batch_is_multiplied(shape):
    q = qn.quantize(torch.randn(37, 64))
    x = torch.randn(*shape, 64, requires_grad=True)
    a, b, bias = (torch.randn(size).requires_grad_() for size in ((3, 64), (37, 3), (37,)))
    y = qn.linear(x, q, bias, a, b, 0.5, 0.25)
    assert y.shape == (*shape, 37)
    dx, da, db, dbias = torch.autograd.grad(y, (x, a, b, bias), torch.ones_like(y))
    assert dx.shape == x.shape
    for gradient, leaf in ((da, a), (db, b), (dbias, bias)):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_any_layout_of_the_adapter_gives_the_same_bits():
    q = qn.quantize(torch.randn(37, 64))
    x, a, b, bias = torch.randn(5, 64), torch.randn(64, 3).t(), torch.randn(3, 37).t(), torch.randn(74)[::2]
    expected = qn.linear(x, q, bias.contiguous(), a.contiguous(), b.contiguous(), -0.5)
    assert torch.equal(qn.linear(x, q, bias, a, b, -0.5), expected)


# ---- tiny values -----------------------------------------------------------------------------------------------------


PAIRS_OF_BF16 = ("avx512_bf16", "amx_bf16", "amx_emulated", "neon_bf16")


@pytest.mark.parametrize("M", [1, 3, 16, 200, 1100])  # the last by torch's product where panels are chosen
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_activations_count_where_the_instructions_keep_them(dtype, M):
    """Denormal activations under a weight by which the result is a normal number.

    fp32 and fp16 keep them. Instructions for pairs of bf16 take a denormal for 0, whatever the control register says:
    an error of at most |x| |w| a term.
    """
    torch.manual_seed(0)
    N, K = 48, 192
    tiny = torch.finfo(dtype).smallest_normal
    x = (tiny * torch.rand(M, K)).to(dtype)
    q = qn.quantize(1e3 * torch.randn(N, K))
    w = q.dequantize(dtype).double()
    assert ((x > 0) & (x < tiny)).any()
    exact = x.double() @ w.t()
    tolerance = product_tolerance(x, w, exact, dtype)
    assert (tolerance < exact.abs()).float().mean() > 0.9, "the test would pass with 0"
    actual = qn.linear(x, q)
    if dtype == torch.bfloat16 and _C.current_isa() in PAIRS_OF_BF16:
        tolerance = tolerance + x.double().abs() @ w.abs().t()
    assert_close_by_norm("y", actual, exact, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_values_overflow_to_infinity(dtype):
    """An overflow gives the infinity that it should, and infinities and NaN in x reach the row they are in."""
    q = qn.quantize(torch.ones(3, 64), double_quant=False)
    x = torch.ones(4, 64).to(dtype)
    x[0] = torch.finfo(dtype).max
    x[1, 5] = float("inf")
    x[2, 7] = float("nan")
    y = qn.linear(x, q)
    assert torch.equal(y[0], torch.full((3,), float("inf"), dtype=dtype))
    assert torch.equal(y[1], torch.full((3,), float("inf"), dtype=dtype))
    assert y[2].isnan().all()
    assert torch.equal(y[3], torch.full((3,), 64.0, dtype=dtype))


# ---- more than 2^31 elements -----------------------------------------------------------------------------------------

GIGABYTE = 2**30


def needs(gigabytes):
    with open("/proc/meminfo") as lines:
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if available < gigabytes * GIGABYTE:
        pytest.skip(f"needs {gigabytes} GB of free memory")


def weight_of(codes, absmax):
    """NF4 with a block a row."""
    (N, half), code = codes.shape, torch.tensor(_C.codebook("nf4"))
    return qn.QuantizedWeight(codes, absmax, None, None, None, code, (N, 2 * half), 2 * half, "nf4", torch.bfloat16)


def test_weight_of_more_than_2_31_elements_is_multiplied():
    """Codes are 0 but for the rows that are checked: untouched zeros cost no memory."""
    needs(4)
    K = 4096
    N = 2**31 // K + 9
    rows = torch.tensor([0, 1, N // 2, 2**31 // K - 1, 2**31 // K, N - 1])
    torch.manual_seed(0)
    codes, absmax = torch.zeros(N, K // 2, dtype=torch.uint8), torch.zeros(N)
    codes[rows] = torch.randint(256, (len(rows), K // 2), dtype=torch.uint8)
    absmax[rows] = torch.rand(len(rows)) + 0.1
    q = weight_of(codes, absmax)
    w = oracle.decode(weight_of(codes[rows], absmax[rows]), torch.bfloat16).double()
    x = torch.randn(1, K).bfloat16().requires_grad_()
    y = qn.linear(x, q)
    exact = x.detach().double() @ w.t()
    assert_close_by_norm("y", y.detach()[:, rows], exact, product_tolerance(x.detach(), w, exact, torch.bfloat16))
    assert y.detach().count_nonzero() == len(rows)

    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy[:, rows].double() @ w
    tolerance = product_tolerance(dy[:, rows], w.t(), exact, torch.bfloat16)
    assert_close_by_norm("dx", dx, exact, tolerance)


def test_activations_of_more_than_2_31_elements_are_multiplied():
    needs(7)
    K, N = 65536, 1
    M = 2**31 // K + 3
    rows = torch.tensor([0, 2**31 // K - 1, 2**31 // K, M - 1])
    torch.manual_seed(0)
    x = torch.zeros(M, K, dtype=torch.bfloat16)
    x[rows] = torch.randn(len(rows), K).bfloat16()
    q = qn.quantize(torch.randn(N, K))
    w = q.dequantize(torch.bfloat16).double()
    y = qn.linear(x, q)
    exact = x[rows].double() @ w.t()
    assert_close_by_norm("y", y[rows], exact, product_tolerance(x[rows], w, exact, torch.bfloat16))
    assert y.count_nonzero() == len(rows)


def test_weight_of_more_than_2_31_elements_is_dequantized():
    needs(8)
    K = 4096
    N = 2**31 // K + 1
    codes, absmax = torch.zeros(N, K // 2, dtype=torch.uint8), torch.ones(N)
    codes[-2:] = 0xF7  # 1 and 0, where byte 0 is -1 twice
    w = weight_of(codes, absmax).dequantize()
    assert (w[[0, N // 2, N - 3]] == -1).all()
    assert (w[-2:, ::2] == 1).all() and (w[-2:, 1::2] == 0).all()
    again = qn.quantize(w, blocksize=K, double_quant=False)
    del w
    assert torch.equal(again.absmax, absmax)
    assert torch.equal(again.codes[-3:], codes[-3:]) and torch.equal(again.codes[0], codes[0])
