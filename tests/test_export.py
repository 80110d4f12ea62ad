"""Guards `python -m qlora_native export`: other libraries read back a model, and an adapter adds what PEFT adds."""

import re

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import models  # noqa: E402
from gguf_files import READ, fields, from_gguf, kinds, make, make_all, read, write_random  # noqa: E402
from peak import megabytes, peaks  # noqa: E402

from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert import _gguf_files as _gguf  # noqa: E402
from qlora_native.convert.gguf import ARCHITECTURES, export_adapter, export_model  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402
from qlora_native.testing import relative_error  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_all(tmp_path_factory)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "tied"])
def test_model_is_read_back_by_transformers_bit_for_bit(bases, name, tmp_path):
    main(["export", "--model", str(bases[name]), "--out", str(tmp_path / "m.gguf")])
    expected, actual = models.load(bases[name]), from_gguf(tmp_path / "m.gguf", dtype=torch.float32)
    models.assert_same_bits(actual.state_dict(), expected.state_dict())
    assert torch.equal(models.logits(actual), models.logits(expected))


def test_head_of_its_own_beside_a_tied_config_is_written(tmp_path):
    """transformers does not tie two tensors with different values; llama.cpp takes output.weight if there is one."""
    make("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    head = torch.randn(models.VOCABULARY, 64)
    models.edit_tensors(tmp_path / "model/model.safetensors", {"lm_head.weight": head})
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert torch.equal(read(tmp_path / "m.gguf")["output.weight"], head)
    assert torch.equal(models.load(tmp_path / "model").lm_head.weight, head)


def test_tensor_that_transformers_does_not_read_is_named_and_left_out(tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    models.edit_tensors(tmp_path / "model/model.safetensors", {name: torch.rand(8)})
    report = export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert f"1 tensors that transformers does not read were left out: {name}" in str(report)


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    ("to", "dtype", "number"), [("bf16", torch.bfloat16, 32), ("f16", torch.float16, 1), ("f32", torch.float32, 0)]
)
def test_matrix_is_rounded_once_to_its_dtype(bases, to, dtype, number, default, tmp_path):
    base, kind = bases["LlamaForCausalLM"], to.upper()
    if default:
        base, to = tmp_path / "model", None
        make("LlamaForCausalLM", dtype).save_pretrained(base)
    report = export_model(base, tmp_path / "m.gguf", to, progress=False)
    state = from_gguf(tmp_path / "m.gguf", dtype=torch.float32).state_dict()
    for key, tensor in models.load(base, dtype=torch.float32).state_dict().items():
        assert torch.equal(state[key], tensor if tensor.dim() == 1 else tensor.to(dtype).float()), key
    assert set(kinds(tmp_path / "m.gguf").values()) == {kind, "F32"}
    assert fields(tmp_path / "m.gguf")["general.file_type"] == number
    assert report.bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)


# {type: (steps in a block's largest |W|, for q4_1 and q5_1 in its max - min; how many an element may be off)}.
# That is half a step, or a whole one at the end of q4_0 and q5_0 that has a step less than the other.
STEPS = {"q8_0": (127, 0.5), "q5_0": (16, 1), "q4_0": (8, 1), "q5_1": (31, 0.5), "q4_1": (15, 0.5)}


@pytest.mark.parametrize("to", STEPS)
def test_quantized_matrix_is_within_half_a_step(bases, to, tmp_path):
    report = export_model(bases["LlamaForCausalLM"], tmp_path / "m.gguf", to, progress=False)
    export_model(bases["LlamaForCausalLM"], tmp_path / "exact.gguf", "f32", progress=False)
    exact, rounded, kind = read(tmp_path / "exact.gguf"), read(tmp_path / "m.gguf"), kinds(tmp_path / "m.gguf")
    matrices = [name for name, tensor in exact.items() if tensor.dim() == 2]
    assert {kind[name] for name in ("token_embd.weight", "output.weight")} == {"Q8_0"}
    assert {kind[name] for name in matrices if name.startswith("blk.")} == {to.upper()}
    errors, weights = 0.0, 0.0
    for name in matrices:
        steps, part = STEPS[kind[name].lower()]
        blocks, error = exact[name].view(-1, 32), (rounded[name] - exact[name]).view(-1, 32).abs()
        largest = blocks.abs().amax(dim=1, keepdim=True)
        span = blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True) if kind[name].endswith("_1") else largest
        rounding = 2**-11 * (span + largest)  # of the step, and of the minimum, to fp16
        assert (error <= span / steps * part + rounding + 1e-7).all(), name
        errors, weights = errors + error.double().square().sum(), weights + blocks.double().square().sum()
        assert report.errors[name] == pytest.approx((error.norm() / blocks.norm()).item(), rel=1e-4)
    assert report.error == pytest.approx((errors / weights).sqrt().item(), rel=1e-4)
    assert report.quantized == len(matrices)
    assert str(report).startswith(f"quantized {len(matrices)} layers, wrote ")


def test_row_that_is_no_whole_number_of_blocks_keeps_its_dtype(tmp_path):
    make("LlamaForCausalLM", torch.bfloat16, intermediate_size=72).save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.gguf", "q8_0", progress=False)
    found = kinds(tmp_path / "m.gguf")
    assert found["blk.0.ffn_down.weight"] == "BF16" and found["blk.0.ffn_up.weight"] == "Q8_0"


def test_model_in_4_bits_is_decoded(bases, tmp_path):
    convert(bases["LlamaForCausalLM"], tmp_path / "nf4", to="nf4", progress=False)
    convert(tmp_path / "nf4", tmp_path / "decoded", to="fp32", progress=False)
    for folder in ("nf4", "decoded"):
        export_model(tmp_path / folder, tmp_path / f"{folder}.gguf", "f32", progress=False)
    models.assert_same_bits(read(tmp_path / "nf4.gguf"), read(tmp_path / "decoded.gguf"))


def test_metadata_says_what_config_json_says(tmp_path):
    model = make("Qwen3ForCausalLM", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model.save_pretrained(tmp_path / "a model")
    export_model(tmp_path / "a model", tmp_path / "m.gguf", progress=False)
    found = {key: value for key, value in fields(tmp_path / "m.gguf").items() if not key.startswith("GGUF.")}
    general = {"architecture": "qwen3", "type": "model", "name": "a model", "file_type": 0, "quantization_version": 2}
    sizes = {"vocab_size": models.VOCABULARY, "context_length": 512, "embedding_length": 64, "block_count": 2}
    heads = {"head_count": 4, "head_count_kv": 2, "key_length": 128, "value_length": 128}
    model = {
        **sizes,
        "feed_forward_length": 96,
        **{f"attention.{name}": value for name, value in heads.items()},
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 128,
        "rope.freq_base": 5e5,
    }
    expected = {f"general.{name}": value for name, value in general.items()}
    expected |= {f"qwen3.{name}": value for name, value in model.items()} | {"tokenizer.ggml.model": "none"}
    assert found == expected


def test_model_of_the_hubs_cache_is_named_after_its_repository(tmp_path):
    folder = tmp_path / "models--owner--a-model" / "snapshots" / "0123"
    make("LlamaForCausalLM").save_pretrained(folder)
    export_model(folder, tmp_path / "m.gguf", progress=False)
    assert fields(tmp_path / "m.gguf")["general.name"] == "a-model"


def test_context_ends_where_the_sliding_window_does(tmp_path):
    """Within it both compute the same; llama.cpp would look further back."""
    make("MistralForCausalLM", sliding_window=100).save_pretrained(tmp_path / "model")
    report = export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 100
    assert "says 100 tokens of context, not 512" in str(report)


def test_other_architecture_is_named_in_the_error(tmp_path):
    models.make("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected one of LlamaForCausalLM, .*, got GPT2LMHeadModel"):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def rope(kind, **changes):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, the only one that llama.cpp has for it, got gelu"),
        (rope("dynamic"), "rope_type: expected one of"),
        (rope("yarn", beta_fast=9.0), "beta_fast=9"),
        (rope("yarn", beta_fast=32.0, beta_slow=1.0, truncate=True, attention_factor=1.0), "attention_factor=1.0"),
        (rope("yarn", mscale=1.0, mscale_all_dim=1.0), "mscale=1.0"),
        (rope("linear", factor=-1.0), "factor: expected a positive"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps: expected a positive number, got 1e-60"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings: expected a number from 1 to"),
        ({"dtype": "float64"}, "dtype: expected float32, bfloat16 or float16, got float64"),
        ({"num_attention_heads": 64, "head_dim": 1, "num_key_value_heads": 32}, "head_dim: expected an even number"),
    ],
    ids=str,
)
def test_setting_that_llama_cpp_would_leave_out_is_named(changes, message, tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    models.edit_json(tmp_path / "model/config.json", **changes)
    with pytest.raises(SystemExit) as error:
        main(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "m.gguf")])
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_value_beyond_float16_is_named_in_the_error(tmp_path):
    model = make("LlamaForCausalLM")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e6
    model.save_pretrained(tmp_path / "model")
    for to in ("f16", "q4_0"):
        with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight: expected finite values within (F16|Q4_0), got"):
            export_model(tmp_path / "model", tmp_path / "m.gguf", to, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_model(tmp_path / "model", tmp_path / "m.gguf", "bf16", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--out", "m.gguf"], "nowhere: expected the folder of a checkpoint"),
        (
            ["--model", "file.gguf", "--out", "out"],
            "file.gguf: expected the folder of a checkpoint, got a file. Only `export",
        ),
        (["--model", "model", "--out", "model"], "model: expected a new file"),
        (["--model", "model", "--out", "m.gguf", "--to", "q4_k"], "to: expected one of f32, f16, bf16, q8_0"),
        (["--base", "model", "--adapter", "model", "--out", "m"], "adapter_config.json: expected a file that PEFT"),
        (["--base", "model", "--adapter", "model", "--out", "a", "--to", "q8_0"], "expected one of f32, f16, bf16 for"),
        (["--model", "model", "--out", "out", "--to", "int4", "--blocksize", "128"], "expected a divisor of 96, which"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_argument_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        main(["export", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value).strip()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", ["", "--base b", "--model m --base b"])
def test_model_or_base_and_adapter_are_required(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--out", "m", *arguments.split()])
    assert "expected --model, or --base and --adapter" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["write_header_to_file", "write_tensor_data", "close"])
def test_interrupted_export_leaves_nothing(bases, moment, tmp_path, monkeypatch):
    original = getattr(gguf.GGUFWriter, moment)

    def interrupted(*args, **options):
        original(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_model(bases["tied"], tmp_path / "m.gguf", progress=False)
    assert not list(tmp_path.iterdir())
    export_model(bases["tied"], tmp_path / "m.gguf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_file_that_another_run_has_written_stays(bases, tmp_path, monkeypatch):
    out, original = tmp_path / "m.gguf", _gguf.gguf.GGUFWriter.close

    def close(writer):
        original(writer)
        out.write_text("theirs")

    monkeypatch.setattr(gguf.GGUFWriter, "close", close)
    with pytest.raises(FileExistsError, match="another run has written it"):
        export_model(bases["tied"], out, progress=False)
    assert out.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_link_out_of_the_folder_is_named_in_the_error(tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model/tokenizer.json").symlink_to("../secret")
    with pytest.raises(ValueError, match="expected a file of this folder, got a link to"):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "secret"}


def test_memory_holds_the_largest_tensor_six_times(tmp_path):
    model = make("LlamaForCausalLM", torch.bfloat16, hidden_size=384, intermediate_size=1152, num_hidden_layers=6)
    model.save_pretrained(tmp_path / "model")
    prepare = f"""
import itertools
from qlora_native.convert.gguf import export_model
out = (f"{tmp_path}/{{i}}.gguf" for i in itertools.count())
def run(to):
    export_model({str(tmp_path / "model")!r}, next(out), to, progress=False)
run("q4_0")
"""
    largest = 384 * 1152 * 4
    for extra in peaks(prepare, "run('bf16')", "run('q4_0')"):
        assert extra < 6 * largest, megabytes([extra])


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
    models.save_adapter(base, tmp_path / "adapter", **changes)
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


def adapted_model(path, architecture, folder):
    """The model of a GGUF file in fp32 with a random adapter, which is saved."""
    layers = ["in_proj", "x_proj"] if architecture == "mamba" else "all-linear"  # PEFT refuses Mamba's others
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers, init_lora_weights=False)
    model = peft.get_peft_model(from_gguf(path, dtype=torch.float32), config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", sorted(READ.keys() - {"t5"}))
def test_adapter_of_a_gguf_file_adds_to_it_what_merging_adds(architecture, tmp_path):
    """With B A * alpha / rank in its own tensors, transformers makes of the file the model that PEFT merges."""
    path = tmp_path / "model.gguf"
    write_random(path, architecture, ["F32"], blocks=None)
    model = adapted_model(path, architecture, tmp_path / "adapter")
    main(["export", "--base", str(path), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "a.gguf")])
    lora, found = read(tmp_path / "a.gguf"), fields(tmp_path / "a.gguf")
    assert found["general.architecture"] == architecture
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if f"{tensor.name}.lora_a" in lora:
            a, b = (lora.pop(f"{tensor.name}.{part}") for part in ("lora_a", "lora_b"))
            tensor.data[...] += (found["adapter.lora.alpha"] / a.shape[-2] * b @ a).view(tensor.data.shape).numpy()
    assert not lora
    after = from_gguf(path, dtype=torch.float32).state_dict()
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert relative_error(after[name], tensor) <= 2**-20, name  # sums of 4 products and a rounding or two


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_is_the_same_over_a_folder_and_its_file(bases, architecture, tmp_path):
    export_model(bases[architecture], tmp_path / "m.gguf", "f32", progress=False)
    modules = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]
    models.save_adapter(bases[architecture], tmp_path / "adapter", target_modules=modules, use_rslora=True)
    for base, out in ((bases[architecture], "a.gguf"), (tmp_path / "m.gguf", "b.gguf")):
        export_adapter(base, tmp_path / "adapter", tmp_path / out)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(("to", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_adapter_is_rounded_once_to_16_bits(bases, to, dtype, tmp_path):
    models.save_adapter(bases["Qwen2ForCausalLM"], tmp_path / "adapter")
    for name in ("f32", to):
        export_adapter(bases["Qwen2ForCausalLM"], tmp_path / "adapter", tmp_path / name, name)
    exact, rounded = read(tmp_path / "f32"), read(tmp_path / to)
    assert exact.keys() == rounded.keys() and set(kinds(tmp_path / to).values()) == {to.upper()}
    assert all(torch.equal(rounded[name], tensor.to(dtype).float()) for name, tensor in exact.items())


def test_adapter_over_4_bits_is_the_same_file(bases, tmp_path):
    base = bases["LlamaForCausalLM"]
    models.save_adapter(base, tmp_path / "adapter")
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
        ("LlamaForCausalLM", {"trainable_token_indices": [3]}, "GGUF has no trained tokens"),
    ],
    ids=str,
)
def test_part_of_an_adapter_that_gguf_lacks_is_named_in_the_error(bases, base, changes, message, tmp_path):
    models.save_adapter(bases[base], tmp_path / "adapter", **changes)
    export_model(bases[base], tmp_path / "m.gguf", progress=False)
    for path in [bases[base], tmp_path / "m.gguf"][: 1 if base == "biased" else 2]:  # transformers' Llama has no biases
        with pytest.raises(ValueError, match=re.escape(message)):
            export_adapter(path, tmp_path / "adapter", tmp_path / "a.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "m.gguf"]


def test_file_that_is_no_base_is_named_in_the_error(bases, tmp_path):
    models.save_adapter(bases["LlamaForCausalLM"], tmp_path / "adapter")
    path = tmp_path / "model.gguf"

    def refused(message):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            export_adapter(path, tmp_path / "adapter", tmp_path / "a.gguf")
        assert not (tmp_path / "a.gguf").exists()

    path.write_text("no model")
    refused("GGUF")
    write_random(path, "t5", ["F32"], blocks=None)
    refused("expected a causal language model that transformers knows, got another")
    write_random(path, "llama", ["F32"], blocks=None, keys={"llama.block_count": 10**6})
    refused("block_count: expected no more than the 21 tensors of the file, got 1000000")
    write_random(path, "qwen3", ["F32"], blocks=None)
    with pytest.raises(ValueError, match=r"lora_.* expected the shape \[.*, got \["):
        export_adapter(path, tmp_path / "adapter", tmp_path / "a.gguf")
    make("LlamaForCausalLM", intermediate_size=64).save_pretrained(tmp_path / "narrow")
    models.save_adapter(tmp_path / "narrow", tmp_path / "adapter")
    path.unlink()
    export_model(bases["LlamaForCausalLM"], path, "f32", progress=False)
    gguf.GGUFReader(path, "r+").fields["llama.feed_forward_length"].parts[-1][0] = 64
    refused(r"blk.0.ffn_down.weight: expected \[64, 64\], as the model's .*down_proj.weight has, got \[64, 96\]")


def test_tensor_of_another_models_adapter_is_named_in_the_error(bases, tmp_path):
    models.save_adapter(bases["LlamaForCausalLM"], tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"k_proj.lora_B.weight: expected the shape \[256, 4\], .*, got \[32, 4\]"):
        export_adapter(bases["Qwen3ForCausalLM"], tmp_path / "adapter", tmp_path / "a.gguf")
    models.make("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="for GGUF, got GPT2LMHeadModel"):
        export_adapter(tmp_path / "gpt2", tmp_path / "adapter", tmp_path / "a.gguf")
