"""Guards products of rows in groups: each group is the plain product by its weight and its adapter."""

import functools

import pytest
import torch
from peak import saved_bytes

import qlora_native as qn
from qlora_native._core.weight import op_arguments
from qlora_native.functional import linear_grouped
from qlora_native.testing import SUM_FACTOR, unit_roundoff

N, K, RANK = 40, 192, 4
ROUTINGS = {
    "one token": [1, 0, 0],
    "all on one": [0, 33, 0],
    "empty ones between": [0, 7, 0, 0, 25, 1, 0],
    "many rows": [70, 3, 130],
    "no token": [0, 0],
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
routings = pytest.mark.parametrize("rows", ROUTINGS.values(), ids=ROUTINGS)


def offsets_of(rows, first=0):
    return torch.tensor([first, *rows]).cumsum(0)


def operands(groups, rows, dtype, experts=True, requires_grad=True):
    """x [T, K], q, bias, lora_a [G, RANK, K], lora_b [G, N, RANK], the gradient dy [T, N]."""
    torch.manual_seed(0)
    count = (groups,) if experts else ()
    q = qn.quantize(torch.randn(*count, N, K) / K**0.5)
    x, dy = torch.randn(rows, K).to(dtype), torch.randn(rows, N).to(dtype)
    bias = torch.randn(*count, N).to(dtype)
    a, b = torch.randn(groups, RANK, K) / K**0.5, torch.randn(groups, N, RANK) / RANK**0.5
    for tensor in (x, bias, a, b):
        tensor.requires_grad_(requires_grad)
    return x, q, bias, a, b, dy


def float64(x, q, offsets, bias, a, b, dy, scaling):
    """(y, dx, dbias, da, db) by plain torch in float64, group by group."""
    weight = q.dequantize(torch.float32).double()
    x, bias, a, b = (tensor.detach().double().requires_grad_() for tensor in (x, bias, a, b))
    parts = [x[: offsets[0]] @ weight.mT + bias] if weight.dim() == 2 else []
    for g in range(len(offsets) - 1):
        w, c = (weight[g], bias[g]) if weight.dim() == 3 else (weight, bias)
        part = x[offsets[g] : offsets[g + 1]]
        parts.append(part @ w.mT + scaling * (part @ a[g].mT) @ b[g].mT + c)
    y = torch.cat(parts)
    return y.detach(), *torch.autograd.grad(y, (x, bias, a, b), dy.double(), materialize_grads=True, allow_unused=True)


def assert_close(actual, expected, dtype, roundings):
    """As a whole: the norm of the error against that of the result, of so many independent roundings."""
    error, norm = (actual.double() - expected).norm(), expected.norm()
    assert error <= SUM_FACTOR * roundings**0.5 * unit_roundoff(dtype) * norm + 1e-30, float(error / norm)


@dtypes
@routings
@pytest.mark.parametrize("experts", [True, False], ids=["experts", "one weight"])
def test_groups_are_products_of_their_own(dtype, rows, experts):
    first = 0 if experts else 3
    offsets = offsets_of(rows, first)
    x, q, bias, a, b, dy = operands(len(rows), int(offsets[-1]), dtype, experts)
    y = linear_grouped(x, q, offsets, bias, a, b, 0.5)
    assert y.shape == dy.shape and y.dtype == dtype
    actual = y.detach(), *torch.autograd.grad(y, (x, bias, a, b), dy)
    # W, A, B and U or V are rounded to the dtype of x, and the result once more.
    for value, expected in zip(actual, float64(x, q, offsets, bias, a, b, dy, 0.5), strict=True):
        assert_close(value, expected, dtype, 5)


@dtypes
def test_group_has_the_bits_that_it_has_alone(dtype):
    rows = [9, 3, 0, 40]
    x, q, bias, a, b, dy = operands(len(rows), sum(rows), dtype)
    offsets = offsets_of(rows)
    y = linear_grouped(x, q, offsets, bias, a, b, 0.5)
    for g, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        one = offsets_of([0] * g + [int(end - begin)] + [0] * (len(rows) - g - 1))
        assert torch.equal(linear_grouped(x[begin:end], q, one, bias, a, b, 0.5), y[begin:end])


@pytest.mark.parametrize("format", ["nf4", "int8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(5, 63), (7, 96), (16, 128)], ids=str)
def test_experts_may_straddle_blocks_and_bytes(format, shape):
    torch.manual_seed(0)
    q = qn.quantize(torch.randn(3, *shape), format)
    rows = [4, 0, 30]
    x = torch.randn(sum(rows), shape[1], requires_grad=True)
    y = linear_grouped(x, q, offsets_of(rows))
    (dx,) = torch.autograd.grad(y.sum(), x)
    weight = q.dequantize(torch.float32).double()
    parts = x.detach().double().split(rows)
    assert_close(y.detach(), torch.cat([x @ w.mT for x, w in zip(parts, weight, strict=True)]), torch.float32, 5)
    assert_close(dx, torch.cat([w.sum(0).expand(n, -1) for n, w in zip(rows, weight, strict=True)]), torch.float32, 5)


@dtypes
def test_one_adapter_may_serve_all_groups(dtype):
    rows = [5, 0, 21]
    x, q, bias, a, b, dy = operands(len(rows), sum(rows), dtype)
    a, b = a[0].detach().requires_grad_(), b[0].detach().requires_grad_()
    y = linear_grouped(x, q, offsets_of(rows), bias, a, b)
    same = [tensor.detach().expand(len(rows), *tensor.shape) for tensor in (a, b)]
    expected = float64(x, q, offsets_of(rows), bias, *same, dy, 1.0)
    da, db = torch.autograd.grad(y, (a, b), dy)
    assert_close(y.detach(), expected[0], dtype, 5)
    assert_close(da, expected[3].sum(0), dtype, 5)
    assert_close(db, expected[4].sum(0), dtype, 5)


@dtypes
@pytest.mark.parametrize("index", [[0, 0, 1, 2, 2], [2, -1, 0, 2, 1], [1] * 5, [-1] * 5], ids=str)
def test_index_gives_each_row_its_adapter(dtype, index):
    index = torch.tensor(index).repeat(4)[:18].view(3, 6)
    x, q, bias, a, b, dy = operands(3, 18, dtype, experts=False)
    x3 = x.detach().view(3, 6, K).requires_grad_()
    y = linear_grouped(x3, q, None, bias, a, b, 0.5, adapter_index=index)
    dx, da, db = torch.autograd.grad(y, (x3, a, b), dy.view(3, 6, N))
    order = index.flatten().argsort(stable=True)
    offsets = torch.searchsorted(index.flatten()[order], torch.arange(4))
    expected = float64(x[order], q, offsets, bias, a, b, dy[order], 0.5)
    assert_close(y.detach().view(18, N)[order], expected[0], dtype, 5)
    assert_close(dx.view(18, K)[order], expected[1], dtype, 5)
    assert_close(da, expected[3], dtype, 5)
    assert_close(db, expected[4], dtype, 5)


@dtypes
def test_gradient_with_dropout_is_that_of_the_mask_of_forward(dtype):
    """y is linear in x for one mask, so <y(x), dy> = <x, dx>; the mask is drawn from torch's generator."""
    rows = [4, 0, 40]
    x, q, _, a, b, dy = operands(len(rows), sum(rows), dtype)
    torch.manual_seed(5)
    y = linear_grouped(x, q, offsets_of(rows), None, a, b, 0.5, lora_dropout=0.4)
    dx, da = torch.autograd.grad(y, (x, a), dy)
    product = (y.detach().double() * dy.double()).sum()
    scale = y.detach().double().norm() * dy.double().norm()
    assert abs(product - (x.detach().double() * dx.double()).sum()) <= SUM_FACTOR * 3 * unit_roundoff(dtype) * scale
    # dA sees the mask too: <A, dA> is the low-rank part of that product.
    base = linear_grouped(x.detach(), q, offsets_of(rows))
    low_rank = ((y.detach().double() - base.double()) * dy.double()).sum()
    assert abs(low_rank - (a.detach().double() * da.double()).sum()) <= SUM_FACTOR * 3 * unit_roundoff(dtype) * scale


def test_opcheck_of_grouped_products():
    ops = torch.ops.qlora_native
    rows = [4, 0, 9]
    x, q, bias, a, b, dy = operands(len(rows), sum(rows), torch.float32)
    seed = torch.tensor(7)
    groups = (offsets_of(rows), len(rows))
    lora = (0.5, 0.25, seed)
    torch.library.opcheck(ops.linear_forward, (x, *op_arguments(q), bias, a, b, *lora, *groups))
    x, a, b = x.detach(), a.detach(), b.detach()
    torch.library.opcheck(ops.linear_backward_input, (dy, *op_arguments(q), a, b, *lora, True, *groups))
    u, v = torch.randn(sum(rows), RANK), torch.randn(sum(rows), RANK)
    torch.library.opcheck(ops.lora_gradients, (x, dy, u, v, 0.5, 0.25, seed, torch.float32, groups[0], len(rows)))


def test_nothing_of_the_weight_is_saved_for_backward():
    rows = [4, 0, 9]
    x, q, bias, a, b, _ = operands(len(rows), sum(rows), torch.bfloat16)
    call = functools.partial(linear_grouped, x, q, offsets_of(rows), bias, a, b)
    _, saved = saved_bytes(call, x, a, b, *q.tensors().values())
    assert saved <= sum(rows) * RANK * 2 + 64  # U, and the offsets


INDEX = torch.zeros(9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"offsets": torch.tensor([0, 5, 4, 9])}, r"groups.offsets\[2\]: expected >= 5, the one before, got 4"),
        ({"offsets": torch.tensor([0, 5, 6, 8])}, r"groups.offsets\[3\]: expected 9, the number of rows, got 8"),
        ({"offsets": torch.tensor([1, 5, 6, 9])}, r"groups.offsets\[0\]: expected 0, for every row has a weight"),
        ({"offsets": torch.tensor([0, 5, 9])}, r"offsets: expected \[4\] for a weight \[3, 40, 192\], got \[3\]"),
        ({"offsets": torch.tensor([0.0, 5, 6, 9])}, r"offsets: expected an int64 tensor"),
        ({"offsets": None}, r"offsets, adapter_index: expected one of them, got none"),
        ({"x": torch.zeros(3, 3, K)}, r"x: expected \[T, 192\] with offsets, got \[3, 3, 192\]"),
        ({"bias": torch.zeros(N)}, r"bias: expected \[3, 40\], got \[40\]"),
        ({"lora_a": torch.zeros(2, RANK, K)}, r"lora_a: expected \[3, rank, 192\], got \[2, 4, 192\]"),
        ({"lora_b": torch.zeros(3, N, 5)}, r"lora_b: expected \[3, 40, 4\], the rank of lora_a, got \[3, 40, 5\]"),
        ({"adapter_index": INDEX}, r"offsets, adapter_index: expected one of them, got both"),
        ({"offsets": None, "adapter_index": INDEX}, r"adapter_index: expected offsets instead, where each group has"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_argument_of_groups_is_named_in_the_error(change, error):
    x, q, bias, a, b, _ = operands(3, 9, torch.float32, requires_grad=False)
    good = {"x": x, "q": q, "offsets": offsets_of([5, 1, 3]), "bias": bias, "lora_a": a, "lora_b": b}
    linear_grouped(**good)
    with pytest.raises((TypeError, ValueError), match=error):
        linear_grouped(**{**good, **change})


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (torch.tensor([0, 1, 3, 0]), r"adapter_index: expected -1 ... 2, got 3 at row 2"),
        (torch.tensor([0, -2, 1, 0]), r"adapter_index: expected -1 ... 2, got -2 at row 1"),
        (torch.tensor([0, 1, 2]), r"adapter_index: expected \[4\], as the rows of x, got \[3\]"),
        (torch.tensor([0, 1, 2, 0]).int(), r"adapter_index: expected an int64 tensor, got torch.int32"),
    ],
    ids=["above", "below", "shape", "dtype"],
)
def test_bad_index_is_located_in_the_error(index, error):
    x, q, bias, a, b, _ = operands(3, 4, torch.float32, experts=False, requires_grad=False)
    with pytest.raises((TypeError, ValueError), match=error):
        linear_grouped(x, q, None, bias, a, b, adapter_index=index)


def test_plain_product_of_experts_names_the_grouped_one():
    _, q, *_ = operands(3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"q: expected a weight \[N, K\]; linear_grouped multiplies by several"):
        qn.linear(torch.zeros(2, K), q)
