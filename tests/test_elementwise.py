"""Guards gated activations and RMS norms: gradients against float64, and what they save for backward.

Their values for each instruction set and dtype are checked by tests/cpp/test_elementwise.cpp.
"""

import pytest
import torch
import torch.nn.functional as F
from peak import saved_bytes

import qlora_native as qn
from qlora_native.functional import gated_activation, linear, rms_norm
from qlora_native.testing import unit_roundoff

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def tensors(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def normalized(x, weight, eps, shift):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (shift + weight)


def assert_within(actual, expected, dtype, roundings=2):
    """The largest error in units of the largest element: each is a few operations in fp32, rounded once."""
    allowed = (roundings * unit_roundoff(dtype) + 64 * 2**-24) * expected.abs().max()
    assert (actual.double() - expected).abs().max() <= allowed


@dtypes
@activations
@pytest.mark.parametrize("shape", [(3, 5, 40), (7, 33), (16,), (0, 8)], ids=str)
def test_gated_activation_and_its_gradients_are_those_of_float64(activation, dtype, shape):
    gate, up = tensors(dtype, shape, shape)
    dh = torch.randn(shape).to(dtype)
    h = gated_activation(gate, up, activation)
    assert h.dtype == dtype and h.shape == shape
    doubles = [each.detach().double().requires_grad_() for each in (gate, up)]
    expected = ACTIVATIONS[activation](doubles[0]) * doubles[1]
    if h.numel():
        assert_within(h.detach(), expected.detach(), dtype)
        wanted = torch.autograd.grad(expected, doubles, dh.double())
        for actual, each in zip(torch.autograd.grad(h, (gate, up), dh), wanted, strict=True):
            assert actual.dtype == dtype
            assert_within(actual, each, dtype)


@dtypes
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 5, 40), (7, 33), (16,), (2100, 8)], ids=str)
def test_norm_and_its_gradients_are_those_of_float64(dtype, shift, shape):
    x, weight = tensors(dtype, shape, shape[-1:])
    dy = torch.randn(shape).to(dtype)
    y = rms_norm(x, weight, 1e-5, shift=shift)
    assert y.dtype == dtype and y.shape == shape
    doubles = [each.detach().double().requires_grad_() for each in (x, weight)]
    expected = normalized(*doubles, 1e-5, shift)
    assert_within(y.detach(), expected.detach(), dtype)
    wanted = torch.autograd.grad(expected, doubles, dy.double())
    for actual, each in zip(torch.autograd.grad(y, (x, weight), dy), wanted, strict=True):
        assert actual.dtype == dtype
        assert_within(actual, each, dtype, roundings=4)


@pytest.mark.parametrize("rows", [4, 300])
def test_error_is_at_most_that_of_the_parts(rows):
    """Both in bfloat16 against float64, in the mean."""
    gate, up, x, weight = tensors(torch.bfloat16, (rows, 64), (rows, 64), (rows, 64), (64,))
    with torch.no_grad():
        exact = F.silu(gate.double()) * up.double()
        assert error(gated_activation(gate, up), exact) <= error(F.silu(gate) * up, exact)
        exact = normalized(x.double(), weight.double(), 1e-6, 0.0)
        parts = weight * normalized(x.float(), 1.0, 1e-6, 0.0).to(torch.bfloat16)
        assert error(rms_norm(x, weight), exact) <= error(parts, exact)


def error(actual, exact):
    return float((actual.double() - exact).norm())


def test_gated_activation_saves_its_operands_alone():
    gate, up = tensors(torch.bfloat16, (50, 64), (50, 64))
    assert saved_bytes(lambda: gated_activation(gate, up), gate, up)[1] == 0
    assert saved_bytes(lambda: F.silu(gate) * up, gate, up)[1] == 50 * 64 * 2


def test_norm_saves_its_input_and_one_number_a_row():
    x, weight = tensors(torch.bfloat16, (50, 64), (64,))
    assert saved_bytes(lambda: rms_norm(x, weight), x, weight)[1] == 50 * 4


def test_product_that_follows_saves_the_operands_in_the_place_of_the_activation():
    """And gives the gradients, to the bit, that it gives where it saves the activation."""
    gate, up, a, b = tensors(torch.bfloat16, (50, 64), (50, 64), (4, 64), (32, 4))
    q = qn.quantize(torch.randn(32, 64))

    def product(convert):
        return linear(convert(gated_activation(gate, up)), q, None, a, b)

    y, saved = saved_bytes(lambda: product(lambda h: h), gate, up)
    y_of_h, saved_with_h = saved_bytes(lambda: product(lambda h: h.view_as(h)), gate, up)  # nothing is known of this h
    assert saved_with_h - saved == 50 * 64 * 2
    dy = torch.randn_like(y)
    gradients = (torch.autograd.grad(each, (gate, up, a, b), dy) for each in (y, y_of_h))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_activation_that_was_written_to_is_saved_as_it_is():
    gate, up, a, b = tensors(torch.float32, (5, 64), (5, 64), (4, 64), (32, 4))
    q = qn.quantize(torch.randn(32, 64))

    def gradient(scale):
        h = gated_activation(gate, up)
        scale(h)
        return torch.autograd.grad(linear(h, q, None, a, b).sum(), a)[0]

    with torch.no_grad():
        scaled = gated_activation(gate, up) * 2
    expected = torch.autograd.grad(linear(scaled, q, None, a, b).sum(), a)[0]
    assert torch.equal(gradient(lambda h: h.mul_(2)), expected)


def test_halves_of_one_tensor_are_used_in_place():
    whole = torch.randn(6, 80)
    gate, up = whole.chunk(2, dim=-1)
    torch.testing.assert_close(gated_activation(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(gated_activation(gate.t(), up.t()), (F.silu(gate) * up).t())  # columns as rows


def test_ops_pass_opcheck():
    gate, up, x, weight = tensors(torch.float32, (3, 4, 8), (3, 4, 8), (3, 8), (8,))
    ops = torch.ops.qlora_native
    torch.library.opcheck(ops.gated_activation.default, (gate, up, 0))
    torch.library.opcheck(ops.gated_activation.default, (gate.detach().bfloat16(), up.detach().bfloat16(), 1))
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 0.0, 1e-6))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "gate", lambda x: gated_activation([1.0], x)),
        (TypeError, "gate", lambda x: gated_activation(x.long(), x)),
        (TypeError, "up", lambda x: gated_activation(x, x.double())),
        (TypeError, "up", lambda x: gated_activation(x, x.bfloat16())),
        (ValueError, "up", lambda x: gated_activation(x, x[:2])),
        (ValueError, "up", lambda x: gated_activation(x, x.to("meta"))),
        (ValueError, "gate", lambda x: gated_activation(x.sum(), x.sum())),
        (ValueError, "activation: expected 'silu' or 'gelu_tanh', got 'r", lambda x: gated_activation(x, x, "relu")),
        (TypeError, "weight", lambda x: rms_norm(x, x[0].bfloat16())),
        (ValueError, "weight", lambda x: rms_norm(x, x[0, :3])),
        (ValueError, "eps", lambda x: rms_norm(x, x[0], -1.0)),
        (ValueError, "shift", lambda x: rms_norm(x, x[0], shift=float("nan"))),
    ],
)
def test_bad_argument_is_named_in_the_error(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 8))
