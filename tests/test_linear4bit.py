"""Guards Linear4bit, quantize_model and the container: copies, casts, state dicts, and what PEFT and FSDP read."""

import copy
import pickle

import pytest
import torch
from cases import class_for
from torch import nn

import qlora_native as qn
from qlora_native.nn import Linear4bit, Linear8bit, quantize_model

N, K = 40, 96
LARGEST = torch.finfo(torch.float32).max
OPTIONS = [
    {},
    {"double_quant": False},
    {"format": "int8", "blocksize": 128},
    {"format": "int8", "double_quant": False},
    {"format": "mxfp4"},
    {"codebook": [i / 8 - 1 for i in range(16)]},
]


def layer_of(options=None, bias=True, dtype=torch.float32, shape=(N, K)):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias, dtype=dtype)
    options = options or {}
    return class_for(options).from_linear(linear, **options), linear


def fresh(options, **where):
    if "codebook" in options:
        options = {**options, "format": "codebook"}
    return class_for(options)(K, N, **options, **where)


def x_of(dtype=torch.float32):
    return torch.randn(3, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(layer, other):
    assert torch.equal(layer(x_of()), other(x_of()))
    same_tensors(layer.state_dict(), other.state_dict())


def same_tensors(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# ---- the container ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("format", "value"), [("nf4", LARGEST), ("fp4", LARGEST), ("int4", LARGEST), ("int4", 3.3e38), ("int8", 3.3e38)]
)
def test_weight_of_large_values_is_valid_and_decodes_to_finite_ones(format, value, double_quant):
    weight = torch.randn(6, 128)
    weight[1, 3], weight[2, 5], weight[4:] = value, -value, value
    q = qn.quantize(weight, format, double_quant=double_quant)
    assert q.check_values() is q
    assert q.dequantize().isfinite().all()


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_and_its_copies_compute_what_the_function_does(options):
    layer, linear = layer_of(options)
    q = qn.quantize(linear.weight, **options)
    assert torch.equal(layer(x_of()), qn.linear(x_of(), q, linear.bias))
    assert torch.equal(layer.dequantize(), q.dequantize())
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias is linear.bias) == (K, N, True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(layer, other)
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert (other.dtype, other.format) == (layer.dtype, layer.format)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other.dequantize(), q.dequantize())
        assert (other.shape, other.blocksize, other.format, other.dtype) == (q.shape, q.blocksize, q.format, q.dtype)
    assert q.to("cpu").codes is q.codes
    moved = q.to("meta")
    assert moved.shape == q.shape and {t.device.type for t in moved.tensors().values()} == {"meta"}


def test_quantized_model_keeps_the_hooks_of_its_layers():
    """test_replace.py shows this of each kind of hook."""
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    called = []
    handles = [layer.register_forward_hook(lambda layer, *_: called.append(type(layer).__name__)) for layer in model]
    qn.nn.quantize_model(model, embeddings=True, skip=(), progress=False)
    model(torch.tensor([1]))
    assert called == ["Embedding4bit", "Linear4bit"]
    for handle in handles:
        handle.remove()
    model(torch.tensor([1]))
    assert len(called) == 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_container_of_a_layer_shares_its_tensors(options):
    layer, _ = layer_of(options)
    q = layer.quantized_weight
    assert q.codes is layer.weight and q.absmax is layer.absmax
    assert q.nested_absmax is layer.nested_absmax and q.code is layer.codebook
    checked = qn.QuantizedWeight(*(getattr(q, name) for name in q.__dataclass_fields__))
    assert checked.format == layer.format
    assert q.nbytes == sum(t.nbytes for name, t in layer.state_dict().items() if name != "bias")


def test_stored_tensors_are_what_fsdp_and_peft_expect():
    layer, _ = layer_of()
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    assert parameters.keys() == {"weight", "absmax", "bias"}
    assert buffers.keys() == {"nested_absmax", "nested_code", "offset", "codebook"}
    for name in ("weight", "absmax"):  # bytes, so that a mixed-precision policy leaves them alone
        assert parameters[name].dtype == torch.uint8 and not parameters[name].requires_grad
    assert layer.weight.shape == (N, K // 2)
    assert {t.dtype for t in buffers.values()} == {torch.float32}
    assert layer.W_q is layer.weight
    assert layer.dtype == torch.float32
    assert layer.bias.requires_grad
    plain, _ = layer_of({"double_quant": False})
    assert "absmax" in dict(plain.named_buffers()) and plain.absmax.dtype == torch.float32
    assert {name for name, _ in plain.named_parameters()} == {"weight", "bias"}
    assert layer_of({"format": "int8"})[0].weight.shape == (N, K)
    assert layer_of(shape=(5, 7))[0].weight.shape == (18, 1)


def test_each_layer_has_tables_of_its_own():
    """safetensors refuses to save tensors that share memory."""
    first, second = layer_of()[0], layer_of()[0]
    for name in ("codebook", "nested_code"):
        assert getattr(first, name).data_ptr() != getattr(second, name).data_ptr()


LAYERS = {
    "linear": lambda: layer_of()[0],
    "embedding": lambda: qn.nn.Embedding4bit.from_embedding(nn.Embedding(N, K)),
    "experts": lambda: qn.nn.Experts4bit.from_parameter(torch.randn(2, N, K)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_float64_is_refused_at_once_and_changes_nothing(make):
    layer, twin = (make() for _ in range(2))
    message = "{}: expected torch.float32, torch.bfloat16 or torch.float16, got torch.float64"
    for cast in (layer.double, lambda: layer.to(torch.float64), lambda: nn.Sequential(layer).double()):
        with pytest.raises(TypeError, match=message.format("dtype")):
            cast()
    for name in ("dtype", "compute_dtype"):
        with pytest.raises(TypeError, match=message.format(name)):
            setattr(layer, name, torch.float64)
        assert getattr(layer, name) == getattr(twin, name)
    assert {n: t.dtype for n, t in layer.state_dict().items()} == {n: t.dtype for n, t in twin.state_dict().items()}


def test_layer_has_gradients_of_input_and_bias():
    layer, _ = layer_of()
    x = x_of().requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((N,), 3.0))
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, K))
    assert layer.weight.grad is None


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_is_loaded_bit_for_bit(options, device, assign):
    layer, _ = layer_of(options)
    other = fresh(options, device=device)
    if device == "meta":
        assert {t.device.type for t in (*other.parameters(), *other.buffers())} == {"meta"}
        if not assign:
            other = other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict(), strict=True, assign=assign)
    same(layer, other)
    assert not other.weight.requires_grad
    assert isinstance(other.weight, nn.Parameter)


def test_each_class_names_the_one_for_other_bits():
    linear, q = nn.Linear(K, N), qn.quantize(torch.zeros(N, K), "int8")
    for make in (
        lambda: Linear4bit(K, N, format="int8"),
        lambda: Linear4bit.from_linear(linear, "int8"),
        lambda: Linear4bit.from_quantized(q),
        lambda: Linear4bit(K, N).replace_weight(q),
    ):
        with pytest.raises(ValueError, match="format: expected one of 4 bits in Linear4bit, .*use Linear8bit"):
            make()
    with pytest.raises(ValueError, match="format: expected one of 8 bits in Linear8bit, .*use Linear4bit"):
        Linear8bit(K, N, format="nf4")
    assert Linear8bit(K, N).format == "int8" and "Linear8bit(" in repr(Linear8bit(K, N))
    model = quantize_model(nn.Sequential(nn.Linear(K, N)), format="int8", progress=False)
    assert type(model[0]) is Linear8bit


def test_state_dict_of_another_kind_raises_an_error():
    layer, _ = layer_of()
    for options in ({"double_quant": False}, {"format": "int8"}, {"blocksize": 32}):
        other = fresh(options)
        with pytest.raises(RuntimeError, match="Error.s. in loading state_dict for Linear[48]bit"):
            other.load_state_dict(layer.state_dict())
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="absmax: expected torch.float32, as the layer has it, got"):
            fresh({}).load_state_dict(cast, assign=assign)


def test_new_layer_multiplies_by_zero():
    for options in OPTIONS:
        layer = fresh(options)
        assert torch.equal(layer.dequantize().abs(), torch.zeros(N, K))
        assert torch.equal(layer(x_of()), torch.zeros(3, N))
        if "codebook" not in options:
            empty = fresh(options, device="meta").to_empty(device="cpu")
            empty.reset_parameters()
            same(layer, empty)


def test_scales_stay_fp32_under_another_default_dtype():
    """transformers sets torch's default dtype while it builds and loads a model."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        empty = qn.nn.Linear4bit(96, 48)
        layer = qn.nn.Linear4bit.from_linear(torch.nn.Linear(96, 48))
        back = qn.QuantizedWeight.from_bitsandbytes(layer.quantized_weight.to_bitsandbytes("w."), "w.")
    finally:
        torch.set_default_dtype(torch.float32)
    for q in (empty.quantized_weight, layer.quantized_weight, back):
        assert {t.dtype for t in (q.nested_absmax, q.nested_code, q.offset, q.code)} == {torch.float32}
        assert q.dtype == torch.bfloat16


def test_layer_on_the_meta_device_has_shapes_alone():
    with torch.device("meta"):
        layer = Linear4bit(K, N)
        made = Linear4bit.from_linear(nn.Linear(K, N))
    for each in (layer, made):
        assert {t.device.type for t in (*each.parameters(), *each.buffers())} == {"meta"}
        assert each(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)


# ---- casts -----------------------------------------------------------------------------------------------------------

CASTS = {
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to cpu": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "half": (lambda m: m.half(), torch.float16),
    "half, float": (lambda m: m.half().float(), torch.float32),
    "type": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "cpu": (lambda m: m.cpu(), torch.float32),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cast", CASTS)
def test_cast_leaves_the_scales_alone(cast, options):
    cast, dtype = CASTS[cast]
    layer, _ = layer_of(options)
    before = {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}
    model = cast(nn.Sequential(layer))
    assert model[0] is layer
    same_tensors({name: t for name, t in layer.state_dict().items() if name != "bias"}, before)
    assert layer.bias.dtype == layer.dtype == layer.dequantize().dtype == dtype
    assert layer(x_of(dtype)).dtype == dtype
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad


def test_bias_is_cast_to_the_dtype_of_x():
    layer, _ = layer_of(dtype=torch.bfloat16)
    assert layer.dtype == torch.bfloat16
    y = layer(x_of())
    assert y.dtype == torch.float32
    assert torch.equal(y, qn.linear(x_of(), layer.quantized_weight, layer.bias.float()))


# ---- models ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding and lm_head share a weight; two linears share another; one module has two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(2))
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.alias = self.layers[0][0]
        self.attention = nn.MultiheadAttention(32, 2)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer(h)
        h = h + self.attention(h, h, h)[0]
        return self.lm_head(self.second(self.first(h)))


def quantized_names(model):
    return {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Linear4bit)}


ALL = {"layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2", "first", "second", "alias"}


@pytest.mark.parametrize("skip", [("lm_head",), ("layers.9",)], ids=str)
def test_tied_weight_stays_tied_and_in_16_bits(skip):
    torch.manual_seed(0)
    model = Tied().eval()
    before = model.embed.weight
    assert quantize_model(model, skip, progress=False) is model
    assert quantized_names(model) == ALL
    assert model.lm_head.weight is model.embed.weight is before
    assert type(model.lm_head) is nn.Linear
    assert model.alias is model.layers[0][0]
    assert model.first is not model.second
    assert model.first.weight is model.second.weight and model.first.absmax is model.second.absmax
    assert not any(m.training for m in model.modules())
    assert model(torch.arange(5)).shape == (5, 64)
    parameters = [name for name, _ in model.named_parameters()]
    assert "second.weight" not in parameters, "a shared weight is counted twice"


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        (["layers"], {"layers.0.0", "alias", "layers.0.2", "layers.1.0", "layers.1.2"}),  # one module, two names
        (["layers.1"], {"layers.1.0", "layers.1.2"}),
        (["2"], {"layers.0.2", "layers.1.2"}),
        (["0.2"], {"layers.0.2"}),
        (["first"], {"first", "second"}),  # which shares its weight
        (["fir", "layer"], set()),
        (["alias"], {"alias", "layers.0.0"}),
    ],
    ids=lambda names: str(sorted(names)),
)
def test_skip_leaves_the_named_layers_alone(skip, skipped):
    model = Tied()
    quantize_model(model, skip, progress=False)
    assert quantized_names(model) == ALL - skipped


def in_training(layer, input):
    y = input @ layer.weight.T + layer.bias
    return y.relu() if layer.training else y


SUBCLASSES = {
    "Marked": {},
    "Doubled": {"forward": lambda layer, input: 2 * nn.Linear.forward(layer, input)},
    "WithInit": {
        "__init__": lambda layer, *sizes: nn.Linear.__init__(layer, *sizes),
        "forward": lambda layer, x: x @ layer.weight.T + layer.bias,
    },
    "InTraining": {"forward": in_training},
    "InFloat32": {"forward": lambda layer, x: nn.functional.linear(x.float(), layer.weight.float(), layer.bias)},
    "OtherRouter": {"forward": lambda layer, input: nn.functional.linear(input, layer.weight, layer.bias)},
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclass_of_linear_stays_and_is_named(name):
    kind = type(name, (nn.Linear,), SUBCLASSES[name])
    model = nn.Sequential(kind(8, 8), nn.Linear(8, 8))
    quantize_model(model, progress=False)
    assert [type(layer) for layer in model] == [kind, Linear4bit]
    reason = "a router" if name == "OtherRouter" else f"a subclass of nn.Linear, {name}"
    with pytest.warns(UserWarning, match=rf"found no nn.Linear to quantize; left as they are: 0.weight \({reason}\)"):
        quantize_model(nn.Sequential(kind(8, 8)), progress=False)


def test_subclass_of_linear_that_computes_the_same_is_quantized():
    linear = pytest.importorskip("transformers.models.falcon.modeling_falcon").FalconLinear
    x = torch.randn(3, 8)
    for bias in (True, False):
        layer = linear(8, 8, bias=bias)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        expected = qn.quantize(layer.weight).dequantize()
        model = quantize_model(nn.Sequential(layer), progress=False)
        assert type(model[0]) is Linear4bit and torch.equal(model[0].dequantize(), expected)


def test_layer_that_transformers_keeps_in_fp32_stays():
    """T5 casts the input of `wo` to the dtype of its weight, which must not be that of codes."""
    model = Tied()
    model._keep_in_fp32_modules = ["layers.1"]
    quantize_model(model, ["first"], progress=False)
    assert quantized_names(model) == ALL - {"layers.1.0", "layers.1.2", "first", "second"}


class Casts(nn.Module):
    """Casts what it multiplies to the dtype of a weight, as LongT5 does."""

    def __init__(self):
        super().__init__()
        self.wo, self.proj = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.proj(self.wo(x.to(self.wo.weight.dtype)))


class Asks(nn.Module):
    """Casts only to a floating dtype, as Gemma 4 does."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(64, 64)

    def forward(self, x):
        if (dtype := self.wo.weight.dtype).is_floating_point:
            x = x.to(dtype)
        return self.wo(x)


class Inherits(Casts):
    """Its base reads the dtype."""


def test_layer_whose_dtype_a_module_casts_to_stays():
    model = nn.ModuleDict({"a": Casts(), "b": Inherits(), "proj": Asks(), "wo": nn.Linear(64, 64)})
    quantize_model(model, progress=False)
    assert quantized_names(model) == {"a.proj", "b.proj", "proj.wo", "wo"}
    x = torch.randn(2, 64)
    assert model["a"](x).isfinite().all() and model["proj"](x).isfinite().all()
    alone = quantize_model(Casts(), progress=False)
    assert quantized_names(alone) == {"proj"}


def test_options_reach_the_layers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).bfloat16())
    quantize_model(model, (), "fp4", 128, False, progress=False)
    for layer in model:
        assert (layer.format, layer.blocksize, layer.double_quant) == ("fp4", 128, False)
    assert (model[0].dtype, model[1].dtype) == (torch.float32, torch.bfloat16)
    quantize_model(model := nn.Sequential(nn.Linear(64, 64)), codebook=torch.linspace(-1, 1, 16), progress=False)
    assert model[0].format == "codebook"
    assert "format=codebook, blocksize=64, double_quant=True" in repr(model)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_weight_takes_the_bytes_that_are_documented():
    tables = 4 * (16 + 256 + 1)
    q = qn.quantize(torch.zeros(1024, 1024))
    elements, blocks = 1024 * 1024, 1024 * 1024 // 64
    assert q.nbytes == elements // 2 + blocks + 4 * blocks // 256 + tables
    assert q.bits_per_weight == pytest.approx(4.127, abs=0.01)
    assert qn.quantize(torch.zeros(1024, 1024), double_quant=False).bits_per_weight == pytest.approx(4.5, abs=0.001)
    int8 = qn.quantize(torch.zeros(1024, 1024), "int8", 128, False)
    assert int8.nbytes == elements + 4 * elements // 128


def test_data_parallel_is_refused_with_what_to_do():
    layer = qn.nn.Linear4bit.from_linear(torch.nn.Linear(64, 8))
    with pytest.raises(NotImplementedError, match="nn.DataParallel: Linear4bit is not replicated; start a process for"):
        layer._replicate_for_data_parallel()
