"""Guards bitsandbytes' operations on our kernels: each gives what its own kernel gives, or is delegated to it."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from lora import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes import functional as bnbf

from qlora_native.integrations._autoload import autoload
from qlora_native.integrations.bitsandbytes import _backend as backend
from qlora_native.testing import assert_close_by_norm, product_tolerance, unit_roundoff

ops = torch.ops.bitsandbytes
EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
dtypes = pytest.mark.parametrize("dtype", EPSILON, ids=str)
formats = pytest.mark.parametrize("format", ["nf4", "fp4"])


@pytest.fixture(autouse=True)
def off():
    """Its reference code is under torch.compile, which would call a C++ compiler for every shape."""
    was = backend.enabled()
    backend.disable()
    with torch.compiler.set_stance("force_eager"):
        yield
    backend.enable() if was else backend.disable()


def both(function):
    """What `function` gives on bitsandbytes' kernels and on ours; its tensors are those of a seed."""
    results = []
    for switch in (backend.disable, backend.enable):
        switch()
        torch.manual_seed(0)
        results.append(function())
    backend.disable()
    return results


@dtypes
@formats
@pytest.mark.parametrize("shape", [(96, 128), (3, 5, 70), (7, 333), (1000,)], ids=str)
def test_quantized_weight_is_theirs_but_at_ties(format, shape, dtype):
    def quantize():
        weight = torch.randn(shape).to(dtype)
        return weight, *ops.quantize_4bit(weight, 64, format, torch.uint8)

    (weight, codes, absmax), (_, ours, our_absmax) = both(quantize)
    assert torch.equal(our_absmax, absmax)
    assert ours.shape == codes.shape and ours.dtype == codes.dtype
    assert (ours != codes).float().mean() < 5e-3
    decoded = ops.dequantize_4bit(ours, absmax, 64, format, shape, torch.float32)
    reference = ops.dequantize_4bit(codes, absmax, 64, format, shape, torch.float32)
    errors = [(w - weight.float()).norm() for w in (decoded, reference)]
    assert errors[0] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_storage_dtype_keeps_the_bytes(storage):
    weight = torch.randn(64, 64)
    backend.enable()
    codes, absmax = ops.quantize_4bit(weight, 64, "nf4", storage)
    plain, _ = ops.quantize_4bit(weight, 64, "nf4", torch.uint8)
    assert codes.dtype == storage and codes.shape == (64 * 64 // 2 // storage.itemsize, 1)
    assert torch.equal(codes.view(torch.uint8).view(-1), plain.view(-1))
    decoded = ops.dequantize_4bit(codes, absmax, 64, "nf4", (64, 64), torch.float32)
    assert torch.equal(decoded, ops.dequantize_4bit(plain, absmax, 64, "nf4", (64, 64), torch.float32))


@dtypes
@formats
@pytest.mark.parametrize("shape", [(64, 128), (3, 4, 64), (1024,)], ids=str)
def test_decoded_bits_are_theirs(format, shape, dtype):
    codes, absmax = ops.quantize_4bit(torch.randn(shape), 64, format, torch.uint8)
    theirs, ours = both(lambda: ops.dequantize_4bit(codes, absmax, 64, format, shape, dtype))
    assert ours.dtype == dtype and ours.shape == shape
    theirs = theirs.view(shape)  # its CPU kernel gives one dimension more
    assert torch.equal(ours, theirs)
    transposed = both(lambda: ops.dequantize_4bit(codes.t(), absmax, 64, format, shape, dtype))
    assert torch.equal(transposed[1], theirs)


@dtypes
@formats
@pytest.mark.parametrize("double_quant", [False, True], ids=["absmax", "dq"])
def test_product_is_within_its_tolerance_of_float64(format, double_quant, dtype):
    N, K = 96, 128
    codes, state = bnbf.quantize_4bit(torch.randn(N, K) / 8, quant_type=format, compress_statistics=double_quant)
    w = bnbf.dequantize_4bit(codes, state).double()
    x, bias, dy = torch.randn(10, K).to(dtype), torch.randn(N).to(dtype), torch.randn(10, N).to(dtype)
    backend.enable()
    leaf = x.view(2, 5, K).clone().requires_grad_()
    y = bnb.matmul_4bit(leaf, codes, state, bias=bias)
    y.backward(dy.view(2, 5, N))
    without_gradient = bnb.matmul_4bit(x.view(2, 5, K), codes.t(), state)
    products = [(y.detach(), x, w, bias.double()), (leaf.grad, dy, w.t(), 0), (without_gradient, x, w, 0)]
    if not double_quant:
        row = ops.gemv_4bit(x[:1].unsqueeze(0), codes, (N, K), state.absmax, state.code, 64)
        products.append((row, x[:1], w, 0))
    for actual, dense, weight, added in products:
        assert actual.dtype == dtype and actual.shape[2] == len(weight)
        exact = dense.double() @ weight.t() + added
        # W is rounded to the dtype of the product first.
        rounded = unit_roundoff(dtype) * dense.double().abs() @ weight.t().abs()
        tolerance = product_tolerance(dense, weight, exact, dtype) + rounded
        assert_close_by_norm("product", actual.flatten(0, 1), exact, tolerance)


def test_layer_in_evaluation_keeps_its_scales():
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    x = torch.randn(4, 128).bfloat16()
    backend.enable()
    expected, pointer = layer.train()(x), layer.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), expected)
    assert layer.weight.data_ptr() == pointer


def trained(optimizer, dtype=torch.float32, steps=8, last=None, **options):
    """Parameters and decoded moments: one tensor in 8 bits, one too small for that."""
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((72, 70), (30,))]
    made = optimizer(params, lr=1e-2, **options)
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype)
        if last is not None and step == steps - 1:
            params[0].grad[3, 5] = last
        made.step()
    state, small = (made.state[param] for param in params)
    moments = [small[name] for name in ("state1", "state2") if name in small]
    for i in ("1", "2"):
        if f"qmap{i}" in state:
            codes, absmax, qmap = state[f"state{i}"], state[f"absmax{i}"], state[f"qmap{i}"]
            moments.append(bnbf.dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=256))
    return [param.detach() for param in params], moments


@dtypes
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(bnb.optim.AdamW8bit, {"weight_decay": 0.1}), (bnb.optim.Adam8bit, {"betas": (0.8, 0.95), "eps": 1e-4})],
    ids=["AdamW8bit", "Adam8bit"],
)
def test_optimizer_steps_as_theirs(optimizer, options, dtype):
    (theirs, moments), (ours, our_moments) = both(lambda: trained(optimizer, dtype, **options))
    # The error of eight steps of 0.01, from the 8 bits of the quantizer and the rounding of the parameter.
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close(actual, expected, 2e-3 + EPSILON[dtype])
    for actual, expected in zip(our_moments, moments, strict=True):
        assert_close(actual, expected, 3e-2)


@pytest.mark.parametrize("optimizer", [bnb.optim.Lion8bit, bnb.optim.RMSprop8bit, bnb.optim.AdEMAMix8bit])
def test_other_optimizers_keep_their_own_kernel(optimizer):
    (theirs, _), (ours, _) = both(lambda: trained(optimizer))
    assert all(torch.equal(actual, expected) for actual, expected in zip(ours, theirs, strict=True))


def test_operation_runs_here_while_enabled_alone(monkeypatch):
    called = []

    class Ops:
        def __getattr__(self, name):
            called.append(name)
            return getattr(torch.ops.qlora_native, name)

    monkeypatch.setattr(backend, "_ops", Ops())
    weight, x, code = torch.randn(64, 128), torch.randn(1, 128), bnbf.get_4bit_type("nf4", "cpu")
    codes, absmax = ops.quantize_4bit(weight, 64, "nf4", torch.uint8)
    maps = bnbf.create_dynamic_map(), bnbf.create_dynamic_map(signed=False)

    def step(name, dtype, *state):
        moments = [torch.zeros(5000, dtype=dtype) for _ in range(2)]
        getattr(ops, name)("adam", torch.randn(5000), torch.randn(5000), *moments, *state)

    numbers, bits8, bits32 = (0.9, 0.99, 0.0, 0.0, 1e-8), "optimizer_update_8bit_blockwise", "optimizer_update_32bit"
    state8 = (*numbers, 1, 0.1, *maps, *torch.zeros(2, 20), 0.0, 1.0)
    state32, layout = (None, 0.0, 1.0, *numbers, 0.0, 1, 0.1, 1.0), (absmax, 64, "nf4")
    calls = {
        "quantize_4bit": ("quantize", lambda: ops.quantize_4bit(weight, 64, "nf4", torch.uint8)),
        "dequantize_4bit": ("dequantize", lambda: ops.dequantize_4bit(codes, *layout, (64, 128), torch.float32)),
        "gemm_4bit": ("linear_forward", lambda: ops.gemm_4bit(x, codes, (64, 128), *layout)),
        "gemv_4bit": ("linear_forward", lambda: ops.gemv_4bit(x, codes, (64, 128), absmax, code, 64)),
        bits8: ("optimizer_8bit_step", lambda: step(bits8, torch.uint8, *state8)),
        bits32: ("optimizer_8bit_step", lambda: step(bits32, torch.float32, *state32)),
    }
    assert calls.keys() == backend._KERNELS.keys()
    for switch, runs in ((backend.disable, False), (backend.enable, True), (backend.disable, False)):
        switch()
        for name, (ours, call) in calls.items():
            if name == "gemv_4bit" and not runs:
                continue  # bitsandbytes has it on the CPU in its layout for AVX512_BF16 alone
            called.clear()
            call()
            assert called == ([ours] if runs else []), name


def test_unsupported_call_has_the_bits_of_their_kernel():
    """NaN in a weight, an unusable gradient, float64, a max_unorm, other quantization maps."""
    weight = torch.randn(4, 64).index_fill(0, torch.tensor(1), torch.nan)
    other = torch.linspace(-1, 1, 256)

    def step(name, bits, **changes):
        torch.manual_seed(0)
        p, g = torch.randn(5000), torch.randn(5000)
        moments = [torch.zeros(5000, dtype=torch.uint8 if bits == 8 else torch.float32) for _ in range(2)]
        common = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.0, "alpha": 0.0, "eps": 1e-8, "step": 1, "lr": 0.1}
        common |= {"weight_decay": 0.0, "gnorm_scale": 1.0}
        if bits == 8:
            absmax = {f"absmax{i}": torch.zeros(20) for i in (1, 2)}
            ops.optimizer_update_8bit_blockwise(name, g, p, *moments, **common, **absmax, **changes)
        else:
            ops.optimizer_update_32bit(name, g, p, *moments, None, param_norm=1.0, **common, **changes)
        return p

    for call in (
        lambda: ops.quantize_4bit(weight, 64, "nf4", torch.uint8)[1],
        lambda: ops.quantize_4bit(torch.randn(4, 64).double(), 64, "nf4", torch.uint8)[0],
        lambda: trained(bnb.optim.AdamW8bit, steps=1, last=torch.nan)[0][0],
        lambda: trained(bnb.optim.AdamW8bit, steps=1, last=torch.inf)[0][0],
        lambda: trained(bnb.optim.AdamW8bit, steps=1, last=1e30)[0][0],
        lambda: step("adam", 8, qmap1=other, qmap2=other.abs().sort().values),
        lambda: step("adam", 32, max_unorm=0.1),
        lambda: step("lamb", 32, max_unorm=0.0),
    ):
        theirs, ours = both(call)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", ["1", "0", None])
def test_environment_variable_decides_on_the_plug_in(value):
    program = """
import bitsandbytes, sys
from qlora_native.integrations.bitsandbytes import _backend as backend
print(backend.enabled())
backend.enable(), backend.enable(), backend.disable(), backend.disable()
print(backend.enabled())
"""
    environment = {name: v for name, v in os.environ.items() if name != "QLORA_NATIVE_BNB"}
    if value is not None:
        environment["QLORA_NATIVE_BNB"] = value
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == [str(value == "1"), "False"]
    assert "Overriding" not in shown.stderr


def test_variable_with_another_value_is_named_in_an_error(monkeypatch):
    monkeypatch.setenv("QLORA_NATIVE_BNB", "true")
    with pytest.raises(ValueError, match="QLORA_NATIVE_BNB: expected 0 or 1, got 'true'"):
        autoload()
    assert not backend.enabled()
