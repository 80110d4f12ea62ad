"""Guards merging adapters into 4-bit layers and taking them out again, and adapters that start from LoftQ."""

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import models  # noqa: E402
from lora import LINEARS, config, families, fused_layers, logits, pair, quantized  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.integrations.loftq import initialize_loftq, loftq  # noqa: E402
from qlora_native.integrations.peft import LoraLinear4bit, register  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:merging into a 4-bit weight"),
]

MERGED = [{}, {"use_rslora": True}, {"use_dora": True}]


@families
@pytest.mark.parametrize("changes", MERGED, ids=lambda changes: next(iter(changes), "plain"))
def test_merged_weight_is_the_rounded_sum_and_comes_back(family, changes):
    """The merged weight is the sum, rounded once; what was there before comes back bit for bit."""
    ours, theirs = pair(family, **changes)
    for model, second in ((ours, config(family)), (theirs, config(family))):
        model.add_adapter("second", second)
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours, adapter_name="second"), "second")
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
def test_adapters_merged_in_turn_are_rounded_in_turn():
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


@families
def test_merge_and_unload_keeps_the_adapter_in(family):
    ours, _ = pair(family)
    adapted = logits(ours)
    merged = ours.merge_and_unload()
    assert not any(isinstance(module, LoraLinear4bit) for module in merged.modules())
    plain = logits(quantized(family))
    actual = logits(merged)
    assert (actual - adapted).norm() < 0.5 * (plain - adapted).norm()


def loaded(family, folder):
    """A model that is quantized while it is loaded, as GPT-2's Conv1D are only there."""
    models.make(family).save_pretrained(folder)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return models.load(folder, family, quantization_config=options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}], ids=lambda c: next(iter(c), "plain"))
@pytest.mark.filterwarnings("ignore:`lora_bias=True`", "ignore:Adapter 'default'")
def test_fan_in_fan_out_is_switched_off_with_a_warning(family, changes, tmp_path):
    """Recipes for GPT-2 have it. A `Linear4bit` has a weight [out, in], also in the place of a Conv1D."""
    targets = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else ["q_proj", "o_proj", "down_proj"]
    if "lora_bias" in changes and family == "llama":
        pytest.skip("its layers have no bias that it could be merged into")
    options = config(family, target_modules=targets, fan_in_fan_out=True, **changes)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True .* Setting fan_in_fan_out to False"):
        model = peft.get_peft_model(loaded(family, tmp_path), options)
    assert not options.fan_in_fan_out
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**models.inputs()).loss.backward()
    optimizer.step()
    model.eval()
    adapted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    merged = logits(model.merge_and_unload())
    assert (merged - adapted).norm() < 0.3 * (plain - adapted).norm()


def test_fan_in_fan_out_of_an_adapter_from_a_file_or_added_later_is_switched_off(tmp_path):
    options = config("gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    peft.get_peft_model(models.make("gpt2"), options).save_pretrained(tmp_path / "adapter")  # over its Conv1D
    assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").fan_in_fan_out
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model = peft.PeftModel.from_pretrained(loaded("gpt2", tmp_path / "base"), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model.load_adapter(tmp_path / "adapter", "second")
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model.add_adapter("third", config("gpt2", target_modules=["c_proj"], fan_in_fan_out=True))
    adapted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    merged = logits(model.merge_and_unload())
    assert (merged - adapted).norm() < 0.3 * (plain - adapted).norm()


@pytest.mark.parametrize("safe_merge", [False, True])
def test_failed_merge_leaves_the_model_as_it_was(safe_merge):
    model, _ = pair()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = [module for module in model.modules() if isinstance(module, LoraLinear4bit)][0]
    last.lora_B["default"].weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"adapters \['default'\]: expected finite merged weights"):
        last.merge(safe_merge)
    assert not last.merged
    last.lora_B["default"].weight.data.copy_(before[next(n for n in before if n.endswith("lora_B.default.weight"))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_adapter_is_fused_without_register(monkeypatch):
    """`register()` is for every config; it is what the other integrations call."""
    monkeypatch.setattr(peft.LoraModel, "_create_new_module", peft.LoraModel._create_new_module)
    register()
    model = peft.get_peft_model(quantized(), config())
    assert fused_layers(model, monkeypatch) == LINEARS["llama"]
    plain = peft.get_peft_model(models.make("llama"), config())
    assert not any(isinstance(module, LoraLinear4bit) for module in plain.modules())


# ---- LoftQ -----------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_nearer_to_the_weight(family, iterations, tmp_path):
    dense = models.make(family)
    dense.save_pretrained(tmp_path, max_shard_size="100KB")
    model = peft.get_peft_model(quantized(family), register(config(family, r=8)))
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear4bit)).base_layer
    codes = layer.weight.clone()
    errors = initialize_loftq(model, tmp_path, iterations=iterations)
    assert len(errors) == LINEARS[family]
    for name, (before, after) in errors.items():
        assert after < 0.95 * before, name
    assert torch.equal(layer.weight, codes) == (iterations == 1)
    plain, started, expected = map(logits, (quantized(family), model, dense))
    assert (started - expected).norm() < (plain - expected).norm()


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
    with pytest.raises(ValueError, match="the key 'model.layers.0.self_attn.q_proj.weight'"):
        initialize_loftq(peft.get_peft_model(quantized(), register(config())), {})
    with pytest.raises(ValueError, match="LoRA layers over Linear4bit with an adapter 'other'"):
        initialize_loftq(models.make("llama"), {}, "other")
    layer = next(m for m in pair()[0].modules() if isinstance(m, LoraLinear4bit))
    with pytest.raises(NotImplementedError, match="initialize_loftq"):  # PEFT's own would take the codes for the weight
        layer.loftq_init("default", config())
