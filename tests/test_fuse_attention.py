"""Guards fuse_attention: models have the losses and gradients of "sdpa", which computes what ours does not."""

import copy
import gc
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from fuse_models import COMMON, KV, LAYERS, WINDOW, batch, make, step, transformers
from models import assert_same
from torch import nn

from qlora_native.integrations.fuse import _attention as integration
from qlora_native.integrations.fuse import fuse_attention
from qlora_native.integrations.fuse._rotary import fuse_rotary

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch):
    """The key_ranges of each call of our attention."""
    found = []

    def attention(*arguments, **options):
        found.append(options["key_ranges"])
        return original(*arguments, **options)

    original = integration.attention
    monkeypatch.setattr(integration, "attention", attention)
    return found


@pytest.fixture
def conversions(monkeypatch):
    """The masks that became ranges."""
    found = []

    def convert(mask):
        found.append(mask.shape)
        return original(mask)

    original = integration._as_ranges
    monkeypatch.setattr(integration, "_as_ranges", convert)
    return found


def fused(model):
    """A copy of the model with our attention, without a warning."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_attention(model)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt-neox"])
@pytest.mark.parametrize("kind", ["whole", "padded at the start", "padded at the end", "packed"])
def test_loss_and_gradients_are_the_models_own(family, kind, calls):
    model, inputs = make(family), batch(kind)
    expected = step(model, inputs)
    assert_same(step(fused(model), inputs), expected)
    assert len(calls) == LAYERS
    masked = kind != "whole" or family in ("mistral", "gemma3")  # the last layer of gemma3's two slides too
    assert all((ranges is not None) == masked for ranges in calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients_in_16_bits_are_the_models_own(dtype):
    model, inputs = make("llama", dtype), batch("padded at the start")
    assert_same(step(fused(model), inputs), step(model, inputs), dtype)


def test_mask_becomes_ranges_once_for_all_layers_and_with_checkpoints(calls, conversions):
    model, inputs = make(num_hidden_layers=4), batch("padded at the start")
    model.config.use_cache = False
    expected = step(model, inputs)
    ours = fused(model)
    ours.gradient_checkpointing_enable()
    assert_same(step(ours, inputs), expected)
    assert len(calls) == 2 * 4  # backward computes each layer again
    assert conversions == [(3, 1, 11, 11)]


def test_mask_that_was_written_to_becomes_ranges_again(calls):
    model = fused(make())
    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()

    def both():
        arguments = (layer, q, k, k, mask)
        return integration.attention_forward(*arguments)[0], integration.sdpa_attention_forward(*arguments)[0]

    torch.testing.assert_close(*both())
    mask[..., 1:, 0] = False
    torch.testing.assert_close(*both())
    with torch.inference_mode():
        mask = mask.clone()
        torch.testing.assert_close(*both())
        mask[..., 2:, 1] = False
        torch.testing.assert_close(*both())
    assert len(calls) == 4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generation_gives_the_same_tokens(family, cache, calls):
    model = make(family).eval()
    inputs = {key: batch("padded at the start")[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache != "none"}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**inputs, **options)
    assert torch.equal(fused(model).generate(**inputs, **options), expected)
    assert len(calls) == 6 * LAYERS


# ---- what transformers' own function computes as before ----


def others():
    """{why: (changes of the config, inputs)}"""
    custom = torch.zeros(3, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), torch.finfo(torch.float32).min)
    return {
        "a mask with holes": ({}, batch("holes")),
        "a mask of numbers": ({}, batch() | {"attention_mask": custom}),
        "dropout": ({"attention_dropout": 0.5}, batch()),
    }


@pytest.mark.parametrize("why", others())
def test_other_calls_give_the_bits_of_sdpa(why, calls):
    changes, inputs = others()[why]
    model = make(**changes)
    fuse_rotary(model)  # fuse_attention does, and rounds otherwise
    expected = step(model, inputs)
    ours = copy.deepcopy(model)
    if why == "dropout":
        with pytest.warns(UserWarning, match="computes attention by 'sdpa' in training: its attention_dropout is 0.5"):
            assert fuse_attention(ours)
    else:
        assert fuse_attention(ours)
    loss, gradients = step(ours, inputs)
    assert not calls
    assert torch.equal(loss, expected[0]) and all(torch.equal(gradients[name], g) for name, g in expected[1].items())
    if why == "dropout":
        ours.eval()(**inputs)
        assert len(calls) == LAYERS


@pytest.mark.parametrize(
    "changes",
    [
        {"position_bias": torch.randn(1, 4, 5, 5)},
        {"dropout": 1.0},
        {"scaling": 0.0},
        {"value": torch.randn(2, 2, 5, 8)},
        {"query": torch.randn(1, 4, 5, 16)},
        {"query": torch.randn(2, 4, 5, 16).double(), "key": torch.randn(2, 2, 5, 16).double()},
        {"attention_mask": torch.ones(2, 4, 5, 5, dtype=torch.bool).tril()},
        {"attention_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
        {"groups": 1, "key": torch.randn(2, 1, 5, 16), "value": torch.randn(2, 1, 5, 16)},  # torch repeats one head
    ],
    ids=lambda changes: "+".join(changes),
)
def test_other_operands_are_those_of_sdpa(changes, calls):
    module = nn.Module()
    changes = dict(changes)
    module.num_key_value_groups, module.is_causal = changes.pop("groups", 2), True
    shapes = {"query": (2, 4, 5, 16), "key": (2, 2, 5, 16), "value": (2, 2, 5, 16)}
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()} | {"attention_mask": None} | changes
    if arguments["query"].dtype == torch.float64:
        arguments["value"] = arguments["value"].double()
    expected, _ = integration.sdpa_attention_forward(module, **arguments)
    actual, _ = integration.attention_forward(module, **arguments)
    assert not calls
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (5, 5), (3, 5)])
def test_calls_without_a_mask_see_what_sdpa_sees(queries, keys, is_causal, calls):
    module = nn.Module()
    module.num_key_value_groups = 2
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)
    options = {"is_causal": is_causal, "scaling": 0.5}
    expected, _ = integration.sdpa_attention_forward(module, q, k, v, None, **options)
    actual, _ = integration.attention_forward(module, q, k, v, None, **options)
    torch.testing.assert_close(actual, expected)
    assert len(calls) == 1 and actual.is_contiguous()


def test_compiled_model_computes_by_sdpa(calls):
    model = make().eval()
    expected = model(**batch("padded at the start")).logits
    compiled = torch.compile(fused(model), backend="eager", fullgraph=True)
    assert torch.equal(compiled(**batch("padded at the start")).logits, expected)
    assert not calls


def test_other_devices_compute_by_sdpa(calls):
    model = fused(make()).to("meta")
    assert model(input_ids=batch()["input_ids"].to("meta")).logits.is_meta
    assert not calls


def test_autocast_computes_in_its_dtype(calls):
    model, ours = make(), fused(make())
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)
        assert_same(step(ours), expected, torch.bfloat16)
    assert calls


# ---- models ----


def implementations(model):
    return {each.config._attn_implementation for each in model.modules() if hasattr(each, "config")}


def test_second_call_changes_nothing_and_sdpa_can_be_set_again(calls):
    model = fused(make())
    assert implementations(model) == {"qlora_native"}
    assert implementations(fused(model)) == {"qlora_native"}
    model.set_attn_implementation("sdpa")
    step(model)
    assert implementations(model) == {"sdpa"} and not calls


def test_saved_model_loads_with_the_implementation_sdpa(tmp_path):
    model = fused(make())
    model.save_pretrained(tmp_path)
    assert "qlora_native" not in (tmp_path / "config.json").read_text()
    assert not any("attn" in key for key in json.loads((tmp_path / "config.json").read_text()))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert implementations(again) == {"sdpa"}
    assert_same(step(model), step(again))


def test_masks_of_a_step_are_freed_with_it(conversions):
    model = fused(make())
    step(model, batch("padded at the start"))
    gc.collect()
    assert len(conversions) == 1
    assert not [each for each in gc.get_objects() if type(each) is torch.Tensor and hasattr(each, "_key_ranges")]


def vision_and_language():
    text = transformers.Gemma3TextConfig(**COMMON, **KV, **WINDOW, head_dim=16)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=95)
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("kept", [None, "vision_config"])
def test_models_within_a_model_are_fused_where_they_have_sdpa(kept):
    model = vision_and_language()
    if kept is None:
        assert fuse_attention(model)
    else:
        model.set_attn_implementation({"": "sdpa", kept: "eager"})
        with pytest.warns(UserWarning, match="Siglip.* keeps its attention: its implementation is 'eager'"):
            assert fuse_attention(model)
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "qlora_native"
    assert model.config.vision_config._attn_implementation == ("qlora_native" if kept is None else "eager")


def test_tokens_of_an_image_see_all_of_it(calls):
    model = vision_and_language().eval()
    ids = torch.randint(3, 90, (2, 12))
    ids[:, 3:7] = 95
    inputs = {"input_ids": ids, "token_type_ids": (ids == 95).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**inputs).logits
    assert fuse_attention(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert len(calls) == 1 + LAYERS


def falcon():
    """Its attention calls torch itself where the implementation is "sdpa"."""
    sizes = {key: COMMON[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))


def bloom():
    """It has no attention but its own; the name is what its config would say."""
    model = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=64, n_layer=1, n_head=2, vocab_size=96))
    model.config._attn_implementation = "sdpa"
    return model


def eager():
    model = make()
    model.set_attn_implementation("eager")
    return model


def on_gpu():
    model = make()
    object.__setattr__(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda", 1))]))
    return model


KEPT = {
    eager: "LlamaForCausalLM keeps its attention: its implementation is 'eager'",
    falcon: "FalconForCausalLM keeps its attention: its code requires 'sdpa' by name",
    bloom: "BloomForCausalLM keeps its attention: its code does not take attention from",
    on_gpu: "LlamaForCausalLM keeps its attention: its weights are on cuda",
}


@pytest.mark.parametrize(("make", "reason"), KEPT.items(), ids=[make.__name__ for make in KEPT])
def test_model_that_keeps_its_attention_says_why(make, reason):
    model = make()
    before = implementations(model)
    with pytest.warns(UserWarning, match=reason):
        assert not fuse_attention(model)
    assert implementations(model) == before


def test_only_models_of_transformers_are_taken():
    for model in (nn.Linear(3, 3), "llama"):
        with pytest.raises(TypeError, match="model: expected a model of transformers, got"):
            fuse_attention(model)
