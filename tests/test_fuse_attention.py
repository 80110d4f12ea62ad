"""Attention of transformers' models by this library: the losses and gradients of "sdpa", which answers the rest."""

import copy
import gc
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import models  # noqa: E402
from models import assert_same  # noqa: E402

from qlora_native.integrations.fuse import _attention as integration  # noqa: E402
from qlora_native.integrations.fuse import fuse_attention  # noqa: E402
from qlora_native.integrations.fuse._rotary import fuse_rotary  # noqa: E402

# Weights are large, so that probabilities are far from equal.
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.15}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KV = {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, **KV),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **KV, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**COMMON, **KV, **WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, **KV, **WINDOW, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**COMMON, **KV),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**COMMON),
}
families = pytest.mark.parametrize("family", FAMILIES)
LAYERS = COMMON["num_hidden_layers"]

pytestmark = pytest.mark.usefixtures("one_thread")


def make(family="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.update(changes)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()


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


def batch(kind="whole"):
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 11))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    if kind == "padded left":
        mask[0, :4], mask[1, :1] = 0, 0
    elif kind == "padded right":
        mask[0, -4:], mask[1, -1:] = 0, 0
    elif kind == "packed":
        positions = [*range(4), *range(5), *range(2)]
        return inputs | {"position_ids": torch.tensor([positions] * 3), "use_cache": False}
    elif kind == "holes":
        mask[0, 3:6] = 0
    if kind != "whole":
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return inputs


BATCHES = ("whole", "padded left", "padded right", "packed")


def step(model, inputs=None):
    torch.manual_seed(2)  # of dropout
    return models.step(model, **(batch() if inputs is None else inputs))


def fused(model):
    """A copy of the model with our attention, without a warning."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_attention(model)
    return model


@families
@pytest.mark.parametrize("kind", BATCHES)
def test_loss_and_gradients_are_the_models_own(family, kind, calls):
    model, inputs = make(family), batch(kind)
    expected = step(model, inputs)
    assert_same(step(fused(model), inputs), expected)
    assert len(calls) == LAYERS
    masked = kind != "whole" or family in ("mistral", "gemma3")  # the last layer of gemma3's two slides too
    assert all((ranges is not None) == masked for ranges in calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients_in_16_bits_are_the_models_own(dtype):
    model, inputs = make("llama", dtype), batch("padded left")
    assert_same(step(fused(model), inputs), step(model, inputs), dtype)


def test_mask_becomes_ranges_once_for_all_layers_and_with_checkpoints(calls, conversions):
    model, inputs = make(num_hidden_layers=4), batch("padded left")
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


def test_query_without_a_key_leaves_everything_finite(calls):
    """Padding on the left: what the padding itself sees is nothing."""
    loss, gradients = step(fused(make()), batch("padded left"))
    assert (calls[0][0, :4] == 0).all()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    "rows",
    [
        ["1100", "0110", "0011", "0000"],
        ["1111", "0001", "1000", "0100"],
        ["0101", "1111", "1111", "1111"],
        ["1111", "1111", "1111", "1001"],
    ],
    ids=str,
)
def test_ranges_are_the_mask_or_none(rows):
    mask = torch.tensor([[int(each) for each in row] for row in rows], dtype=torch.bool)
    contiguous = all("0" not in row.strip("0") for row in rows)
    ranges = integration._as_ranges(mask.expand(3, 1, 4, 4))
    assert (ranges is not None) == contiguous
    if ranges is not None:
        assert ranges.dtype == torch.int32 and ranges.shape == (1, 4, 2)
        each = torch.arange(4)
        assert torch.equal((each >= ranges[..., :1]) & (each < ranges[..., 1:]), mask[None])
        of_two = integration._as_ranges(torch.stack((mask, mask.flip(0)))[:, None])
        assert torch.equal(of_two, torch.cat((ranges, ranges.flip(1))))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generation_gives_the_same_tokens(family, cache, calls):
    model = make(family).eval()
    inputs = {key: batch("padded left")[key] for key in ("input_ids", "attention_mask")}
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
def test_other_operands_are_handed_on(changes, calls):
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
    expected = model(**batch("padded left")).logits
    compiled = torch.compile(fused(model), backend="eager", fullgraph=True)
    assert torch.equal(compiled(**batch("padded left")).logits, expected)
    assert not calls


def test_other_devices_compute_by_sdpa(calls):
    model = fused(make()).to("meta")
    assert model(input_ids=batch()["input_ids"].to("meta")).logits.is_meta
    assert not calls


def test_model_on_a_gpu_stays(monkeypatch):
    model = make()
    on_gpu = [SimpleNamespace(device=torch.device("cuda", 1))]
    monkeypatch.setattr(model, "parameters", lambda: iter(on_gpu))
    with pytest.warns(UserWarning, match="LlamaForCausalLM keeps its attention: its weights are on cuda"):
        assert not fuse_attention(model)
    assert implementations(model) == {"sdpa"}


def test_autocast_computes_in_its_dtype(calls):
    model, ours = make(), fused(make())
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)
        assert_same(step(ours), expected, torch.bfloat16)
    assert calls


# ---- models ----


def implementations(model):
    return {each.config._attn_implementation for each in model.modules() if hasattr(each, "config")}


def test_peft_model_trains_as_it_did(calls):
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    expected = step(model, batch("padded right"))
    assert_same(step(fused(model), batch("padded right")), expected)
    assert len(calls) == LAYERS and len(expected[1]) == 2 * 2 * LAYERS


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
    step(model, batch("padded left"))
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


def test_inner_model_beside_the_config_keeps_its_choice():
    model = make()
    model.inner, model.other = make(), make()
    model.inner.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="LlamaForCausalLM keeps its attention: its implementation is 'eager'"):
        assert fuse_attention(model)
    assert implementations(model.inner) == {"eager"} and implementations(model.other) == {"qlora_native"}
    assert implementations(model.model) == {"qlora_native"}


def test_images_see_each_other_as_before(calls):
    """Tokens of an image see all of the image, and the text before it."""
    model = vision_and_language().eval()
    ids = torch.randint(3, 90, (2, 12))
    ids[:, 3:7] = 95
    inputs = {"input_ids": ids, "token_type_ids": (ids == 95).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**inputs).logits
    assert fuse_attention(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert len(calls) == 1 + LAYERS


def test_other_implementations_stay():
    model = make()
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="LlamaForCausalLM keeps its attention: its implementation is 'eager'"):
        assert not fuse_attention(model)
    assert implementations(model) == {"eager"}


def test_code_that_knows_sdpa_by_name_stays():
    """Falcon's attention calls torch itself where the implementation is "sdpa"."""
    sizes = {key: COMMON[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    with pytest.warns(UserWarning, match="FalconForCausalLM keeps its attention: its code requires 'sdpa' by name"):
        assert not fuse_attention(model)
    assert implementations(model) == {"sdpa"}


def test_code_with_attention_of_its_own_stays():
    """BLOOM's has none but its own; the name is what its config would say."""
    sizes = {"hidden_size": 64, "n_layer": 1, "n_head": 2, "vocab_size": 96}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    model.config._attn_implementation = "sdpa"
    with pytest.warns(UserWarning, match="BloomForCausalLM keeps its attention: its code does not take attention from"):
        assert not fuse_attention(model)


def test_only_models_of_transformers_are_taken():
    for model in (nn.Linear(3, 3), "llama"):
        with pytest.raises(TypeError, match="model: expected a model of transformers, got"):
            fuse_attention(model)


def test_trainer_trains_as_it_did(tmp_path, calls):
    rows = [{key: values[0].tolist() for key, values in batch("padded right").items()} for _ in range(8)]
    losses = []
    for model in (make(), fused(make())):
        options = transformers.TrainingArguments(
            tmp_path, max_steps=4, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-3, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[1][-1] < losses[1][0]
    assert len(calls) == 4 * LAYERS
