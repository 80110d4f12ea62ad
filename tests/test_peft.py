"""Guards LoRA through PEFT's dispatch: what is fused, that it computes what PEFT does, and what is saved."""

import copy
from functools import partial
from statistics import median

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from lora import (  # noqa: E402
    LINEARS,
    assert_close,
    config,
    dequantized,
    families,
    fused_layers,
    logits,
    pair,
    quantized,
    relative_error,
)
from peft.utils import hotswap  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit, register  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402
from qlora_native.nn import Linear4bit  # noqa: E402

# transformers on what PEFT asks it; PEFT on the shape of lora_bias.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing`", "ignore:Adapter 'default'", "ignore:`lora_bias=True`"
    ),
]

ORDER = 4e-5  # both accumulate in fp32, each in its own order, through a few layers
SAME = 1e-6  # torch's own products, such as T5's wo, change their last bit with where a tensor lies


def logits_and_gradients(model):
    """Logits, then the gradient of each of the adapter's parameters; named as there."""
    y = logits(model)
    y.float().square().mean().backward()
    return {"logits": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


@families
def test_fused_layer_computes_what_peft_does(family, monkeypatch):
    ours, theirs = pair(family)
    assert fused_layers(ours, monkeypatch) == LINEARS[family]
    actual, expected = logits_and_gradients(ours), logits_and_gradients(theirs)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], ORDER)


def check_as_near_to_fp32(ours, theirs, monkeypatch):
    """Logits and gradients of `ours`, in bf16, are about as far from fp32 as those of `theirs`."""
    ids, ratios = models.ids, []
    for seed in range(5):
        monkeypatch.setattr(models, "ids", partial(ids, seed=seed))
        exact = logits_and_gradients(copy.deepcopy(theirs).float())
        results = [logits_and_gradients(copy.deepcopy(model)) for model in (ours, theirs)]
        assert results[0]["logits"].dtype == torch.bfloat16
        error, other = (sum(relative_error(t, exact[n]) ** 2 for n, t in r.items()) ** 0.5 for r in results)
        ratios.append(error / other)
    # Each is the noise of a chain of bf16 roundings: of one input it is anything, in the median over several it is not.
    assert median(ratios) < 1.5, ratios


@families
def test_fused_layer_in_bf16_is_as_near_to_fp32_as_peft(family, monkeypatch):
    ours, theirs = pair(family, torch.bfloat16)
    assert fused_layers(ours, monkeypatch) == LINEARS[family]
    check_as_near_to_fp32(ours, theirs, monkeypatch)


@families
def test_targeted_layers_get_an_adapter_in_fp32(family):
    model = peft.get_peft_model(quantized(family, torch.bfloat16), register(config(family)))
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLinear4bit)}
    assert len(layers) == LINEARS[family]
    assert not any("lm_head" in name for name in layers)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}, "AdamW needs adapters in fp32"


@pytest.mark.parametrize("set_to", [None, torch.float32], ids=str)
def test_adapter_in_16_bits_has_the_dtype_of_the_weight_or_the_compute_dtype(set_to):
    model = quantized("llama", torch.bfloat16)
    for layer in models.layers_of(model).values():
        layer.compute_dtype = set_to
    model = peft.get_peft_model(model, config("llama"), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {set_to or torch.bfloat16}
    assert {module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)} == {set_to}


@families
@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True}, {"lora_dropout": 0.5}, {"rank_pattern": {"q_proj|query_key_value|q": 2}}],
    ids=lambda changes: next(iter(changes)),
)
def test_plain_adapter_with_options_is_fused_and_computes_the_same(family, changes, monkeypatch):
    ours, theirs = pair(family, **changes)
    ours.eval(), theirs.eval()
    assert fused_layers(ours, monkeypatch) == LINEARS[family]
    assert_close(logits(ours), logits(theirs), ORDER)


@families
def test_adapter_with_a_bias_takes_the_way_of_peft(family, monkeypatch):
    with pytest.warns(peft.utils.warning.PeftWarning, match="LoRA tensor"):
        ours, theirs = pair(family, lora_bias=True)
    assert fused_layers(ours, monkeypatch) == 0
    actual, expected = logits_and_gradients(ours), logits_and_gradients(theirs)
    assert actual.keys() == expected.keys()
    assert_close(actual.pop("logits"), expected.pop("logits"), ORDER)
    # Together: the gradient of a key's bias is the rounding of zero, as attention does not change with that bias.
    assert_close(*(torch.cat([g.flatten() for g in gradients.values()]) for gradients in (actual, expected)), ORDER)


def of_another_magnitude(ours, theirs):
    """DoRA's magnitudes, which start as the norms they are divided by, away from these."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in ours.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    return ours, theirs


@families
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_is_fused_and_equals_peft(family, dropout, monkeypatch):
    """Forward and gradients, of the magnitudes too; with dropout, which both draw from the same generator."""
    ours, theirs = of_another_magnitude(*pair(family, use_dora=True, lora_dropout=dropout))
    assert fused_layers(ours, monkeypatch) == LINEARS[family]
    results = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(7)
        results.append(logits_and_gradients(model))
    actual, expected = results
    assert actual.keys() == expected.keys() and sum("magnitude" in name for name in actual) == LINEARS[family]
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], ORDER)


def test_dora_in_bf16_is_as_near_to_fp32_as_peft(monkeypatch):
    ours, theirs = of_another_magnitude(*pair("llama", torch.bfloat16, use_dora=True))
    check_as_near_to_fp32(ours, theirs, monkeypatch)


def test_dora_decodes_the_weight_once_until_it_changes(monkeypatch):
    ours, theirs = of_another_magnitude(*pair(use_dora=True))
    layer = next(module for module in ours.modules() if isinstance(module, LoraLinear4bit))
    x = torch.randn(3, layer.in_features)
    decoded = []
    dequantize = Linear4bit.dequantize
    monkeypatch.setattr(Linear4bit, "dequantize", lambda *args: decoded.append(args) or dequantize(*args))
    layer(x), layer(x).sum().backward()
    assert len(decoded) == 1
    base = layer.base_layer
    for change in (
        lambda: base.replace_weight(qn.quantize(2 * dequantize(base))),
        lambda: base.load_state_dict({**base.state_dict(), "absmax": base.absmax.flip(0).clone()}),
    ):
        change()
        decoded.clear()
        actual = layer(x)
        assert len(decoded) == 1
        lora = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        weight = dequantize(base) + lora[2] * lora[1] @ lora[0]
        factor = layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1)
        assert_close(actual, factor * (x @ weight.t()), ORDER)


@families
def test_disabled_adapter_gives_the_base_model(family, monkeypatch):
    ours, _ = pair(family)
    with ours.disable_adapter():
        assert fused_layers(ours, monkeypatch) == 0
        disabled = logits(ours)
    assert_close(disabled, logits(quantized(family)), SAME)
    assert relative_error(disabled, logits(ours)) > 100 * SAME


def pair_of_two(family):
    """`pair` with a second adapter."""
    ours, theirs = pair(family)
    for model, second in ((ours, register(config(family))), (theirs, config(family))):
        model.add_adapter("second", second)
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours, adapter_name="second"), "second")
    return ours, theirs


@families
def test_two_active_adapters_are_added_by_peft(family, monkeypatch):
    ours, theirs = pair_of_two(family)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    assert fused_layers(ours, monkeypatch) == 0
    assert_close(logits(ours), logits(theirs), ORDER)
    for model in (ours, theirs):
        model.set_adapter("second")
    assert fused_layers(ours, monkeypatch) == LINEARS[family]
    assert_close(logits(ours), logits(theirs), ORDER)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_combined_adapter_is_fused_and_computes_the_same(combination, monkeypatch):
    ours, theirs = pair_of_two("llama")
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type=combination)
        model.set_adapter("both")
        model.delete_adapter("second")
    assert fused_layers(ours, monkeypatch) == LINEARS["llama"]
    assert_close(logits(ours), logits(theirs), ORDER)


@families
def test_batch_of_several_adapters_is_one_product(family, monkeypatch):
    ours, theirs = pair_of_two(family)
    ours.eval(), theirs.eval()
    alone = {}
    for name in ("default", "second"):
        ours.set_adapter(name)
        alone[name] = logits(ours)
    with ours.disable_adapter():
        alone["__base__"] = logits(ours)
    for names in (["default", "__base__"], ["second", "default"], ["second", "second"]):
        assert fused_layers(ours, monkeypatch, adapter_names=names) == LINEARS[family]
        mixed = logits(ours, adapter_names=names)
        assert_close(mixed, logits(theirs, adapter_names=names), ORDER)
        assert_close(mixed, torch.stack([alone[name][row] for row, name in enumerate(names)]), ORDER)


@pytest.mark.parametrize("names", [["second", "__base__", "default"], ["default", "default", "second"]], ids=str)
def test_adapters_of_a_batch_may_differ_in_rank_and_are_trained(names, monkeypatch):
    """PEFT refuses a model in training mode; its layers compute the gradients, and so do ours."""
    ours, _ = pair()
    ours.add_adapter("second", register(config(r=7, lora_alpha=3)))
    layer = next(module for module in ours.modules() if isinstance(module, LoraLinear4bit))
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    adapters = [m[name].weight for m in (layer.lora_A, layer.lora_B) for name in dict.fromkeys(names) if name in m]
    for adapter in adapters:
        adapter.requires_grad_()
    results = []
    for forward in (LoraLinear4bit.forward, peft.tuners.lora.Linear.forward):
        y = forward(layer, x, adapter_names=names)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *adapters))))
    for ours_, theirs_ in zip(*results, strict=True):
        assert_close(ours_, theirs_, ORDER)


def test_hook_on_an_inner_module_is_called():
    ours, _ = pair()
    layer = next(module for module in ours.modules() if isinstance(module, LoraLinear4bit))
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    called = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: called.append(True))
    assert_close(layer(x), expected, ORDER)
    assert called
    handle.remove()


def test_dropout_is_fused_repeatable_and_off_in_evaluation(monkeypatch):
    model = peft.get_peft_model(quantized(), register(config(lora_dropout=0.5)))
    model.train()
    assert fused_layers(model, monkeypatch) == LINEARS["llama"]
    first, second = (torch.manual_seed(3) and logits(model) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, logits(model)), "another draw of the mask"
    model.eval()
    assert torch.equal(logits(model), logits(model))


@families
def test_training_lowers_the_loss(family):
    model = peft.get_peft_model(quantized(family, torch.bfloat16), register(config(family, init_lora_weights=True)))
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**models.inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), f"{name} is frozen and changed"


@families
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=lambda changes: next(iter(changes), "plain")
)
def test_saved_adapter_loads_here_and_elsewhere(family, changes, tmp_path):
    ours, theirs = pair(family, **changes)
    ours.eval(), theirs.eval()
    expected = logits(ours)
    for name, model in (("ours", ours), ("stock", theirs)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    tensors, stock = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock"))
    assert tensors.keys() == stock.keys(), "something else was saved"
    assert len(tensors) == (3 if "use_dora" in changes else 2) * LINEARS[family]
    assert all(torch.equal(tensor, stock[name]) for name, tensor in tensors.items())
    for name in ("ours", "stock"):
        options = register(peft.LoraConfig.from_pretrained(tmp_path / name))
        again = peft.PeftModel.from_pretrained(quantized(family), tmp_path / name, config=options)
        assert torch.equal(logits(again.eval()), expected)
        dense = peft.PeftModel.from_pretrained(dequantized(quantized(family)), tmp_path / name)
        assert_close(logits(dense.eval()), expected, ORDER)


@families
@pytest.mark.filterwarnings("ignore:merging into a 4-bit weight")
def test_model_quantized_below_its_adapters_is_as_one_quantized_before(family, monkeypatch, tmp_path):
    """The adapters stay; they are fused, trained, saved and merged as over a model that was quantized first."""
    later, before = (models.make(family) for _ in range(2))
    options = config(family, modules_to_save=["lm_head"] if family != "gpt-neox" else ["embed_out"])
    later = peft.get_peft_model(later, options)
    adapters = {name: p for name, p in later.named_parameters() if p.requires_grad}
    qn.nn.quantize_model(later, progress=False)
    after = {name: p for name, p in later.named_parameters() if p.requires_grad}
    assert after.keys() == adapters.keys() and all(after[name] is p for name, p in adapters.items())
    later.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    before = qn.nn.quantize_model(before, progress=False)
    before = peft.PeftModel.from_pretrained(before, tmp_path / "adapter", is_trainable=True)
    for name, module in before.named_modules():
        assert type(later.get_submodule(name)) is type(module), name
    assert fused_layers(later, monkeypatch) == LINEARS[family]
    actual, expected = logits_and_gradients(later), logits_and_gradients(before)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name
    merged = [model.merge_and_unload() for model in (later, before)]
    assert torch.equal(*map(logits, merged))
    for name, model in zip(("later", "before"), merged, strict=True):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("later", "before")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    again = models.load(tmp_path / "later", family, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert_close(logits(again), logits(merged[0]), SAME)


def test_embedding_below_an_adapter_and_copies_that_are_trained_stay():
    """PEFT's layer over an embedding reads its weight; the layers of the model around it are quantized."""
    options = config(target_modules=["embed_tokens", "q_proj"], modules_to_save=["up_proj"])
    model = peft.get_peft_model(models.make("llama"), options)
    expected = {name for name, m in model.named_modules() if type(m) is torch.nn.Linear and "lora_" not in name}
    expected = {name for name in expected if "up_proj" not in name}
    qn.nn.quantize_model(model, skip=(), progress=False, embeddings=True)
    assert models.layers_of(model).keys() == expected and len(expected) == 2 * 6 + 1
    assert "an adapter, or kept by PEFT" in str(qn.nn.size_report(model))
    logits(model).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name)


@families
def test_unload_gives_the_base_model_back(family):
    ours, _ = pair(family)
    assert_close(logits(ours.unload()), logits(quantized(family)), SAME)


def test_register_names_the_config_that_it_expected():
    with pytest.raises(TypeError, match=r"lora_config: expected a peft\.LoraConfig, got dict"):
        register({"r": 8})


def test_swapped_adapter_runs_in_the_compiled_graph(tmp_path):
    """PEFT's hotswapping: other weights, another rank and another scaling, and no second compilation."""
    x = models.ids(2, 5)
    adapters = {"one": {"r": 2, "lora_alpha": 2}, "other": {"r": 4, "lora_alpha": 12}}
    expected = {}
    for number, (name, changes) in enumerate(adapters.items()):
        torch.manual_seed(number)
        model = peft.get_peft_model(quantized(), config(**changes)).eval()
        model.save_pretrained(tmp_path / name)
        expected[name] = model(x).logits.detach()
    model = peft.PeftModel.from_pretrained(quantized(), tmp_path / "one").eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert_close(model(x).logits.detach(), expected["one"], ORDER)
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    assert_close(model(x).logits.detach(), expected["one"], ORDER)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap.hotswap_adapter(model, tmp_path / "other", adapter_name="default")
        assert_close(model(x).logits.detach(), expected["other"], ORDER)
