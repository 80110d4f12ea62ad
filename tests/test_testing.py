"""Guards the checks of qlora_native.testing: they accept sums in any sensible order and find each planted error."""

import itertools

import pytest
import torch

import qlora_native as qn
from qlora_native.testing import (
    BLOCK,
    assert_close_by_norm,
    assert_error_ratio,
    blocked_product,
    product_tolerance,
    relative_error,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
M, N = 6, 48
LONG = 14336  # the longest inner dimension of the models that matter


def operands(K, dtype=torch.float32, seed=0, rows=M):
    """x [rows, K] and the decoded weight [N, K] in `dtype`, and their product in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator).to(dtype)
    w = qn.quantize(0.05 * torch.randn(N, K, generator=generator)).dequantize(dtype)
    return x, w, x.double() @ w.double().t()


def within_bound(actual, x, w, exact):
    try:
        assert_close_by_norm("y", actual, exact, product_tolerance(x, w, exact, actual.dtype))
    except AssertionError:
        return False
    return True


def within_ratio(product, K, dtype=torch.float32, seeds=3, rows=M):
    """Whether `product(x, w)`, rounded to `dtype`, is as exact as sums in blocks, over several seeds."""
    errors, yardsticks = [], []
    for seed in range(seeds):
        x, w, exact = operands(K, dtype, seed, rows)
        errors.append(relative_error(product(x, w).to(dtype), exact))
        yardsticks.append(relative_error(blocked_product(x, w).to(dtype), exact))
    try:
        assert_error_ratio("y", errors, yardsticks, rows * N)
    except AssertionError:
        return False
    return True


def pairwise(x, w):
    """The sum of the products by halves."""
    terms = (x.double()[:, None] * w.double()).float()
    while terms.shape[-1] > 1:
        terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2))
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def of_lanes(x, w, lanes=16):
    """A chain for each of so many lanes, added up at the end: what vectors along K do."""
    padding = (0, -x.shape[1] % lanes)
    x, w = (torch.nn.functional.pad(t, padding).view(len(t), -1, lanes) for t in (x, w))
    return sum(blocked_product(x[..., lane], w[..., lane]) for lane in range(lanes))


SOUND = {
    "pairwise": pairwise,
    "lanes": of_lanes,
    "blocks of 64": lambda x, w: blocked_product(x, w, 64),
    "from the last term": lambda x, w: blocked_product(x.flip(1), w.flip(1)),
    "float64": lambda x, w: x.double() @ w.double().t(),
}


@pytest.mark.parametrize(
    ("K", "dtype"), [*itertools.product((1, 33, 131, 1024), DTYPES), (LONG, torch.float32)], ids=str
)
@pytest.mark.parametrize("order", SOUND)
def test_sound_order_passes_both_checks(order, K, dtype):
    x, w, exact = operands(K, dtype)
    assert within_bound(SOUND[order](x, w).to(dtype), x, w, exact)
    assert within_ratio(SOUND[order], K, dtype)


# ---- planted errors --------------------------------------------------------------------------------------------------


def changed(tensor, index, factor):
    tensor = tensor.clone()
    tensor[index] *= factor
    return tensor


def partial_sums_in_bf16(x, w):
    parts = zip(x.split(BLOCK, dim=1), w.split(BLOCK, dim=1), strict=True)
    return sum(blocked_product(*part).bfloat16() for part in parts).float()


WRONG = {
    "one term missing": lambda x, w: blocked_product(changed(x, (3, x.shape[1] // 2), 0), w),
    "last term missing": lambda x, w: blocked_product(x[:, :-1], w[:, :-1]),
    "scale of one block is another's": lambda x, w: blocked_product(x, changed(w, (5, slice(64)), 1.1)),
    "one code is the adjacent one": lambda x, w: blocked_product(x, changed(w, (7, w[7].abs().argmax()), 0.9)),
    "partial sums in bf16": partial_sums_in_bf16,
    "block twice": lambda x, w: blocked_product(x, w) + blocked_product(x[:, :BLOCK], w[:, :BLOCK]),
}


# Over 14336 terms in 16 bits, where a sum is one chain, the bound is as large as several terms.
@pytest.mark.parametrize(("K", "dtype"), [*itertools.product((131, 1024), DTYPES), (LONG, torch.float32)], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_bound_excludes_a_wrong_element(wrong, K, dtype):
    x, w, exact = operands(K, dtype)
    assert not within_bound(WRONG[wrong](x, w).to(dtype), x, w, exact)


@pytest.mark.parametrize("K", [131, 1024])
def test_bound_excludes_operands_rounded_to_bf16(K):
    """What a matrix unit does that takes fp32 for bf16; TF32 has three bits more."""
    x, w, exact = operands(K)
    assert not within_bound(blocked_product(x.bfloat16(), w.bfloat16()), x, w, exact)
    tf32 = [(t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in (x, w)]
    assert not within_bound(blocked_product(*tf32), x, w, exact)
    assert not within_ratio(lambda x, w: blocked_product(x.half(), w.half()), K)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("K", [131, 1024])
def test_bound_excludes_a_result_that_is_cut_off(K, dtype):
    """Towards zero, not to the nearest: an error of up to twice the unit roundoff."""
    x, w, exact = operands(K, dtype)
    nearest = exact.to(dtype)
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    assert not within_bound(torch.where(nearest.double().abs() > exact.abs(), below, nearest), x, w, exact)


@pytest.mark.parametrize("K", [1024, 4096, LONG])
def test_ratio_excludes_one_chain_over_all_terms(K):
    """A restart that is forgotten: no element is beyond its bound, which holds for operands of any kind."""
    x, w, exact = operands(K)
    assert within_bound(blocked_product(x, w, K), x, w, exact)
    assert not within_ratio(lambda x, w: blocked_product(x, w, K), K)


@pytest.mark.parametrize("K", [33, 131])
def test_ratio_excludes_one_more_rounding(K):
    """Half of the sum is rounded to bf16, like the result, which makes the error 1.2 times as large."""

    def rounded_halfway(x, w):
        half = K // 2
        return blocked_product(x[:, :half], w[:, :half]).bfloat16().float() + blocked_product(x[:, half:], w[:, half:])

    assert not within_ratio(rounded_halfway, K, torch.bfloat16, rows=128)
    assert not within_ratio(rounded_halfway, K)


def test_ratio_is_of_the_median_over_seeds():
    assert_error_ratio("y", [1.0, 5.0, 1.0], [1.0, 1.0, 1.0], 10**6)  # one seed is unlucky
    assert_error_ratio("y", [0.0], [0.0], 10**6)
    for errors, ratio in (([1.0, 1.2, 1.2], 1.2), ([float("nan"), 1.0, 1.0], None), ([1.0, 9.0, 9.0], 9.0)):
        text = "nan" if ratio is None else f"{ratio:.3f} times those of fp32 sums in blocks of 128, in the median"
        with pytest.raises(AssertionError, match=text):
            assert_error_ratio("y", errors, [1.0, 1.0, 1.0], 10**6)


def test_nan_and_another_shape_are_beyond_any_bound():
    x, w, exact = operands(64)
    actual = exact.float()
    actual[1, 2] = float("nan")
    with pytest.raises(AssertionError, match=r"y: 1 of 288 elements .* The worst, \[1, 2\]: expected .* got nan"):
        assert_close_by_norm("y", actual, exact, product_tolerance(x, w, exact, torch.float32))
    with pytest.raises(AssertionError, match=r"y: expected shape \(6, 48\), got \(48, 6\)"):
        assert_close_by_norm("y", actual.t(), exact, 1.0)


# ---- the yardstick ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "block"), [(0, 128), (1, 128), (5, 2), (300, 128), (300, 300)])
def test_blocked_product_has_the_bits_of_its_definition(K, block):
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(K)
    x, w = torch.randn(3, K, generator=generator), torch.randn(4, K, generator=generator)
    expected = numpy.zeros((3, 4), numpy.float32)
    for begin in range(0, K, block):
        for m in range(3):
            for n in range(4):
                chain = numpy.float32(0)
                for k in range(begin, min(begin + block, K)):
                    product = numpy.float64(x[m, k].item()) * numpy.float64(w[n, k].item())
                    chain = numpy.float32(numpy.float64(chain) + product)
                expected[m, n] += chain
    assert torch.equal(blocked_product(x, w, block), torch.from_numpy(expected))
