"""Guards PEFT's LoRA on quantized experts: results, training, files, merging, and what is refused."""

import copy
import itertools
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import models  # noqa: E402
import moe  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_experts import decoded, families, relative  # noqa: E402

from qlora_native.integrations.peft._experts import ParamWrapper  # noqa: E402
from qlora_native.nn import quantize_model  # noqa: E402
from qlora_native.optim import AdamW8bit  # noqa: E402

pytestmark = models.MARKS


def names_of(family):
    where = "feed_forward" if family == "llama4" else "mlp"
    return [f"{where}.experts.gate_up_proj", f"{where}.experts.down_proj"]


def config(family, **changes):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "target_parameters": names_of(family)}
    return peft.LoraConfig(**{**options, **changes})


def made(family):
    quantized = moe.make(family)
    dense = copy.deepcopy(quantized)
    quantize_model(quantized, progress=False)
    decoded(dense, quantized)
    return quantized, dense


def pair(family, **changes):
    """A quantized model and the same one decoded, each with the same random adapter."""
    models = [peft.get_peft_model(model, config(family, **changes)) for model in made(family)]
    randomize(*models)
    return models


def randomize(*models, adapter="default"):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in models[0].named_parameters():
        if f".{adapter}." in name and "lora_" in name:
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            for model in models:
                model.get_parameter(name).data.copy_(values)


def adapted(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


@families
@pytest.mark.parametrize("below", [False, True], ids=["before", "below its adapters"])
def test_adapter_computes_what_peft_does_over_the_decoded_model(family, below):
    ours, theirs = pair(family)
    if below:
        ours = quantize_model(copy.deepcopy(theirs), double_quant=False, progress=False)  # to the same values again
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(adapted(ours)) == len(moe.experts_of(ours)) > 0
    outputs = []
    for model in (ours, theirs):
        output = model(**moe.batch())
        output.loss.backward()
        outputs.append(output.logits)
    assert relative(*outputs) < 1e-5
    for name in trained:
        expected = theirs.get_parameter(name).grad
        assert relative(ours.get_parameter(name).grad, expected) < 1e-4, name
        assert expected.abs().max() > 0
    with ours.disable_adapter(), theirs.disable_adapter():
        assert relative(ours(**moe.batch()).logits, theirs(**moe.batch()).logits) < 1e-5


@families
def test_training_lowers_the_loss_over_frozen_weights(family):
    model = quantize_model(moe.make(family, torch.bfloat16), progress=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model = peft.get_peft_model(model, config(family))
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(**moe.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for layer in adapted(model):
        assert all(weight.weight.abs().max() > 0 for weight in layer.lora_B.values())
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@families
def test_stock_peft_reads_the_adapter_and_the_other_way_round(family, tmp_path):
    ours, theirs = pair(family)
    expected = ours(**moe.batch()).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peft.PeftModel.from_pretrained(ours.unload(), tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path / "ours")
    assert torch.equal(ours(**moe.batch()).logits, expected)
    assert relative(theirs(**moe.batch()).logits, expected) < 1e-5


@families
def test_merging_rounds_once_and_unmerging_restores_the_bits(family):
    ours, theirs = pair(family)
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    ours.merge_adapter()
    theirs.merge_adapter()
    for name, layer in moe.experts_of(ours).items():
        assert relative(layer.parameter(), theirs.get_parameter(name)) < 0.12, name  # NF4's error on normal values
    with torch.no_grad():
        output = ours(**moe.batch()).logits
        ours.unmerge_adapter()
        after = ours.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        merged = ours.merge_and_unload()
        assert not adapted(merged) and torch.equal(merged(**moe.batch()).logits, output)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "llama4"])
def test_several_adapters_at_once_are_their_sum(family):
    ours, theirs = pair(family)
    for model in (ours, theirs):
        model.add_adapter("second", config(family, r=2))
        model.base_model.set_adapter(["default", "second"])
    randomize(ours, theirs, adapter="second")
    assert relative(ours(**moe.batch()).logits, theirs(**moe.batch()).logits) < 1e-5
    for model in (ours, theirs):
        model.set_adapter("second")
    assert relative(ours(**moe.batch()).logits, theirs(**moe.batch()).logits) < 1e-5


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss", "llama4"])
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"], r".*\.(q_proj|gate_proj|up_proj|down_proj)"],
    ids=["all-linear", "list", "regex"],
)
@pytest.mark.filterwarnings("ignore:target_modules. .* are experts")
def test_target_modules_mean_what_they_mean_over_16_bits(family, targets):
    """PEFT takes names of experts from before they were parameters for these, where it knows the family."""
    # PEFT takes Llama 4's router for a linear layer, and fails; over quantized layers it is excluded.
    without = {"exclude_modules": ["router"]} if (family, targets) == ("llama4", "all-linear") else {}
    quantized, dense = made(family)
    ours = peft.get_peft_model(quantized, config(family, target_modules=targets, target_parameters=None))
    theirs = peft.get_peft_model(dense, config(family, target_modules=targets, target_parameters=None, **without))
    randomize(ours, theirs)
    names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert names[0] == names[1] != set()
    assert bool(adapted(ours)) == (family == "qwen3-moe" or (family == "mixtral" and targets == "all-linear"))
    assert relative(ours(**moe.batch()).logits, theirs(**moe.batch()).logits) < 1e-5


@pytest.mark.parametrize("excluded", [None, ["o_proj"], r".*\.o_proj"], ids=["none", "list", "regex"])
def test_adapter_of_all_linear_excludes_the_router_of_llama4(excluded, tmp_path):
    quantized, dense = made("llama4")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=excluded, init_lora_weights=False)
    model = peft.get_peft_model(quantized, lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("router" in name for name in trained)
    assert any("o_proj" in name for name in trained) == (excluded is None)
    model(**moe.batch()).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(dense, tmp_path)
    assert relative(stock(**moe.batch()).logits, model(**moe.batch()).logits) < 1e-5


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: peft.LoraConfig(target_modules=["router", "q_proj"]), "name it in exclude_modules"),
        (lambda: peft.LoraConfig(target_modules=r".*\.(router|q_proj)"), "name it in exclude_modules"),
        (lambda: peft.VeraConfig(target_modules="all-linear"), "list the others by name"),
    ],
    ids=["list", "regex", "no exclude_modules"],
)
def test_router_that_returns_a_tuple_is_named_and_nothing_is_changed(make, remedy):
    model = quantize_model(moe.make("llama4"), progress=False)
    modules = dict(model.named_modules())
    message = f"layers.0.feed_forward.router, a Llama4Router, which returns a tuple: {remedy}"
    with pytest.raises(NotImplementedError, match=message):
        peft.get_peft_model(model, make())
    assert dict(model.named_modules()) == modules


def test_adapter_from_before_experts_were_parameters_is_read(tmp_path):
    torch.manual_seed(0)
    tensors, sizes = {}, {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
    for layer, e, (name, (N, K)) in itertools.product(range(2), range(moe.E), sizes.items()):
        path = f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{name}_proj"
        tensors |= {f"{path}.lora_A.weight": torch.randn(4, K) / 10, f"{path}.lora_B.weight": torch.randn(N, 4) / 10}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]).save_pretrained(tmp_path)
    both = made("qwen3-moe")
    plain = both[0](**moe.batch()).logits
    ours, theirs = (peft.PeftModel.from_pretrained(model, tmp_path)(**moe.batch()).logits for model in both)
    assert relative(ours, theirs) < 1e-5 and relative(ours, plain) > 1e-2


def test_infinite_merged_weight_is_named_in_the_error_and_changes_nothing():
    ours, _ = pair("mixtral")
    before = {n: t.clone() for n, t in ours.state_dict().items() if "lora" not in n}
    layer = adapted(ours)[0]
    layer.lora_A["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="expected finite merged weights"):
        layer.merge()
    after = ours.state_dict()
    assert not layer.merged and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda names: peft.LoraConfig(target_parameters=names, init_lora_weights="pissa"), "pissa.*over quantized"),
        (lambda names: peft.LoraConfig(target_parameters=names, init_lora_weights="orthogonal"), "orthogonal"),
        (lambda names: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]), "modules_to_save"),
    ],
)
def test_method_that_needs_16_bits_is_named_in_the_error(make, message):
    model = quantize_model(moe.make("mixtral"), progress=False)
    modules = dict(model.named_modules())
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match=message):
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, make(names_of("mixtral")))
    assert dict(model.named_modules()) == modules
