"""Guards the ops of calibrated quantization against their definitions in float64.

Codes are compared exactly. So that fp32 cannot decide another way, the seeds are of problems in which no decision is
near a tie: the oracle checks that.
"""

import dataclasses

import numpy as np
import pytest
import torch

from qlora_native._core.calibrate import add_gram, quantize_with_feedback, weighted_scales
from qlora_native._core.formats import CODEBOOKS
from qlora_native._core.quantize import quantize

ops = torch.ops.qlora_native
OWN = torch.linspace(-0.9, 1.0, 16) ** 3
CODES = {"nf4": CODEBOOKS["nf4"], "fp4": CODEBOOKS["fp4"], "int4": CODEBOOKS["int4"], "codebook": OWN, "int8": None}
formats = pytest.mark.parametrize("format", CODES)
# N, K, blocksize: blocks that are whole rows, that straddle them, and one; columns whose number is odd.
SHAPES = [(4, 64, 64), (6, 40, 16), (5, 33, 32), (3, 7, 64)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
TIE = 1e-4  # how far a decision must be from a tie, in parts of a block's scale


def levels_of(code):
    """The levels in float64, times one scale, and the number of each."""
    if code is None:
        return np.arange(-127, 128) / 127.0, np.arange(-127, 128)
    return code.double().numpy(), np.arange(16)


def nearest(t, code):
    """The place of the nearest level of each element, and the distance to the nearest tie."""
    levels, _ = levels_of(code)
    order = np.argsort(levels, kind="stable")
    ordered = levels[order]
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order[(middles < t[..., None]).sum(-1)], np.abs(t[..., None] - middles).min(-1)


def problem(shape, seed):
    """A weight, and the inputs of its layer with correlated columns of different sizes."""
    N, K, _ = shape
    generator = np.random.default_rng(seed)
    weight = 0.1 * generator.standard_normal((N, K))
    x = generator.standard_normal((4 * K, K)) @ (np.eye(K) + 0.3 * generator.standard_normal((K, K)))
    x *= np.exp(generator.standard_normal(K))
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(x, dtype=torch.float32)


def of_blocks(values, shape):
    """[N, K]: the value of each element's block."""
    N, K, blocksize = shape
    return np.repeat(values, blocksize)[: N * K].reshape(N, K)


def feedback(weight, x, scales, shape, code):
    """What GPTQ's algorithm 1 gives in float64: the order, U, the codes [N, K], and the distance to a tie."""
    K = shape[1]
    gram = x.double().numpy().T @ x.double().numpy()
    order = np.argsort(-np.diag(gram))
    damped = (gram + 0.01 * np.mean(np.diag(gram)) * np.eye(K))[np.ix_(order, order)]
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    levels, numbers = levels_of(code)
    w, scale = weight.double().numpy()[:, order], of_blocks(scales.double().numpy(), shape)[:, order]
    codes, margin = np.zeros(w.shape, dtype=np.int64), np.inf
    for i in range(K):
        t = np.divide(w[:, i], scale[:, i], out=np.zeros(len(w)), where=scale[:, i] != 0)
        place, distance = nearest(t, code)
        margin = min(margin, distance.min())
        codes[:, order[i]] = numbers[place]
        error = (w[:, i] - levels[place] * scale[:, i]) / factor[i, i]
        w[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return order, factor, codes, margin


def unpacked(codes, shape, code):
    """int64 [N, K]"""
    N, K, _ = shape
    if code is None:
        return codes.view(torch.int8).view(N, K).numpy().astype(np.int64)
    return torch.stack((codes >> 4, codes & 15), -1).flatten()[: N * K].view(N, K).numpy().astype(np.int64)


@formats
@shapes
def test_codes_with_feedback_are_those_of_the_algorithm_in_float64(shape, format):
    code, found = CODES[format], 0
    for seed in range(200):
        weight, x = problem(shape, seed)
        scales = weighted_scales(weight, x.square().sum(0), code, blocksize=shape[2])
        scales[1::3] *= -1  # the op takes any scale but an infinite one
        order, factor, codes, margin = feedback(weight, x, scales, shape, code)
        if margin < (TIE if format != "int8" else 1e-6):
            continue
        found += 1
        got = quantize_with_feedback(
            weight, torch.tensor(order), torch.tensor(factor).float(), scales, code, blocksize=shape[2]
        )
        assert np.array_equal(unpacked(got, shape, code), codes), seed
        if found == 3:
            return
    raise AssertionError("every seed has a decision near a tie")


@formats
def test_feedback_lowers_the_error_of_the_output(format):
    shape = (16, 64, 64)
    weight, x = problem(shape, 0)
    q = quantize(weight, "nf4" if format == "codebook" else format, double_quant=False)
    order, factor, _, _ = feedback(weight, x, q.absmax, shape, q.code)
    codes = quantize_with_feedback(weight, torch.tensor(order), torch.tensor(factor).float(), q.absmax, q.code)
    with_feedback = dataclasses.replace(q, codes=codes).dequantize(torch.float32)
    errors = [(x @ (weight - w).T).norm() for w in (q.dequantize(torch.float32), with_feedback)]
    assert errors[1] < 0.8 * errors[0]


def error_of_scales(weight, importance, scales, shape, code):
    """The weighted error of each block, in float64."""
    N, K, blocksize = shape
    w, scale = weight.double().numpy(), of_blocks(scales.astype(np.float64), shape)
    place, _ = nearest(np.divide(w, scale, out=np.zeros(w.shape), where=scale != 0), code)
    error = (w - levels_of(code)[0][place] * scale) ** 2 * importance.double().numpy()
    flat = np.zeros(-(-N * K // blocksize) * blocksize)
    flat[: N * K] = error.ravel()
    return flat.reshape(-1, blocksize).sum(-1)


@formats
@shapes
def test_scales_have_the_least_weighted_error_of_all_candidates(shape, format):
    code = CODES[format]
    for seed in range(5):
        weight, x = problem(shape, seed)
        importance = x.square().sum(0)
        scales = weighted_scales(weight, importance, code, blocksize=shape[2]).numpy()
        N, K, blocksize = shape
        flat = np.zeros(-(-N * K // blocksize) * blocksize)
        flat[: N * K] = weight.numpy().ravel()
        absmax = np.abs(flat).reshape(-1, blocksize).max(-1)
        grid = np.linspace(0.5, 1.15, 40)
        candidates = [r * absmax for r in grid]
        least = np.min([error_of_scales(weight, importance, each, shape, code) for each in candidates], axis=0)
        got = error_of_scales(weight, importance, scales, shape, code)
        assert (got <= least * (1 + 1e-4) + 1e-12 * absmax**2 * importance.sum().item()).all()
        assert (np.abs((scales / absmax)[:, None] - grid).min(-1) < 1e-6).all()


def test_scale_of_zeros_is_0_and_columns_without_importance_count_alike():
    weight, importance = torch.randn(4, 64), torch.zeros(64)
    weight[1] = 0
    scales = weighted_scales(weight, importance, CODES["nf4"])
    assert scales[1] == 0 and (scales[[0, 2, 3]] > 0).all()
    assert torch.equal(scales, weighted_scales(weight, torch.full((64,), 7.0), CODES["nf4"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("T, K", [(0, 5), (1, 1), (300, 65), (520, 200)])
def test_gram_is_within_the_bound_of_its_sums_and_symmetric(dtype, T, K):
    torch.manual_seed(0)
    x = torch.randn(2, T, K + 3)[..., :K].to(dtype)  # rows that are not next to each other, and two dimensions of them
    start = torch.randn(K, K)
    start = start + start.T
    gram = start.clone()
    add_gram(gram, x)
    rows = x.double().reshape(-1, K)
    bound = start.abs() + rows.abs().T @ rows.abs()
    error = (gram - (start.double() + rows.T @ rows)).abs()
    assert (error <= (256 + 2 * T // 256 + 3) * 2**-24 * bound).all()
    assert torch.equal(gram, gram.T)


def test_results_have_the_same_bits_for_any_number_of_threads():
    shape = (300, 203, 64)
    weight, x = problem(shape, 1)
    factor = torch.eye(203) + 0.02 * torch.randn(203, 203).triu(1)
    order = torch.randperm(203)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            gram = torch.zeros(203, 203)
            add_gram(gram, x)
            scales = weighted_scales(weight, gram.diag().contiguous(), CODES["nf4"])
            codes = quantize_with_feedback(weight, order, factor, scales, CODES["nf4"])
            results.append((gram, scales, codes))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_ops_pass_opcheck(format):
    code, bits = CODES[format], 8 if format == "int8" else 4
    weight, x = problem((3, 21, 32), 0)
    torch.library.opcheck(ops.gram.default, (torch.zeros(21, 21), x))
    torch.library.opcheck(ops.weighted_scales.default, (weight, x.square().sum(0), code, bits, 32, 0.5, 1.15, 40))
    scales = weighted_scales(weight, torch.ones(21), code, blocksize=32)
    operands = (weight, torch.randperm(21), torch.eye(21), scales, code, bits, 32)
    torch.library.opcheck(ops.quantize_with_feedback.default, operands)


W, NF4 = torch.ones(2, 64), CODES["nf4"]
EYE, ORDER, ABSMAX = torch.eye(64), torch.arange(64), torch.ones(2)


def with_value(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: add_gram(EYE, [1.0]), TypeError, "^x: expected a tensor, got list"),
        (lambda: add_gram(EYE, torch.ones(3, 64).double()), TypeError, "^x: expected torch.float32, torch.bfloat16"),
        (lambda: add_gram(EYE, torch.ones(3, 63)), ValueError, r"^gram: expected \[63, 63\]"),
        (lambda: add_gram(EYE.double(), W), TypeError, "^gram: expected torch.float32"),
        (lambda: add_gram(torch.ones(64, 65)[:, :64], W), ValueError, "^gram: expected a contiguous tensor"),
        (lambda: add_gram(W[:, :0], W[:, :0]), ValueError, r"^x: expected \[..., K\]"),
        (lambda: add_gram(EYE, EYE), ValueError, "^x: expected memory apart from that of gram"),
        (lambda: weighted_scales(W.half(), ABSMAX, NF4), TypeError, "^weight: expected torch.float32"),
        (lambda: weighted_scales(W[0], ABSMAX, NF4), ValueError, r"^weight: expected \[N, K\]"),
        (lambda: weighted_scales(W.t(), ABSMAX, NF4), ValueError, "^weight: expected a contiguous tensor"),
        (lambda: weighted_scales(W, W[0, :63], NF4), ValueError, r"^importance: expected \[64\]"),
        (lambda: weighted_scales(W, -W[0], NF4), ValueError, "^importance: expected values >= 0, got -1"),
        (lambda: weighted_scales(W, W[0] * torch.nan, NF4), ValueError, "^importance: expected finite values"),
        (lambda: weighted_scales(with_value(W, (1, 2), torch.nan), W[0], NF4), ValueError, "^weight: .* nan at 66"),
        (lambda: weighted_scales(W, W[0], NF4[:8]), ValueError, r"^code: expected \[16\]"),
        (lambda: weighted_scales(W, W[0], NF4, blocksize=48), ValueError, "^blocksize: expected a power of two"),
        (lambda: weighted_scales(W, W[0], NF4, blocksize=64.0), TypeError, "^blocksize: expected an int"),
        (lambda: weighted_scales(W, W[0], NF4, lo=0.0), ValueError, "^lo: expected a finite value > 0"),
        (lambda: weighted_scales(W, W[0], NF4, lo="1"), ValueError, "^lo: expected a finite number"),
        (lambda: weighted_scales(W, W[0], NF4, hi=0.4), ValueError, "^hi: expected a finite value >= lo"),
        (lambda: weighted_scales(W, W[0], NF4, steps=0), ValueError, "^steps: expected an int in 1 ... 1024"),
        (lambda: quantize_with_feedback(W, ORDER.int(), EYE, ABSMAX, NF4), TypeError, "^order: expected torch.int64"),
        (lambda: quantize_with_feedback(W, ORDER[1:], EYE, ABSMAX, NF4), ValueError, r"^order: expected \[64\]"),
        (
            lambda: quantize_with_feedback(W, with_value(ORDER, 4, 3), EYE, ABSMAX, NF4),
            ValueError,
            "^order: expected each column once, got 3 at 4 again",
        ),
        (
            lambda: quantize_with_feedback(W, ORDER, with_value(EYE, (7, 7), 0.0), ABSMAX, NF4),
            ValueError,
            "^factor: expected a diagonal of finite values > 0, got 0.* at 7",
        ),
        (lambda: quantize_with_feedback(W, ORDER, EYE[1:], ABSMAX, NF4), ValueError, r"^factor: expected \[64, 64\]"),
        (lambda: quantize_with_feedback(W, ORDER, EYE, ABSMAX[1:], NF4), ValueError, r"^scales: expected \[2\]"),
        (
            lambda: quantize_with_feedback(W, ORDER, EYE, ABSMAX * torch.inf, NF4),
            ValueError,
            "^scales: expected finite values",
        ),
        (
            lambda: quantize_with_feedback(W, ORDER, EYE + torch.full((64, 64), 1e30).triu(1), ABSMAX / 9, NF4),
            ValueError,
            "^factor: expected one that keeps the weight finite",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_tensors_of_a_gpu_are_refused():
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="^gram: expected a tensor on the CPU, .* got one on cuda"):
        add_gram(torch.ones(3, 3).as_subclass(OnGpu), torch.ones(2, 3))
