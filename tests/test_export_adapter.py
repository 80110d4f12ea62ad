"""Guards `python -m qlora_native export --adapter`: an adapter in llama.cpp's format adds what PEFT adds."""

import re

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import models  # noqa: E402
from gguf_files import fields, kinds, make_all, read  # noqa: E402

from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert.gguf import ARCHITECTURES, export_adapter, export_model  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_all(tmp_path_factory)


def adapter_of(folder, out, **changes):
    """A PEFT adapter with random values over `folder`."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    model = peft.get_peft_model(models.load(folder, dtype=torch.float32), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:  # modules_to_save, biases
            parameter.data *= 1.5
    model.save_pretrained(out)
    return model


PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 5},
    "alpha_pattern": {"layers.1.mlp.up_proj": 3, "v_proj": 1},
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        *((architecture, {}) for architecture in ARCHITECTURES),
        ("LlamaForCausalLM", PATTERNS),
        ("LlamaForCausalLM", {"use_rslora": True, **PATTERNS}),
        ("LlamaForCausalLM", {"lora_alpha": 0, "alpha_pattern": {"q_proj": 2}}),
        ("Qwen2ForCausalLM", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
        ("LlamaForCausalLM", {"target_modules": ["q_proj"], "target_parameters": ["o_proj.weight"]}),
    ],
)
def test_adapter_adds_to_the_models_file_what_merging_adds(bases, architecture, changes, tmp_path):
    """B A * alpha / rank, of the tensors in the file, is merged minus base: both as files of models, read alike."""
    base = bases[architecture]
    adapter_of(base, tmp_path / "adapter", **changes)
    main(["export", "--base", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "a.gguf")])
    convert(base, tmp_path / "merged", tmp_path / "adapter", "fp32", progress=False)
    export_model(base, tmp_path / "base.gguf", "f32", progress=False)
    export_model(tmp_path / "merged", tmp_path / "merged.gguf", "f32", progress=False)
    before, after, lora = (read(tmp_path / f"{name}.gguf") for name in ("base", "merged", "a"))
    found = fields(tmp_path / "a.gguf")
    assert found["general.type"] == "adapter" and found["adapter.type"] == "lora"
    assert found["general.architecture"] == ARCHITECTURES[architecture].name
    adapted = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert lora.keys() == {f"{name}.{part}" for name in adapted for part in ("lora_a", "lora_b")}
    assert adapted == {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} | (
        adapted if changes.get("lora_alpha") == 0 else set()
    )
    for name in adapted:
        a, b = lora[f"{name}.lora_a"].double(), lora[f"{name}.lora_b"].double()
        scale = found["adapter.lora.alpha"] / b.shape[1]
        added = a @ b.t() if name == "token_embd.weight" else b @ a
        error = (before[name].double() + scale * added - after[name].double()).norm()
        assert error <= 2**-22 * after[name].double().norm(), name  # a rounding or two to fp32
    assert len(adapted) == len(lora) // 2 > 0


@pytest.mark.parametrize(("to", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_adapter_is_rounded_once_to_16_bits(bases, to, dtype, tmp_path):
    adapter_of(bases["Qwen2ForCausalLM"], tmp_path / "adapter")
    for name in ("f32", to):
        export_adapter(bases["Qwen2ForCausalLM"], tmp_path / "adapter", tmp_path / name, name)
    exact, rounded = read(tmp_path / "f32"), read(tmp_path / to)
    assert exact.keys() == rounded.keys() and set(kinds(tmp_path / to).values()) == {to.upper()}
    assert all(torch.equal(rounded[name], tensor.to(dtype).float()) for name, tensor in exact.items())


def test_adapter_over_4_bits_is_the_same_file(bases, tmp_path):
    base = bases["LlamaForCausalLM"]
    adapter_of(base, tmp_path / "adapter")
    convert(base, tmp_path / "nf4", to="nf4", progress=False)
    for folder, name in ((base, "a"), (tmp_path / "nf4", "b")):
        export_adapter(folder, tmp_path / "adapter", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("LlamaForCausalLM", {"use_dora": True}, "as GGUF has no DoRA (merge it, and export the model)"),
        ("biased", {"lora_bias": True}, "as GGUF has no lora_bias (merge it, and export the model)"),
        ("LlamaForCausalLM", {"modules_to_save": ["lm_head"]}, "got a lm_head.weight of its own"),
        ("biased", {"bias": "lora_only"}, ".bias of its own"),
        ("tied", {"target_modules": ["embed_tokens"]}, "expected no layer whose weight is tied, as llama.cpp adapts"),
        ("LlamaForCausalLM", {"init_lora_weights": "pissa"}, "expected one that leaves the base weight as it is"),
        (
            "LlamaForCausalLM",
            {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
            "GGUF has no trained tokens",
        ),
    ],
    ids=str,
)
def test_part_of_an_adapter_that_gguf_lacks_is_named_in_the_error(bases, base, changes, message, tmp_path):
    adapter_of(bases[base], tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        export_adapter(bases[base], tmp_path / "adapter", tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_tensor_of_another_models_adapter_is_named_in_the_error(bases, tmp_path):
    adapter_of(bases["LlamaForCausalLM"], tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"k_proj.lora_B.weight: expected the shape \[256, 4\], .*, got \[32, 4\]"):
        export_adapter(bases["Qwen3ForCausalLM"], tmp_path / "adapter", tmp_path / "a.gguf")
    models.make("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="for GGUF, got GPT2LMHeadModel"):
        export_adapter(tmp_path / "gpt2", tmp_path / "adapter", tmp_path / "a.gguf")
