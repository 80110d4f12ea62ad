"""Guards quantize, linear and the layers against bad input, as tables of input and exact error. Nothing is changed."""

import re

import pytest
import torch

import qlora_native as qn
from qlora_native._core.weight import op_arguments

N, K = 6, 64
NAN, INF = float("nan"), float("inf")
LARGEST = torch.finfo(torch.float32).max


def weight(*positions, value=NAN, dtype=torch.float32):
    w = torch.linspace(-1, 1, N * K).view(N, K).to(dtype)
    for position in positions:
        w[position] = value
    return w


def codebook(**changes):
    values = torch.linspace(-1, 1, 16)
    for i, value in changes.items():
        values[int(i[1:])] = value
    return values


FINITE = "weight: expected finite values, got "
BLOCKSIZE = "blocksize: expected a power of two, 32 ... 4096, got "
FORMATS = "format: expected one of nf4, fp4, int4, int8, codebook, mxfp4, nvfp4, "
FORMAT = f"{FORMATS}got "
DTYPE = "expected torch.float32, torch.bfloat16 or torch.float16, got "

QUANTIZE = [
    ({"weight": [[1.0]]}, TypeError, "weight: expected a tensor, got list"),
    ({"weight": weight().double()}, TypeError, f"weight: {DTYPE}torch.float64"),
    ({"weight": torch.ones(4)}, ValueError, "weight: expected [N, K] or [E, N, K], each at least 1, got [4]"),
    ({"weight": torch.ones(2, 3, 4, 1)}, ValueError, "weight: expected [N, K] or [E, N, K], each at least 1, got [2,"),
    ({"weight": torch.ones(0, 4)}, ValueError, "weight: expected [N, K] or [E, N, K], each at least 1, got [0, 4]"),
    ({"weight": weight((4, 7))}, ValueError, f"{FINITE}1 NaN or Inf, the first at [4, 7]"),
    ({"weight": weight((0, 0), (5, 63))}, ValueError, f"{FINITE}2 NaN or Inf, the first at [0, 0]"),
    ({"weight": weight((5, 63), value=INF)}, ValueError, f"{FINITE}1 NaN or Inf, the first at [5, 63]"),
    ({"weight": weight((3, 2), (3, 3), dtype=torch.bfloat16)}, ValueError, f"{FINITE}2 NaN or Inf, the first at [3,"),
    ({"weight": weight(3, value=INF, dtype=torch.float16)}, ValueError, f"{FINITE}64 NaN or Inf, the first at [3, 0]"),
    ({"weight": weight((1, 2)), "format": "int8"}, ValueError, f"{FINITE}1 NaN or Inf, the first at [1, 2]"),
    (
        {"weight": weight((1, 2), value=LARGEST), "format": "int8", "double_quant": False},
        ValueError,
        "weight: expected values that int8 decodes to finite ones, got up to 3.40282347e+38",
    ),
    ({"format": "nf5"}, ValueError, f"{FORMAT}'nf5'"),
    ({"blocksize": 48}, ValueError, f"{BLOCKSIZE}48"),
    ({"blocksize": 16}, ValueError, f"{BLOCKSIZE}16"),
    ({"blocksize": 8192}, ValueError, f"{BLOCKSIZE}8192"),
    ({"blocksize": 64.0}, TypeError, "blocksize: expected an int, got float"),
    ({"codebook": torch.zeros(15)}, ValueError, "codebook: expected 16 values, got shape [15]"),
    ({"codebook": codebook(i3=0.9)}, ValueError, "codebook: expected ascending values, got [-1.0, "),
    ({"codebook": codebook(i3=NAN)}, ValueError, "codebook: expected finite values, got [-1.0, "),
    ({"codebook": codebook(i15=INF)}, ValueError, "codebook: expected finite values, got [-1.0, "),
    ({"format": "codebook"}, ValueError, "codebook: expected 16 values with format 'codebook', got None"),
    ({"format": "int8", "codebook": codebook()}, ValueError, "codebook: expected None with format 'int8', got a"),
]


def check(call, error, message, *watched):
    before = [tensor.clone() for tensor in watched]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert str(raised.value).startswith(message), f"got: {raised.value}"
    for tensor, old in zip(watched, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize(("arguments", "error", "message"), QUANTIZE, ids=lambda value: str(value)[:60])
def test_bad_input_of_quantize_is_named_in_the_error(arguments, error, message):
    arguments = {"weight": weight(), **arguments}
    watched = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    check(lambda: qn.quantize(**arguments), error, message, *watched)


def fields(**changes):
    """The fields of a right container, changed."""
    q = qn.quantize(weight())
    rest = {name: getattr(q, name) for name in ("shape", "blocksize", "format", "dtype")}
    return {**q.tensors(), **rest, **changes}


PLAIN = {"nested_absmax": None, "nested_code": None, "offset": None}  # without double quantization
U8 = torch.uint8
CONTAINER = [
    ({"codes": torch.zeros(N, K // 2)}, TypeError, "codes: expected torch.uint8, got torch.float32"),
    ({"codes": torch.zeros(N, K, dtype=U8)}, ValueError, "codes: expected 192 elements, got 384"),
    ({"codes": torch.zeros(191, dtype=U8)}, ValueError, "codes: expected 192 elements, got 191"),
    ({"codes": torch.zeros(N, K, dtype=U8)[:, ::2]}, ValueError, "codes: expected a contiguous tensor, got strides"),
    ({"format": "int8", "code": None}, ValueError, "codes: expected 384 elements, got 192"),
    ({"absmax": torch.zeros(N)}, TypeError, "absmax: expected torch.uint8, got torch.float32"),
    ({"absmax": torch.zeros(N, dtype=U8), **PLAIN}, TypeError, "absmax: expected torch.float32, got torch.uint8"),
    ({"absmax": torch.zeros(N - 1, dtype=U8)}, ValueError, "absmax: expected 6 elements, got 5"),
    ({"absmax": torch.zeros(N + 1), **PLAIN}, ValueError, "absmax: expected 6 elements, got 7"),
    (
        {"absmax": torch.zeros(N, requires_grad=True), **PLAIN},
        ValueError,
        "absmax: expected a tensor that does not require gradients, got requires_grad=True",
    ),
    ({"absmax": torch.zeros(N, dtype=U8, device="meta")}, ValueError, "absmax: expected a tensor on cpu, where codes"),
    ({"nested_absmax": torch.zeros(2)}, ValueError, "nested_absmax: expected 1 elements, got 2"),
    ({"nested_code": torch.zeros(255)}, ValueError, "nested_code: expected 256 elements, got 255"),
    ({"offset": torch.zeros(2)}, ValueError, "offset: expected 1 elements, got 2"),
    ({"absmax": torch.zeros(N), "nested_absmax": None}, ValueError, "nested_code: expected None without"),
    (
        {"absmax": torch.zeros(N), **PLAIN, "offset": 0.0},
        ValueError,
        "offset: expected None without nested_absmax, got",
    ),
    ({"minimum": [0.0]}, ValueError, "minimum: expected None without a format that has it, got list"),
    ({"zero_point": 8}, ValueError, "zero_point: expected None without affine4 or affine8, got int"),
    ({"code": torch.zeros(15)}, ValueError, "code: expected 16 elements, got 15"),
    ({"code": torch.zeros(16).double()}, TypeError, "code: expected torch.float32, got torch.float64"),
    ({"shape": (1, N, K, 1)}, ValueError, "shape: expected (N, K) or (E, N, K), each at least 1, got (1, 6, 64, 1)"),
    ({"shape": (0, K)}, ValueError, "shape: expected (N, K) or (E, N, K), each at least 1, got (0, 64)"),
    ({"blocksize": 32}, ValueError, "absmax: expected 12 elements, got 6"),
    ({"blocksize": 65}, ValueError, f"{BLOCKSIZE}65"),
    ({"format": "nf3"}, ValueError, f"{FORMATS}q4_0, "),
    ({"dtype": torch.float64}, TypeError, f"dtype: {DTYPE}torch.float64"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CONTAINER, ids=lambda value: str(value)[:60])
def test_bad_field_of_a_container_is_named_in_the_error(changes, error, message):
    arguments = fields(**changes)
    watched = [value for value in arguments.values() if isinstance(value, torch.Tensor) and not value.is_meta]
    check(lambda: qn.QuantizedWeight(**arguments), error, message, *watched)


def randn(*size, **options):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(**options)


A, B = randn(3, K), randn(N, 3)
META = {"device": "meta"}
LINEAR = [
    ({"q": weight()}, TypeError, "q: expected a QuantizedWeight, got Tensor"),
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"x": randn(4, K).double()}, TypeError, f"x: {DTYPE}torch.float64"),
    ({"x": randn(4, K + 1)}, ValueError, "x: expected [..., 64] for a weight [6, 64], got [4, 65]"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected [..., 64] for a weight [6, 64], got []"),
    ({"x": randn(4, K, **META)}, ValueError, "x: expected a tensor on cpu, where the weight is, got meta"),
    ({"bias": randn(N + 1)}, ValueError, "bias: expected [6], got [7]"),
    ({"bias": randn(1, N)}, ValueError, "bias: expected [6], got [1, 6]"),
    ({"bias": torch.ones(N, dtype=torch.int32)}, TypeError, "bias: expected a floating-point tensor, got torch.int32"),
    ({"bias": randn(N, **META)}, ValueError, "bias: expected a tensor on cpu, where x is, got meta"),
    ({"lora_a": A}, TypeError, "lora_b: expected a tensor, as lora_a and lora_b are given together, got NoneType"),
    ({"lora_b": B}, TypeError, "lora_a: expected a tensor, as lora_a and lora_b are given together, got NoneType"),
    ({"lora_a": A, "lora_b": randn(N, 4)}, ValueError, "lora_b: expected [6, 3], the rank of lora_a, got [6, 4]"),
    ({"lora_a": randn(K, 3), "lora_b": B}, ValueError, "lora_a: expected [rank, 64], got [64, 3]"),
    ({"lora_a": A.double(), "lora_b": B}, TypeError, f"lora_a: {DTYPE}torch.float64"),
    ({"lora_a": A, "lora_b": B.half()}, TypeError, "lora_b: expected torch.float32, the dtype of lora_a, got"),
    ({"lora_a": A, "lora_b": randn(N, 3, **META)}, ValueError, "lora_b: expected a tensor on cpu, where the weight"),
    ({"lora_a": A, "lora_b": B, "lora_scaling": NAN}, ValueError, "lora_scaling: expected a finite number, got nan"),
    ({"lora_a": A, "lora_b": B, "lora_scaling": torch.ones(2)}, ValueError, "lora_scaling: expected a number or a"),
    ({"lora_a": A, "lora_b": B, "lora_dropout": 1.0}, ValueError, "lora_dropout: expected a probability in [0, 1),"),
    ({"lora_a": A, "lora_b": B, "lora_dropout": -0.1}, ValueError, "lora_dropout: expected a probability in [0, 1),"),
    ({"lora_dropout": 1.5}, ValueError, "lora_dropout: expected a probability in [0, 1), got 1.5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), LINEAR, ids=lambda value: str(value)[:60])
def test_bad_input_of_linear_is_named_in_the_error(arguments, error, message):
    arguments = {"x": randn(4, K), "q": qn.quantize(weight()), **arguments}
    watched = [value for value in arguments.values() if isinstance(value, torch.Tensor) and not value.is_meta]
    state = torch.get_rng_state()
    check(lambda: qn.linear(**arguments), error, message, *watched)
    assert torch.equal(torch.get_rng_state(), state), "a refused call drew a seed"


@pytest.mark.parametrize(
    "options", [{"lora_scaling": -2.0}, {"lora_scaling": 0.0}, {"lora_scaling": 3}, {"lora_dropout": 0}], ids=str
)
def test_unusual_adapter_is_taken(options):
    x, q = randn(4, K), qn.quantize(weight())
    y = qn.linear(x, q, lora_a=A, lora_b=B, **options)
    added = options.get("lora_scaling", 1.0) * (x @ A.t() @ B.t())
    torch.testing.assert_close(y - qn.linear(x, q), added, rtol=1e-4, atol=1e-3)


def test_bad_input_of_dequantize_is_named_in_the_error():
    q = qn.quantize(weight())
    with pytest.raises(TypeError, match=re.escape("q: expected a QuantizedWeight, got Tensor")):
        qn.dequantize(q.codes)
    for dtype in (torch.float64, torch.int8, "float32"):
        with pytest.raises(TypeError, match=re.escape(f"dtype: {DTYPE}{dtype}")):
            qn.dequantize(q, dtype)


def damaged(**changes):
    """A container that was right once: its fields can be set."""
    q = qn.quantize(weight())
    for name, value in changes.items():
        setattr(q, name, value)
    return q


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"codes": torch.zeros(8, dtype=U8)}, "codes"),
        ({"absmax": torch.zeros(8, dtype=U8)}, "absmax"),
        ({"absmax": torch.zeros(N)}, "absmax"),
        ({"nested_absmax": torch.zeros(0)}, "nested_absmax"),
        ({"nested_code": torch.zeros(3)}, "nested_code"),
        ({"offset": None}, "offset"),
        ({"code": torch.zeros(8)}, "code"),
        ({"code": None}, "code"),
        ({"shape": (6000, K)}, "codes"),
        ({"shape": (2**40, 2**40)}, "N"),
        ({"shape": (-1, K)}, "N"),
        ({"blocksize": 1}, "blocksize|absmax"),
        ({"blocksize": 2**20}, "blocksize|absmax"),
    ],
    ids=str,
)
def test_damaged_field_is_named_in_the_error_of_the_op(changes, named):
    q = damaged(**changes)
    x = torch.zeros(2, q.shape[1] if q.shape[1] < 100 else K)
    with pytest.raises((ValueError, RuntimeError), match=rf"({named}): expected"):
        torch.ops.qlora_native.linear_forward(x, *op_arguments(q), None, None, None, 1.0, 0.0, None)
    with pytest.raises((ValueError, RuntimeError), match=rf"({named}): expected"):
        q.dequantize()


# ---- layers and models -----------------------------------------------------------------------------------------------

LAYER = [
    (lambda: qn.nn.Linear4bit(64, 0), ValueError, "in_features, out_features: expected numbers above 0, got 64, 0"),
    (lambda: qn.nn.Linear4bit(64, 8, dtype=torch.float64), TypeError, f"dtype: {DTYPE}torch.float64"),
    (lambda: qn.nn.Linear4bit(64, 8, format="nf3"), ValueError, f"{FORMAT}'nf3'"),
    (lambda: qn.nn.Linear4bit(64, 8, blocksize=63), ValueError, f"{BLOCKSIZE}63"),
    (lambda: qn.nn.Linear4bit(64, 8, format="codebook"), ValueError, "codebook: expected 16 values with format"),
    (
        lambda: qn.nn.Linear4bit.from_linear(torch.nn.Bilinear(2, 2, 2)),
        TypeError,
        "linear: expected an nn.Linear that is not quantized, got Bilinear",
    ),
    (lambda: qn.nn.Linear4bit.from_linear(qn.nn.Linear4bit(64, 8)), TypeError, "linear: expected an nn.Linear that is"),
    (lambda: qn.nn.Linear4bit.from_quantized(A), TypeError, "q: expected a QuantizedWeight, got Tensor"),
    (
        lambda: qn.nn.Linear4bit.from_quantized(qn.quantize(weight()), randn(N)),
        TypeError,
        "bias: expected an nn.Parameter, got Tensor",
    ),
    (
        lambda: qn.nn.Linear4bit.from_quantized(qn.quantize(weight()), torch.nn.Parameter(randn(7))),
        ValueError,
        "bias: expected [6] on cpu, got [7] on cpu",
    ),
    (lambda: qn.nn.quantize_model([]), TypeError, "model: expected an nn.Module, got list"),
    (lambda: qn.nn.quantize_model(torch.nn.Linear(2, 2)), ValueError, "model: expected a module that contains"),
    (
        lambda: qn.nn.quantize_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), skip="0"),
        TypeError,
        "skip: expected a sequence of names, got a string",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), LAYER, ids=[case[2][:50] for case in LAYER])
def test_bad_input_of_a_layer_is_named_in_the_error(call, error, message):
    check(call, error, message)


def test_failed_quantization_leaves_the_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Sequential(torch.nn.Linear(64, 8)))
    with torch.no_grad():
        model[1][0].weight[3, 5] = NAN
    before = list(model.modules())
    check(
        lambda: qn.nn.quantize_model(model, progress=False),
        ValueError,
        f"1.0.{FINITE}1 NaN or Inf, the first at [3, 5]",
    )
    assert list(model.modules()) == before
    check(lambda: qn.nn.quantize_model(model, format="x"), ValueError, f"{FORMAT}'x'")
    assert list(model.modules()) == before
