"""Guards the formats of files (GGUF, GPTQ, AWQ, compressed-tensors, FP8) in every operation over a weight.

`oracle.random_of_file` makes weights of random bytes; what the bytes of a file mean is the subject of test_files.py.
test_isas.py runs this for each instruction set.
"""

import copy
import dataclasses

import cases
import oracle
import pytest
import torch

import qlora_native as qn
from qlora_native._core.layouts import LAYOUTS
from qlora_native._layers.linear import linear_class
from qlora_native.testing import assert_close_by_norm

FORMATS = [name for name, layout in LAYOUTS.items() if not layout.quantizes]
# Keyword arguments of oracle.random_of_file beside the plain weight of each format.
VARIANTS = {
    "affine4": (
        {"scale_dtype": torch.bfloat16, "blocksize": 32},
        {"zero_point": True},
        {"zero_point": True, "blocksize": 16},
        {"scale_dtype": torch.float32},
        {"zero_point": True, "blocksize": 32},
        {"zero_point": True, "column_order": True},
    ),
    "affine8": (
        {"scale_dtype": torch.bfloat16, "blocksize": 512},
        {"zero_point": True, "blocksize": 32},
        {"zero_point": True, "blocksize": 16},
        {"column_order": True},
    ),
    "fp8": ({"scale_dtype": torch.float32}, {"scale_dtype": torch.bfloat16, "blocksize": 32}, {"blocksize": 4096}),
}
WEIGHTS = [(format, variant) for format in FORMATS for variant in ({}, *VARIANTS.get(format, ()))]
# [N, K]. 576 and 200 are no multiples of 128, and 200 is none of 16, so that blocks straddle rows.
SHAPES = [(48, 256), (33, 576), (7, 200), (130, 64)]


def name_of(value):
    if isinstance(value, dict):
        return "-".join(f"{name}={each}" for name, each in value.items()) or "plain"
    return str(value)


weights = pytest.mark.parametrize(("format", "variant"), WEIGHTS, ids=name_of)


def bits_of(tensor):
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@weights
def test_decoded_weight_is_level_times_scale_plus_minimum_rounded_once(format, variant):
    for shape in SHAPES:
        q = oracle.random_of_file(format, shape, **variant)
        for dtype in cases.DTYPES:
            expected = oracle.decode(q, dtype)
            assert torch.equal(bits_of(q.dequantize(dtype)), bits_of(expected)), f"{shape} {dtype}"
            rows = torch.tensor([shape[0] - 1, 0, 3])
            assert torch.equal(bits_of(qn.functional.embedding(rows, q, dtype)), bits_of(expected[rows]))


@weights
@pytest.mark.parametrize("rows", [1, 5, 16, 70])
def test_product_and_its_gradients_are_within_their_tolerance(format, variant, rows):
    for shape, dtype in zip(SHAPES, (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16), strict=True):
        check_product(format, variant, shape, dtype, rows)


def check_product(format, variant, shape, dtype, rows, device="cpu"):
    N, K = shape
    q = oracle.random_of_file(format, shape, **variant)
    generator = torch.Generator().manual_seed(rows)
    normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    x, dy = normal(rows, K).to(dtype), normal(rows, N).to(dtype)
    a, b = 0.1 * normal(8, K), 0.1 * normal(N, 8)
    leaves = [tensor.to(device).requires_grad_() for tensor in (x, a, b)]
    y = qn.linear(leaves[0], q.to(device), None, *leaves[1:], 1.5)
    gradients = torch.autograd.grad(y, leaves, dy.to(device))
    product = oracle.Linear(x, oracle.decode(q, dtype), dy, None, a, b, 1.5)
    exact = product.exact()
    tolerance = product.tolerance(exact)
    for name, result in zip(("y", "dx", "da", "db"), (y, *gradients), strict=True):
        assert_close_by_norm(f"{name} of {shape}", result.detach().cpu(), exact[name], tolerance[name])


@pytest.mark.parametrize("format", ["q4_1", "q4_k", "q6_k", "affine4", "fp8"])
def test_experts_are_multiplied_each_by_their_own_weight(format):
    q = oracle.random_of_file(format, (3, 32, 256))
    x, offsets = torch.randn(11, 256), torch.tensor([0, 4, 4, 11])
    y = qn.functional.linear_grouped(x, q, offsets)
    w = oracle.decode(q, torch.float32)
    expected = torch.cat([part.double() @ each.double().t() for part, each in zip(x.split([4, 0, 7]), w, strict=True)])
    bound = 256 * 2**-24 * x.double().norm(dim=1)[:, None] * w.double().norm(dim=2).amax()
    assert_close_by_norm("y", y, expected, bound)


@weights
def test_layer_that_is_reset_has_its_tables_and_zeros(format, variant):
    q = oracle.random_of_file(format, (16, 256), **variant)
    layer = linear_class(q).from_quantized(q).to_empty(device="cpu")
    layer.reset_parameters()
    reset = layer.quantized_weight
    for name in ("code", "nested_code"):
        if (table := getattr(q, name)) is not None:
            assert torch.equal(getattr(reset, name).nan_to_num(-1), table.nan_to_num(-1))
    assert not reset.dequantize(torch.float32).any()
    if q.column_order is not None:
        assert torch.equal(reset.column_order, torch.arange(256, dtype=torch.int32))


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@weights
def test_state_dict_of_a_layer_is_loaded_bit_for_bit(format, variant):
    q, other = (oracle.random_of_file(format, (16, 256), seed=seed, **variant) for seed in (0, 1))
    state = linear_class(q).from_quantized(q).state_dict()
    for assign in (False, True):
        layer = linear_class(other).from_quantized(copy.deepcopy(other))
        layer.load_state_dict(state, assign=assign)
        loaded = layer.quantized_weight.tensors()
        for name, tensor in q.tensors().items():
            assert torch.equal(bytes_of(loaded[name]), bytes_of(tensor)), name


@pytest.mark.parametrize(
    ("format", "variant", "damage", "message"),
    [
        ("fp8", {}, {"absmax": torch.full((32,), 255, dtype=torch.uint8)}, "scales of mxfp4: E8M0"),
        ("fp8", {}, {"absmax": torch.full((32,), 247, dtype=torch.uint8)}, r"scales below 2\^120"),
        ("fp8", {}, {"nested_code": torch.ones(256)}, "255 finite values and NaN after them"),
        ("fp8", {"scale_dtype": torch.float32}, {"absmax": torch.full((32,), torch.nan)}, "finite values"),
        ("fp8", {"scale_dtype": torch.float32}, {"absmax": torch.full((32,), 2.0**120)}, r"scales below 2\^120"),
        ("fp8", {}, {"weight": torch.full((16, 256), 0xFF, dtype=torch.uint8)}, "numbers of E4M3"),
        ("affine4", {"column_order": True}, {"column_order": torch.zeros(256).int()}, "each of 0 ... 255 once"),
    ],
)
def test_damage_of_a_state_dict_is_named_and_changes_nothing(format, variant, damage, message):
    q = oracle.random_of_file(format, (16, 256), **variant)
    layer, (name,) = linear_class(q).from_quantized(copy.deepcopy(q)), damage
    with pytest.raises(RuntimeError, match=f"{name}: expected {message}"):
        layer.load_state_dict({**layer.state_dict(), **damage})
    for name, tensor in q.tensors().items():
        assert torch.equal(bytes_of(getattr(layer.quantized_weight, name)), bytes_of(tensor)), name


def test_scales_that_a_table_makes_too_large_are_named():
    q = oracle.random_of_file("fp8", (16, 256))
    layer, table = linear_class(q).from_quantized(copy.deepcopy(q)), q.nested_code.clone()
    table[q.absmax.max().int()] = 2.0**120
    with pytest.raises(RuntimeError, match=r"absmax: expected scales below 2\^120"):
        layer.load_state_dict({**layer.state_dict(), "nested_code": table})
    with pytest.raises(ValueError, match=r"absmax: expected scales below 2\^120"):
        dataclasses.replace(q, nested_code=table).check_values()


@weights
def test_results_do_not_depend_on_the_number_of_threads(format, variant):
    q = oracle.random_of_file(format, (130, 576), **variant)
    x = torch.randn(20, 576).bfloat16()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((q.dequantize(torch.bfloat16), qn.linear(x, q), qn.linear(x[:2], q)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
