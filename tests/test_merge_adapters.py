"""Guards what `python -m qlora_native merge` makes of each kind of adapter: what PEFT makes of the model in memory."""

import os
import re

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
import moe  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # a rounding or two to fp32


def tied_llama():
    torch.manual_seed(0)
    model = models.make("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def bart():
    torch.manual_seed(0)
    sizes = {"vocab_size": models.VOCABULARY, "d_model": 64, "max_position_embeddings": 32}
    layers = {"layers": 1, "attention_heads": 2, "ffn_dim": 72}
    layers = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in layers.items()}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, **layers, decoder_start_token_id=0)
    )


MAKE = {
    "tied": tied_llama,
    **{family: lambda family=family: models.make(family) for family in ("llama", "gpt-neox", "t5", "gpt2")},
    **{family: lambda family=family: moe.make(family) for family in moe.FAMILIES},
    "bart": bart,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Gives the folder of a family's model in bf16, in several shards."""
    made = {}

    def folder_of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            MAKE[family]().to(torch.bfloat16).save_pretrained(made[family], max_shard_size="60KB")
        return made[family]

    return folder_of


def adapter_of(base, family, config, out, rows=None):
    """Train an adapter, in effect, and save it. Returns (PEFT's merged model, logits of the trained model)."""
    model = models.load(base, family, dtype=torch.float32)
    if rows is not None:
        torch.manual_seed(2)
        model.resize_token_embeddings(rows)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(out)
    trained = models.logits(model)
    return model.merge_and_unload(), trained


def check_same(folder, family, expected):
    merged = models.load(folder, family, dtype=torch.float32)
    state = merged.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
    return merged


def check_merged(base, family, config, folder, rows=None):
    """Merged in files and in memory, a model is the same, and computes what was trained. Returns it."""
    expected, trained = adapter_of(base, family, config, folder / "adapter", rows)
    report = convert(base, folder / "out", folder / "adapter", "fp32", progress=False)
    merged = check_same(folder / "out", family, expected)
    assert merged.config.tie_word_embeddings == expected.config.tie_word_embeddings
    torch.testing.assert_close(models.logits(merged), trained, rtol=1e-3, atol=1e-4)
    assert report.error_of_delta < 1e-5
    return merged


def lora(**options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    return peft.LoraConfig(**options)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = [
    *((family, lambda: lora(target_modules="all-linear")) for family in ("llama", "t5", "gpt2")),
    ("llama", lambda: lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"0.self_attn.q_proj": 3})),
    ("gpt-neox", lambda: lora(target_modules="all-linear", lora_bias=True)),
    ("llama", lambda: lora(modules_to_save=["lm_head", "o_proj"], target_modules=["q_proj", "embed_tokens"])),
    ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])),
    ("llama", lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])),
    ("gpt-neox", lambda: peft.IA3Config(target_modules=["dense"], feedforward_modules=[])),
    ("llama", lambda: lora(trainable_token_indices=[3, 100])),
    ("tied", lambda: lora(trainable_token_indices=[3, 100])),
    ("llama", lambda: lora(trainable_token_indices={"embed_tokens": [5], "lm_head": [6, 7]})),
    ("tied", lambda: peft.TrainableTokensConfig(token_indices=[3, 100])),
    ("llama", lambda: lora(use_dora=True, target_modules=["embed_tokens", "v_proj"])),
    ("gpt2", lambda: lora(use_dora=True, target_modules=["c_attn"])),
    ("gpt-neox", lambda: lora(target_modules=["dense"], bias="all")),
    ("llama", lambda: lora(target_modules=[], target_parameters=["q_proj.weight"], use_rslora=True)),
    ("llama", lambda: lora(init_lora_weights="gaussian", exclude_modules=["layers.0.self_attn.q_proj"])),
    ("tied", lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    ("tied", lambda: lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    ("tied", lambda: lora(modules_to_save=["embed_tokens"])),
    ("tied", lambda: lora(modules_to_save=["lm_head"])),
    ("tied", lambda: lora(modules_to_save=["lm_head", "embed_tokens"])),
    ("tied", lambda: lora(modules_to_save=["embed_tokens"], target_modules=["lm_head"])),
    ("gpt2", lambda: lora(target_modules=["c_attn"], modules_to_save=["wte"])),
    ("bart", lambda: lora(modules_to_save=["lm_head"])),
    ("bart", lambda: lora(modules_to_save=["shared"])),
    *((family, lambda: lora(target_parameters=EXPERTS)) for family in moe.FAMILIES if family not in ("llama4",)),
    ("llama4", lambda: lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    ("qwen3-moe", lambda: lora(target_parameters=["experts.down_proj", "gate.weight"], alpha_pattern={"experts": 3})),
    ("qwen3-moe", lambda: lora(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    ("qwen3-moe", lambda: lora(modules_to_save=["experts"])),
]


@pytest.mark.parametrize(("family", "config"), KINDS)
def test_adapter_is_merged_as_peft_merges_it(bases, family, config, tmp_path):
    exact = check_merged(bases(family), family, config(), tmp_path).state_dict()
    # And in 16 bits, rounded once.
    convert(bases(family), tmp_path / "bf16", tmp_path / "adapter", "bf16", progress=False)
    for name, tensor in models.load(tmp_path / "bf16", family, dtype="auto").state_dict().items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


@pytest.mark.parametrize("family", ["llama", "tied"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}],
    ids=["saved", "adapted", "modules_to_save"],
)
def test_another_vocabulary_is_the_merged_models(bases, family, changes, tmp_path):
    rows = models.VOCABULARY + 5
    expected, trained = adapter_of(bases(family), family, lora(**changes), tmp_path / "adapter", rows)
    report = convert(bases(family), tmp_path / "out", tmp_path / "adapter", "fp32", progress=False)
    merged = check_same(tmp_path / "out", family, expected)
    assert merged.config.vocab_size == merged.lm_head.weight.shape[0] == rows
    if not (family == "tied" and "target_modules" in changes):
        torch.testing.assert_close(models.logits(merged), trained, rtol=1e-3, atol=1e-4)
        assert report.error_of_delta < 1e-5


def test_base_whose_files_untie_it_is_merged_as_peft_merges_it(bases, tmp_path):
    """Files that have both tied tensors, with different values, are loaded as they are, whatever config.json says."""
    models.load(bases("llama")).save_pretrained(tmp_path / "base")
    models.edit_json(tmp_path / "base/config.json", tie_word_embeddings=True)
    check_merged(tmp_path / "base", "llama", lora(target_modules=["embed_tokens"]), tmp_path)


def test_files_that_have_a_tied_tensor_twice_get_its_new_value_twice(bases, tmp_path):
    model = models.load(bases("tied"))
    model.save_pretrained(tmp_path / "base")
    head = {"lm_head.weight": model.lm_head.weight.detach().clone()}
    models.edit_tensors(tmp_path / "base/model.safetensors", head)
    check_merged(tmp_path / "base", "tied", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), tmp_path)


@pytest.mark.parametrize(
    ("config", "new", "old"),
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.base_layer.weight", "embed_tokens.weight"),
        ({"use_dora": True}, "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    ],
)
def test_tensor_has_the_name_of_another_version_of_peft(bases, config, new, old, tmp_path):
    expected, _ = adapter_of(bases("llama"), "llama", lora(**config), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name.replace(new, old): tensor for name, tensor in load_file(path).items()}, path)
    convert(bases("llama"), tmp_path / "out", tmp_path / "adapter", "fp32", progress=False)
    check_same(tmp_path / "out", "llama", expected)


def test_layers_that_peft_leaves_are_named(bases, tmp_path):
    config = lora(trainable_token_indices=[3], modules_to_save=["lm_head"])
    peft.get_peft_model(models.load(bases("tied")), config).save_pretrained(tmp_path / "adapter")
    refused(bases("tied"), tmp_path, "expected a model that PEFT can merge, got lm_head.weight, which PEFT leaves")


def test_model_without_embeddings_of_tokens_is_merged(tmp_path):
    """PEFT looks for embeddings that it should save, and transformers raises an error where there are none."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 72}
    convolutions = {"conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    config = transformers.Wav2Vec2Config(**sizes, **convolutions, vocab_size=32)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "base")
    model = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, lora())
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "base", tmp_path / "out", tmp_path / "adapter", progress=False)
    merged = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, **CLOSE)


def test_vocabulary_of_half_a_model_is_named_in_the_error(bases, tmp_path):
    adapter_of(bases("llama"), "llama", lora(), tmp_path / "adapter", models.VOCABULARY + 5)
    change(tmp_path / "adapter", lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    refused(bases("llama"), tmp_path, "have a row for each token of its vocabulary, got no lm_head.weight")


def test_merge_into_4_bits_of_a_mixture_keeps_its_experts(bases, tmp_path):
    """`--to nf4` merges into experts too, which stay in 16 bits, in the files' own tensors."""
    base = bases("qwen3-moe")
    adapter_of(base, "qwen3-moe", lora(target_parameters=EXPERTS), tmp_path / "adapter")
    for to in ("bf16", "nf4"):
        convert(base, tmp_path / to, tmp_path / "adapter", to, progress=False)
    before, merged, packed = map(models.tensors_of, (base, tmp_path / "bf16", tmp_path / "nf4"))
    experts = [name for name in before if ".mlp.experts." in name]
    assert len(experts) == 2 * 3 * moe.E
    assert all(torch.equal(merged[name], packed[name]) for name in experts)
    assert not any(torch.equal(merged[name], before[name]) for name in experts)


def test_adapter_over_4_bits_replaces_tied_embeddings(bases, tmp_path):
    base = tmp_path / "nf4"
    convert(bases("tied"), base, to="nf4", progress=False)
    adapter_of(bases("tied"), "tied", lora(modules_to_save=["embed_tokens"]), tmp_path / "adapter")
    convert(base, tmp_path / "out", tmp_path / "adapter", "nf4", progress=False)
    model = models.load(tmp_path / "out", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    dtype = model.model.embed_tokens.weight.dtype
    assert torch.equal(model.model.embed_tokens.weight, saved.to(torch.bfloat16).to(dtype))
    old = models.load(bases("tied"), dtype=dtype).lm_head.weight
    assert torch.equal(model.lm_head.weight, old) and not model.config.tie_word_embeddings


def test_figure_measures_what_was_written(bases, tmp_path):
    """|written - trained| over |trained - base|, from the files; replaced and rounded tensors are in it."""
    base = bases("tied")
    expected, _ = adapter_of(base, "tied", lora(modules_to_save=["embed_tokens"]), tmp_path / "adapter")
    report = convert(base, tmp_path / "out", tmp_path / "adapter", "bf16", progress=False)
    before, written = (models.load(folder, dtype=torch.float32).state_dict() for folder in (base, tmp_path / "out"))
    pairs = [(written[name], tensor, before[name]) for name, tensor in expected.state_dict().items()]
    missed = sum((w - t).square().sum() for w, t, _ in pairs)
    delta = sum((t - b).square().sum() for _, t, b in pairs)
    assert report.error_of_delta == pytest.approx((missed / delta).sqrt().item(), rel=1e-4) and missed > 0
    assert f"relative to what the adapter added: {report.error_of_delta:.3f}" in str(report)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_a_tied_tensor_is_noted_and_in_the_figure(bases, target, tmp_path):
    """PEFT merges the change of one of two tied tensors into both, and warns; the figure shows what that costs."""
    config = lora(target_modules=[target])
    expected, trained = adapter_of(bases("tied"), "tied", config, tmp_path / "adapter")
    report = convert(bases("tied"), tmp_path / "out", tmp_path / "adapter", "fp32", progress=False)
    merged = check_same(tmp_path / "out", "tied", expected)
    assert merged.config.tie_word_embeddings
    assert (models.logits(merged) - trained).abs().max() > 0.01
    assert report.error_of_delta == pytest.approx(1, rel=1e-3)
    assert re.search("(lm_head|embed_tokens).weight are tied: a change of one is merged into both", str(report))
    adapter_of(bases("llama"), "llama", config, tmp_path / "untied")
    report = convert(bases("llama"), tmp_path / "own", tmp_path / "untied", "fp32", progress=False)
    assert report.notes == []


def change(folder, tensors=None, **config):
    if tensors is not None:
        state = load_file(folder / "adapter_model.safetensors")
        tensors(state)
        save_file(state, folder / "adapter_model.safetensors")
    models.edit_json(folder / "adapter_config.json", **config)


def refused(base, folder, message):
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(SystemExit) as error:
        main(["merge", "--base", str(base), "--adapter", str(folder / "adapter"), "--out", str(folder / "out")])
    assert message in str(error.value) and "\n" not in str(error.value).strip(), error.value
    assert {path.name for path in folder.iterdir()} == before


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B, NORM = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        ({}, {"use_dora": True}, "layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"use_dora": True}, {"use_dora": False}, "adapts, got model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({}, {"r": 8}, "q_proj.lora_A.weight: expected the shape [8, 96], by adapter_config.json and the base, got [4"),
        ({}, {"target_modules": ["q_proj", "v_proj"]}, "v_proj.lora_A.weight, as adapter_config.json adapts that"),
        ({}, {"target_modules": ["v_proj"]}, "adapts, got model.layers.0.self_attn.q_proj.lora_A.weight"),
        ({}, {"modules_to_save": ["norm"]}, "norm.weight, as adapter_config.json adapts"),
        ({}, {"target_modules": ["no_such"]}, "Target modules {'no_such'} not found in the base model"),
        ({}, {"lora_bias": True}, "q_proj.lora_B.bias"),
        ({}, {"peft_type": "LOKR"}, "peft_type: expected one of LORA, LOHA, IA3, TRAINABLE_TOKENS, got LOKR"),
        ({}, {"peft_type": ["LORA"]}, "peft_type: expected one of LORA"),
        ({}, {"use_qalora": True}, "use_qalora: expected none, as it cannot be merged here, got True"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: expected one that leaves the base"),
        ({}, {"init_lora_weights": "loftq"}, "init_lora_weights: expected one that leaves the base"),
        ({}, {"lora_alpha": True}, "lora_alpha: expected a finite number, got True"),
        ({}, {"alpha_pattern": [1]}, "alpha_pattern: expected an object, got list"),
        ({}, {"alpha_pattern": {"(": 1}}, "alpha_pattern: expected regular expressions, got '('"),
        ({}, {"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern, q_proj: expected a finite number, got '8'"),
        ({"lora_alpha": 8}, {"lora_alpha": 1e308}, "a scaling that fp32 can hold, got 2.5e+307"),
        ({}, {"alpha_pattern": {"q_proj": 1e300}}, "a scaling that fp32 can hold"),
        ({}, {"lora_alpha": 1e30, "tensors": lambda s: s[A].mul_(1e10)}, "q_proj.weight: expected a merged weight of"),
        ({}, {"tensors": lambda s: s.update({A[17:]: torch.ones(4, 96)})}, "one tensor of that name"),
        ({}, {"tensors": lambda s: s[A].fill_(float("inf"))}, "expected finite values, got NaN"),
        ({}, {"tensors": lambda s: s.pop(B)}, "adapter: expected model.layers.0.self_attn.q_proj.lora_B.weight, as"),
        ({}, {"tensors": lambda s: s.update({A: torch.zeros(0, 96)})}, "base, got [0, 96]"),
        ({}, {"tensors": lambda s: s.update({A.replace("0", "2"): s[A].clone()})}, "adapts, got model.layers.2"),
        ({}, {"tensors": lambda s: s.update({"base_model.model.nowhere.weight": torch.zeros(5)})}, "nowhere.weight"),
        ({}, {"tensors": lambda s: s.update({A: torch.ones(4, 96).long()})}, "got torch.int64"),
        ({"modules_to_save": ["norm"]}, {"tensors": lambda s: s[NORM].fill_(float("nan"))},
         "adapter, model.norm.weight: expected finite values, got NaN or Inf"),
        ({"modules_to_save": ["norm"]},
         {"tensors": lambda s: s.update({NORM: torch.ones(96).long()})},
         "adapter, model.norm.weight: expected a floating-point tensor, got torch.int64"),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3, 128]}, "different rows of the 128"),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3, 3]}, "different rows of the 128"),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3]}, "expected the shape [1, 96]"),
    ],
)  # fmt: skip
def test_contradiction_of_an_adapter_is_named_in_the_error(bases, options, damage, message, tmp_path):
    adapter_of(bases("llama"), "llama", lora(**options), tmp_path / "adapter")
    change(tmp_path / "adapter", **damage)
    refused(bases("llama"), tmp_path, message)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", lambda path: os.truncate(path, 100), "expected a whole safetensors file"),
        ("adapter_model.safetensors", os.unlink, "adapter_model.safetensors: expected a file that PEFT"),
        ("adapter_config.json", lambda path: path.write_text("[]"), "expected a JSON object, got list"),
        ("adapter_config.json", lambda path: path.unlink() or path.mkdir(), "expected a file that PEFT saved, found"),
    ],
)
def test_damaged_file_of_an_adapter_is_named_in_the_error(bases, name, damage, message, tmp_path):
    adapter_of(bases("llama"), "llama", lora(), tmp_path / "adapter")
    damage(tmp_path / "adapter" / name)
    refused(bases("llama"), tmp_path, message)


def test_merged_weight_beyond_the_dtype_is_named_in_the_error(bases, tmp_path):
    adapter_of(bases("llama"), "llama", lora(lora_alpha=1e8), tmp_path / "adapter")
    with pytest.raises(ValueError, match="q_proj.weight: expected values of at most 65504, as float16 has"):
        convert(bases("llama"), tmp_path / "out", tmp_path / "adapter", "fp16", progress=False)
