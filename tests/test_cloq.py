"""Guards the start of an adapter by CLoQ: the least error of what a layer gives, for inputs of the model itself."""

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from lora import config, quantized  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.cloq import cloq, initialize_cloq  # noqa: E402
from qlora_native.integrations.loftq import initialize_loftq  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit, register  # noqa: E402

pytestmark = models.MARKS
RANK, SCALING = 5, 2.0
NEAR = 1e-3  # of the least error: a subspace iteration ends before it is exact


def batches(count=4, rows=4, length=16):
    return [models.ids(rows, length, seed) for seed in range(count)]


def adapted(family="llama", **changes):
    return peft.get_peft_model(
        quantized(family), register(config(family, **{"r": 8, "init_lora_weights": True, **changes}))
    )


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear4bit)}


def norm(x, error):
    return (x.double() @ error.double().T).norm().item()


@pytest.mark.parametrize("tokens", [400, 20])  # with 20 the matrix of the inputs is singular
@pytest.mark.parametrize("shape", [(72, 96), (96, 72)])
def test_product_has_the_least_error_of_its_rank(tokens, shape):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random)
    x = torch.randn(tokens, shape[1], generator=random) * torch.logspace(-1, 1, shape[1])
    q = qn.quantize(weight, "nf4")
    a, b, errors = cloq(weight, q, x.T @ x, RANK, SCALING)
    assert a.shape == (RANK, shape[1]) and b.shape == (shape[0], RANK)
    residual = weight - q.dequantize(torch.float32)
    least = torch.linalg.svdvals(x.double() @ residual.double().T)[RANK:].norm().item()
    assert least * (1 - 1e-6) <= norm(x, residual - SCALING * b @ a) <= least * (1 + NEAR)
    expected = [error / norm(x, weight) for error in (norm(x, residual), least)]
    assert errors == pytest.approx(expected, rel=NEAR)


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "falcon"])
def test_model_is_nearer_to_its_16_bits(family):
    dense = models.make(family)
    model = adapted(family)
    layers = layers_of(model)
    codes = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
    given = batches()

    def distance():
        with torch.no_grad():
            return sum((model(i).logits - dense(i).logits).square().sum() for i in given).sqrt().item()

    model.eval(), dense.eval()
    plain = distance()
    initialize_loftq(model, dense.state_dict())
    by_weights = distance()
    model.train()
    errors = initialize_cloq(model, dense.state_dict(), given, progress=False)
    assert all(module.training for module in model.modules())
    assert errors.keys() == layers.keys()
    assert all(after < before for before, after in errors.values())
    model.eval()
    assert distance() < by_weights < plain
    assert all(torch.equal(layer.base_layer.weight, codes[name]) for name, layer in layers.items())


def test_error_that_is_returned_is_that_of_the_layer():
    dense, given = models.make("llama").eval(), batches()
    model = adapted().eval()
    seen = []
    first = next(iter(layers_of(model)))
    hook = model.get_submodule(first).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for each in given:
            model(each)
    hook.remove()
    x = torch.cat(seen)
    _, after = initialize_cloq(model, dense.state_dict(), given, progress=False)[first]
    layer = model.get_submodule(first)
    weight = dense.get_submodule(first.removeprefix("base_model.model.")).weight
    with torch.no_grad():
        assert ((layer(x) - x @ weight.T).norm() / (x @ weight.T).norm()).item() == pytest.approx(after, rel=1e-3)


def test_same_start_every_time():
    state = models.make("llama").state_dict()
    first, second = adapted(), adapted()
    for model in (first, second):
        initialize_cloq(model, state, batches(), progress=False)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_fused_model_gets_the_same_start():
    state = models.make("llama").state_dict()
    plain, fused = adapted(), adapted()
    qn.fuse(fused)
    expected = initialize_cloq(plain, state, batches(), progress=False)
    errors = initialize_cloq(fused, state, batches(), progress=False)
    assert errors.keys() == expected.keys()
    assert [each[1] for each in errors.values()] == pytest.approx([each[1] for each in expected.values()], rel=NEAR)


def test_layers_that_are_not_called_one_after_another_are_initialized():
    model = adapted("t5")  # of its two stacks of layers one is run layer by layer
    given = [{"input_ids": each, "decoder_input_ids": each} for each in batches()]
    errors = initialize_cloq(model, models.make("t5").state_dict(), given, progress=False)
    assert errors.keys() == layers_of(model).keys()
    assert all(after < before for before, after in errors.values())


def test_unusable_arguments_of_a_weight_are_refused():
    weight, gram = torch.randn(72, 96), torch.eye(96)
    q = qn.quantize(weight)
    with pytest.raises(ValueError, match=r"rank: expected 1 \.\.\. 72, got 73"):
        cloq(weight, q, gram, 73)
    with pytest.raises(ValueError, match=r"scaling: expected a number above 0, got 0"):
        cloq(weight, q, gram, RANK, 0)
    with pytest.raises(ValueError, match=r"gram: expected \[96, 96\], got \[72, 72\]"):
        cloq(weight, q, torch.eye(72), RANK)
    with pytest.raises(ValueError, match=r"weight: expected \[72, 96\], the shape of q, got \[96, 72\]"):
        cloq(weight.T, q, gram, RANK)


@pytest.mark.parametrize(
    ("changes", "weights", "given", "name", "message"),
    [
        ({}, {}, batches(), "default", r"weights: expected the key 'model\.layers\.0\.self_attn\.q_proj\.weight'"),
        ({}, None, batches(), "other", "LoRA layers over Linear4bit with an adapter 'other'"),
        ({}, None, [], "default", "at least one batch"),
        ({}, None, batches(1, 1, 4), "default", r"batches: expected at least \d+ tokens"),
        ({"r": 73}, None, batches(), "default", r"k_proj: rank: expected 1 \.\.\. 48, got 73"),
        ({"lora_alpha": 0}, None, batches(), "default", "q_proj: scaling: expected a number above 0, got 0"),
        ({"use_dora": True}, None, batches(), "default", "expected plain LoRA, got DoraLinearVariant"),
    ],
)
def test_refused_model_is_as_it_was(changes, weights, given, name, message):
    model = adapted(**changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = models.make("llama").state_dict() if weights is None else weights
    with pytest.raises(ValueError, match=message):
        initialize_cloq(model, state, given, name, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layer_that_no_batch_reaches_is_named():
    model = adapted()
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.\w+: expected a layer that the batches reach"):
        initialize_cloq(model, models.make("llama").state_dict(), batches(), progress=False)
