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
