"""Guards LoRA through PEFT's dispatch: what is fused, computed, saved and merged; and starts from LoftQ."""

import copy
import pickle
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
from process import succeed  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.loftq import initialize_loftq, loftq  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit, register  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402
from qlora_native.nn import Linear4bit  # noqa: E402

pytestmark = models.MARKS

ORDER = 4e-5  # both accumulate in fp32, each in its own order, through several layers
SAME = 1e-6  # torch's own products, such as T5's wo, change their last bit with where a tensor lies


def logits_and_gradients(model):
    """Logits, then the gradient of each of the adapter's parameters; named as there."""
    y = logits(model)
    y.float().square().mean().backward()
    return {"logits": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def of_another_magnitude(ours, theirs):
    """DoRA's magnitudes, which start as the norms they are divided by, away from these."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in ours.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    return ours, theirs


RANKS = {"rank_pattern": {"q_proj|query_key_value|q": 2}}
DORA, DROPOUT = {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.5}


@families
@pytest.mark.parametrize("changes", [{}, RANKS, DORA, DROPOUT], ids=["plain", "ranks", "dora", "dora with dropout"])
def test_fused_layer_computes_what_peft_does(family, changes, monkeypatch):
    ours, theirs = of_another_magnitude(*pair(family, **changes))
    assert fused_layers(ours, monkeypatch) == LINEARS[family]
    results = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(7)  # both draw the mask of dropout from the same generator
        results.append(logits_and_gradients(model))
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert_close(tensor, results[1][name], ORDER)


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in LINEARS), ("llama", DORA)])
def test_fused_layer_in_bf16_is_as_near_to_fp32_as_peft(family, changes, monkeypatch):
    ours, theirs = of_another_magnitude(*pair(family, torch.bfloat16, **changes))
    assert fused_layers(ours, monkeypatch) == LINEARS[family]
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
def test_targeted_layers_get_an_adapter_in_fp32(family):
    model = peft.get_peft_model(quantized(family, torch.bfloat16), register(config(family)))
    assert sum(isinstance(module, LoraLinear4bit) for module in model.modules()) == LINEARS[family]
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


def first_layer(model):
    return next(module for module in model.modules() if isinstance(module, LoraLinear4bit))


def test_dora_decodes_the_weight_once_until_it_changes(monkeypatch):
    ours, theirs = of_another_magnitude(*pair(use_dora=True))
    layer = first_layer(ours)
    x = torch.randn(3, layer.in_features)
    decoded, dequantize = [], Linear4bit.dequantize
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
        a, b = (module["default"].weight for module in (layer.lora_A, layer.lora_B))
        weight = dequantize(base) + layer.scaling["default"] * b @ a
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


def pair_of_two(family, **changes):
    ours, theirs = pair(family, **changes)
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
    layer = first_layer(ours)
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
    layer = first_layer(ours)
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    called = []
    layer.lora_A["default"].register_forward_hook(lambda *_: called.append(True))
    assert_close(layer(x), expected, ORDER)
    assert called


def test_adapter_that_is_brought_when_its_module_is_called_is_called():
    """accelerate keeps offloaded parameters on the meta device, and its hook brings the values."""
    ours, _ = pair()
    layer = first_layer(ours)
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    inner = layer.lora_A["default"]
    values = inner.weight.data
    inner.weight = torch.nn.Parameter(torch.empty_like(values, device="meta"))
    inner.forward = lambda x: torch.nn.functional.linear(x, values)
    assert_close(layer(x), expected, ORDER)


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
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
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


@families
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_merged_weight_is_rounded_once_and_unmerging_restores_the_bits(family, changes):
    ours, theirs = pair_of_two(family, **changes)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    expected = logits(ours)
    for names in (["default"], ["default", "second"]):
        ours.merge_adapter(adapter_names=names)
        theirs.merge_adapter(adapter_names=names)
        for name, layer in ours.named_modules():
            if isinstance(layer, LoraLinear4bit):
                base = layer.base_layer
                q = qn.quantize(theirs.get_submodule(name).base_layer.weight)
                # PEFT adds in another order: an element beside a midpoint may go to the other level.
                assert (base.dequantize() - q.dequantize()).norm() < 0.02 * q.dequantize().norm(), name
                assert (base.weight != q.codes).float().mean() < 2e-3, name
        ours.unmerge_adapter()
        theirs.unmerge_adapter()
        assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
        assert torch.equal(logits(ours), expected)


@pytest.mark.filterwarnings("ignore:Already following adapters")
def test_adapters_merged_one_after_the_other_are_those_merged_together():
    model, _ = pair()
    model.add_adapter("second", config())
    model.merge_adapter(adapter_names=["default", "second"])
    together = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["second"])
    assert all(torch.equal(tensor, together[name]) for name, tensor in model.state_dict().items())
    with model.disable_adapter():  # PEFT unmerges for this
        assert torch.equal(logits(model), logits(quantized()))


def loaded(folder):
    """A GPT-2 that is quantized while it is loaded, as Conv1D are only there."""
    models.make("gpt2").save_pretrained(folder)
    return models.load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def check_merged(model):
    """The merged model is the adapted one, but for a rounding."""
    adapted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    merged = logits(model.merge_and_unload())
    assert (merged - adapted).norm() < 0.3 * (plain - adapted).norm()


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_fan_in_fan_out_is_switched_off_with_a_warning(changes, tmp_path):
    """Recipes for GPT-2 have it. A `Linear4bit` has a weight [out, in], also in the place of a Conv1D."""
    options = config("gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **changes)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True .* Setting fan_in_fan_out to False"):
        model = peft.get_peft_model(loaded(tmp_path), options)
    assert not options.fan_in_fan_out
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**models.inputs()).loss.backward()
    optimizer.step()
    check_merged(model.eval())


def test_fan_in_fan_out_of_an_adapter_from_a_file_or_added_later_is_switched_off(tmp_path):
    options = config("gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    peft.get_peft_model(models.make("gpt2"), options).save_pretrained(tmp_path / "adapter")  # over its Conv1D
    assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").fan_in_fan_out
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model.load_adapter(tmp_path / "adapter", "second")
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model.add_adapter("third", config("gpt2", target_modules=["c_proj"], fan_in_fan_out=True))
    check_merged(model)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_failed_merge_leaves_the_model_as_it_was(safe_merge):
    model, _ = pair()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = first_layer(model)
    last.lora_B["default"].weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"adapters \['default'\]: expected finite merged weights"):
        last.merge(safe_merge)
    assert not last.merged
    last.lora_B["default"].weight.data.copy_(before[next(n for n in before if n.endswith("lora_B.default.weight"))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", [*LINEARS, "gpt2"])  # whose Conv1D have a weight [in, out]
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_nearer_to_the_weight(family, iterations, tmp_path):
    dense = models.make(family)
    dense.save_pretrained(tmp_path, max_shard_size="100KB")
    base = loaded(tmp_path / "gpt2") if family == "gpt2" else quantized(family)
    plain = models.logits(base)
    model = peft.get_peft_model(base, register(config(family, r=8)))
    layer = first_layer(model).base_layer
    codes = layer.weight.clone()
    errors = initialize_loftq(model, tmp_path, iterations=iterations)
    assert len(errors) == len(models.layers_of(base)) > 0
    for name, (before, after) in errors.items():
        assert after < 0.95 * before, name
    assert torch.equal(layer.weight, codes) == (iterations == 1)
    started, expected = models.logits(model), models.logits(dense)
    assert (started - expected).norm() < (plain - expected).norm()


@pytest.mark.parametrize(
    ("changes", "iterations", "message"),
    [
        ({"use_dora": True}, 1, "q_proj: adapter 'default': expected plain LoRA, got DoraLinearVariant"),
        ({"r": 73}, 1, r"k_proj: rank: expected 1 \.\.\. 48, got 73"),
        ({"lora_alpha": 0}, 1, "q_proj: scaling: expected a number above 0, got 0"),
        ({"lora_alpha": -8}, 1, "q_proj: scaling: expected a number above 0, got -"),
        ({}, 0, "iterations: expected a number above 0, got 0"),
    ],
)
def test_adapter_that_loftq_refuses_is_as_it_was(changes, iterations, message):
    model = peft.get_peft_model(quantized(), register(config(**changes)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_loftq(model, models.make("llama").state_dict(), iterations=iterations)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_loftq_of_one_weight_is_the_best_of_its_rank():
    weight = models.make("llama").model.layers[0].mlp.up_proj.weight.detach()
    q = qn.quantize(weight, "int4", 32)
    again, a, b = loftq(weight, q, rank=5, scaling=2.0)
    assert again is q and a.shape == (5, 96) and b.shape == (72, 5)
    residual = weight - q.dequantize()
    smallest = torch.linalg.svdvals(residual)[5:].norm()
    assert (residual - 2.0 * b @ a).norm().item() == pytest.approx(smallest.item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"rank: expected 1 \.\.\. 72, got 73"):
        loftq(weight, q, rank=73)
    for scaling in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"scaling: expected a number above 0, got {scaling}"):
            loftq(weight, q, rank=5, scaling=scaling)
    with pytest.raises(ValueError, match="the key 'model.layers.0.self_attn.q_proj.weight'"):
        initialize_loftq(peft.get_peft_model(quantized(), register(config())), {})
    with pytest.raises(ValueError, match="LoRA layers over Linear4bit with an adapter 'other'"):
        initialize_loftq(models.make("llama"), {}, "other")
    layer = first_layer(pair()[0])
    with pytest.raises(NotImplementedError, match="initialize_loftq"):  # PEFT's own would take the codes for the weight
        layer.loftq_init("default", config())


def test_unpickled_model_takes_adapters_where_peft_was_imported_first(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps(torch.nn.Sequential(Linear4bit.from_linear(torch.nn.Linear(64, 64)))))
    succeed(
        "-c",
        f"import pickle, peft\n"
        f"model = pickle.load(open({str(path)!r}, 'rb'))\n"
        f"model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['0']))\n"
        f"assert type(model.base_model.model[0]).__name__ == 'LoraLinear4bit', model",
    )
