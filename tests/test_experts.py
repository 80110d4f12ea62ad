"""Guards the experts of a mixture in 4 bits: which parameters they replace, what they compute, and what is reported."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
import models  # noqa: E402
import moe  # noqa: E402
from models import layers_of  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.transformers._experts import IMPLEMENTATION  # noqa: E402
from qlora_native.nn import quantize_model, size_report  # noqa: E402

pytestmark = models.MARKS
families = pytest.mark.parametrize("family", moe.FAMILIES)


def decoded(model, quantized):
    """`model` with the values of `quantized`: every weight decoded, the experts run one after the other."""
    for name, layer in moe.experts_of(quantized).items():
        model.get_parameter(name).data.copy_(layer.parameter())
    for name, layer in layers_of(quantized).items():
        model.get_submodule(name).weight.data.copy_(layer.dequantize())
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@families
def test_experts_of_every_family_are_quantized_and_routers_are_not(family):
    model = moe.make(family, torch.bfloat16)
    parameters = {n: p.clone() for n, p in model.named_parameters()}
    stacks = {n for n, p in parameters.items() if p.dim() == 3 and "conv1d" not in n}
    quantize_model(model, format="nf4", blocksize=32, progress=False, strict=True)
    experts = moe.experts_of(model)
    assert experts.keys() == stacks and stacks
    for name, layer in experts.items():
        parameter = parameters[name]
        assert layer.shape == parameter.shape and layer.dtype == parameter.dtype == torch.bfloat16
        weight = parameter.transpose(1, 2) if layer.transposed else parameter
        models.assert_same_bits(layer.quantized_weight.tensors(), qn.quantize(weight, "nf4", 32).tensors())
        assert not any(tensor.requires_grad for tensor in layer.parameters())
    routers = moe.routers_of(model)
    assert routers and all(torch.equal(parameter, parameters[name]) for name, parameter in routers.items())


def test_bytes_of_experts_are_those_of_one_weight_of_all_their_rows():
    weight = torch.randn(4, 24, 96, generator=torch.Generator().manual_seed(0))
    for format in ("nf4", "fp4", "int4", "int8", "mxfp4", "nvfp4"):
        experts, rows = qn.quantize(weight, format), qn.quantize(weight.reshape(96, 96), format)
        assert experts.shape == (4, 24, 96) and experts.dequantize().shape == weight.shape
        for name, tensor in rows.tensors().items():
            bits = (each.flatten().view(torch.uint8) for each in (getattr(experts, name), tensor))  # NaN included
            assert torch.equal(*bits), (format, name)
        assert torch.equal(experts.dequantize().reshape(96, 96), rows.dequantize())


@families
@pytest.mark.parametrize("format", ["nf4", "mxfp4"])
def test_loss_logits_and_gradients_are_those_of_the_decoded_model(family, format):
    model = moe.make(family)
    dense = copy.deepcopy(model)
    quantize_model(model, format=format, progress=False)
    decoded(dense, model)
    outputs = []
    for which in (model, dense):
        output = which(**moe.batch())
        output.loss.backward()
        outputs.append(output)
    ours, theirs = outputs
    # Two orders of addition in fp32, through two layers.
    assert relative(ours.logits, theirs.logits) < 1e-5
    assert abs(ours.loss - theirs.loss) < 1e-5 * theirs.loss
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and dense.get_parameter(name).grad is not None:
            assert relative(parameter.grad, dense.get_parameter(name).grad) < 1e-4, name
    routers = moe.routers_of(model)
    assert routers and all(parameter.grad.abs().max() > 0 for parameter in routers.values())


@families
def test_two_runs_give_the_same_bits(family):
    model = quantize_model(moe.make(family, torch.bfloat16), progress=False)
    runs = []
    for _ in range(2):
        model.zero_grad()
        output = model(**moe.batch())
        output.loss.backward()
        runs.append([output.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_experts_in_16_bits_run_beside_quantized_ones():
    model = moe.make("mixtral")
    expected = copy.deepcopy(model)
    quantize_model(model, skip=("lm_head", "layers.1.mlp.experts.down_proj"), progress=False)
    names = ("gate_up_proj", "down_proj")
    assert list(moe.experts_of(model)) == [f"model.layers.0.mlp.experts.{name}" for name in names]
    assert model.model.layers[1].mlp.experts.down_proj.dtype == torch.float32
    assert relative(model(**moe.batch()).logits, decoded(expected, model)(**moe.batch()).logits) < 1e-5


def test_implementation_is_one_of_the_registry_and_another_names_it():
    model = quantize_model(moe.make("mixtral"), progress=False)
    assert IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS and model.config._experts_implementation == IMPLEMENTATION
    expected = model(**moe.batch()).logits
    model.set_experts_implementation("eager")
    with pytest.raises(TypeError, match='set_experts_implementation\\("qlora_native"\\)'):
        model(**moe.batch())
    model.set_experts_implementation(IMPLEMENTATION)
    assert torch.equal(model(**moe.batch()).logits, expected)
    assert "qlora_native" not in model.config.to_json_string(use_diff=False).replace('"quant_method"', "")


def test_weights_keep_their_bits_when_a_model_is_moved_and_cast():
    model = quantize_model(moe.make("mixtral"), progress=False)
    before = {n: t.clone() for n, layer in moe.experts_of(model).items() for n, t in layer.weight_tensors().items()}
    model.to(torch.bfloat16)
    layers = moe.experts_of(model)
    assert {layer.dtype for layer in layers.values()} == {torch.bfloat16}
    after = {n: t for layer in layers.values() for n, t in layer.weight_tensors().items()}
    assert all(torch.equal(after[n], tensor) and after[n].dtype == tensor.dtype for n, tensor in before.items())
    other = quantize_model(moe.make("mixtral", initializer_range=0.5), progress=False)
    other.load_state_dict(model.state_dict())
    loaded = other.state_dict()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in model.state_dict().items())


def test_family_outside_the_registry_keeps_its_experts_and_runs():
    options = {**moe.COMMON, "num_hidden_layers": 1, "num_local_experts": 4, "intermediate_size": 32, "kv_channels": 16}
    del options["num_attention_heads"]  # JetMoE derives it
    model = transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**options)).eval()
    message = (
        "layers.0.mlp.input_linear.weight, 65,536 bytes, is left as it is: a parameter of .*, whose use is not known"
    )
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        quantize_model(model, progress=False, strict=True)
    assert dict(model.named_modules()) == modules
    with pytest.warns(UserWarning, match=message):
        quantize_model(model, progress=False)
    assert not moe.experts_of(model) and layers_of(model)
    router = model.model.layers[0].mlp.router.layer  # a linear layer
    assert type(router) is nn.Linear and "a router: model.layers.0.mlp.router.layer" in str(size_report(model))
    assert model(**moe.batch()).loss.isfinite()


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "llama4"])
def test_compiled_model_computes_the_same(family):
    model = quantize_model(moe.make(family), progress=False)
    with torch.no_grad():
        expected = model(**moe.batch()).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=family != "llama4")
        assert torch.equal(compiled(**moe.batch()).logits, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_of_unequal_shape_are_named_in_the_error(family):
    model = moe.make(family)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(4, 64, 48))
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts: expected experts of one shape, .*48"):
        quantize_model(model, progress=False)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_nan_in_an_expert_is_named_and_nothing_is_changed():
    model = moe.make("qwen3-moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 5] = float("nan")
    message = r"layers.1.mlp.experts.down_proj, weight: expected finite .*, got 1 NaN or Inf, the first at \[2, 3, 5\]"
    with pytest.raises(ValueError, match=message):
        quantize_model(model, progress=False)
    assert not moe.experts_of(model) and not layers_of(model)


@pytest.mark.parametrize("double_quant", [True, False])
def test_scale_that_is_nan_in_a_state_dict_is_named_and_nothing_is_changed(double_quant):
    model = quantize_model(moe.make("mixtral"), double_quant=double_quant, progress=False)
    name = f"model.layers.0.mlp.experts.down_proj.{'nested_absmax' if double_quant else 'absmax'}"
    state = {n: t.clone() for n, t in model.state_dict().items()}
    before = state[name].clone()
    state[name][0] = torch.nan
    with pytest.raises(RuntimeError, match=f"{name}: expected finite values, got NaN or Inf"):
        model.load_state_dict(state)
    assert torch.equal(model.state_dict()[name], before)


@families
def test_report_counts_every_byte_once_with_a_reason(family):
    model = quantize_model(moe.make(family, torch.bfloat16), progress=False)
    report = size_report(model)
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert report.quantized + report.left_alone == sum(tensors.values())
    layers = (*moe.experts_of(model).values(), *layers_of(model).values())
    assert report.quantized == sum(t.nbytes for layer in layers for t in layer.weight_tensors().values())
    reasons = {row.what for row in report.rows if not row.quantized}
    assert {"an embedding", "a router", "a vector"} <= reasons
    assert not any("not known" in reason for reason in reasons)
    assert "model.embed_tokens.weight" in str(report)
