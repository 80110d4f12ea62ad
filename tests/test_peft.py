"""LoRA through PEFT's dispatch: which way is taken, that it computes what PEFT computes, and what is saved."""

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora import (  # noqa: E402
    LAYERS,
    LINEARS_OF_A_LAYER,
    assert_close,
    config,
    dequantized,
    fused_layers,
    ids,
    pair,
    quantized,
    small_llama,
)

from qlora_native.integrations.peft import LoraLinear4bit, register  # noqa: E402

# transformers on what PEFT asks it; PEFT on the shape of lora_bias.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Adapter 'default'")


# fp32: both ways accumulate in fp32 in their own order. bf16: 2^-9 a rounding, over a few layers.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_layer_differs_from_peft(dtype, tolerance, monkeypatch):
    ours, theirs = pair(dtype)
    assert fused_layers(ours, monkeypatch) == LINEARS_OF_A_LAYER * LAYERS
    results = []
    for model in (ours, theirs):
        logits = model(ids()).logits
        assert logits.dtype == dtype
        logits.float().square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (logits, gradients), (expected, expected_gradients) = results
    assert_close(logits, expected, tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 4 * tolerance)


def test_wrong_layers_get_an_adapter():
    model = peft.get_peft_model(quantized(small_llama(torch.bfloat16)), register(config()))
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLinear4bit)}
    assert len(layers) == LINEARS_OF_A_LAYER * LAYERS
    assert not any("lm_head" in name for name in layers)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}, "AdamW needs adapters in fp32"


@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True}, {"lora_dropout": 0.5}, {"rank_pattern": {"q_proj": 2}}],
    ids=lambda changes: next(iter(changes)),
)
def test_plain_adapter_with_options_computes_something_else(changes, monkeypatch):
    ours, theirs = pair(**changes)
    ours.eval(), theirs.eval()
    assert fused_layers(ours, monkeypatch) == LINEARS_OF_A_LAYER * LAYERS
    assert_close(ours(ids()).logits, theirs(ids()).logits, 1e-5)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}], ids=lambda changes: next(iter(changes)))
def test_adapter_that_the_product_cannot_compute_takes_the_fused_way(changes, monkeypatch):
    if "lora_bias" in changes:
        with pytest.warns(peft.utils.warning.PeftWarning, match="lora_bias"):
            ours, theirs = pair(**changes)
    else:
        ours, theirs = pair(**changes)
    assert fused_layers(ours, monkeypatch) == 0
    assert_close(ours(ids()).logits, theirs(ids()).logits, 1e-5)


def test_disabled_adapter_still_acts(monkeypatch):
    ours, _ = pair()
    with ours.disable_adapter():
        assert fused_layers(ours, monkeypatch) == 0
        disabled = ours(ids()).logits
    assert torch.equal(disabled, quantized(small_llama())(ids()).logits)
    assert not torch.equal(disabled, ours(ids()).logits)


def test_second_adapter_is_ignored(monkeypatch):
    ours, theirs = pair()
    for model, second in ((ours, register(config())), (theirs, config())):
        model.add_adapter("second", second)
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours, adapter_name="second"), "second")
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    assert fused_layers(ours, monkeypatch) == 0
    assert_close(ours(ids()).logits, theirs(ids()).logits, 1e-5)
    for model in (ours, theirs):
        model.set_adapter("second")
    assert fused_layers(ours, monkeypatch) == LINEARS_OF_A_LAYER * LAYERS
    assert_close(ours(ids()).logits, theirs(ids()).logits, 1e-5)


def test_mixed_batch_uses_one_adapter_for_all_rows(monkeypatch):
    ours, theirs = pair()
    ours.eval(), theirs.eval()
    names = ["default", "__base__"]
    assert fused_layers(ours, monkeypatch, adapter_names=names) == 0
    assert_close(ours(ids(), adapter_names=names).logits, theirs(ids(), adapter_names=names).logits, 1e-5)


def test_hook_on_an_inner_module_is_not_called():
    ours, _ = pair()
    layer = next(module for module in ours.modules() if isinstance(module, LoraLinear4bit))
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    called = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: called.append(True))
    assert_close(layer(x), expected, 1e-5)
    assert called
    handle.remove()


def test_dropout_is_not_repeatable_or_acts_in_eval():
    model = peft.get_peft_model(quantized(small_llama()), register(config(lora_dropout=0.5)))
    model.train()
    first, second = (torch.manual_seed(3) and model(ids()).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model(ids()).logits), "another draw of the mask"
    model.eval()
    assert torch.equal(model(ids()).logits, model(ids()).logits)


def test_training_does_not_learn():
    model = peft.get_peft_model(quantized(small_llama(torch.bfloat16)), register(config(init_lora_weights=True)))
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), f"{name} is frozen and changed"


def test_saved_adapter_does_not_load_here_or_elsewhere(tmp_path):
    ours, theirs = pair()
    ours.eval(), theirs.eval()
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{q_proj}.lora_A.weight"].shape == (4, 96)
    assert tensors[f"{q_proj}.lora_B.weight"].shape == (96, 4)
    assert len(tensors) == 2 * LINEARS_OF_A_LAYER * LAYERS, "something other than the adapter was saved"
    again = peft.PeftModel.from_pretrained(quantized(small_llama()), tmp_path, config=register(config()))
    again.eval()
    assert torch.equal(again(ids()).logits, ours(ids()).logits)
    dense = peft.PeftModel.from_pretrained(dequantized(quantized(small_llama())), tmp_path)
    dense.eval()
    assert_close(dense(ids()).logits, ours(ids()).logits, 1e-5)


def test_unload_does_not_give_the_base_model_back():
    ours, _ = pair()
    assert torch.equal(ours.unload()(ids()).logits, quantized(small_llama())(ids()).logits)


def test_register_takes_anything():
    with pytest.raises(TypeError, match=r"lora_config: expected a peft\.LoraConfig, got dict"):
        register({"r": 8})
