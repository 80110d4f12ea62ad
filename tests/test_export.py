"""Guards `python -m qlora_native export`: the readers of other libraries read back what was written."""

import json
import re
import shutil

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import models  # noqa: E402
from gguf_files import fields, from_gguf, kinds, make, make_all, read  # noqa: E402
from peak import megabytes, peaks  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert import _gguf_files as _gguf  # noqa: E402
from qlora_native.convert.gguf import ARCHITECTURES, export_model  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_all(tmp_path_factory)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "tied"])
def test_model_is_read_back_by_transformers_bit_for_bit(bases, name, tmp_path):
    main(["export", "--model", str(bases[name]), "--out", str(tmp_path / "m.gguf")])
    expected, actual = models.load(bases[name]), from_gguf(tmp_path / "m.gguf", dtype=torch.float32)
    state = actual.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert torch.equal(models.logits(actual), models.logits(expected))


def test_head_of_its_own_beside_a_tied_config_is_written(bases, tmp_path):
    """transformers does not tie two tensors with different values; llama.cpp takes output.weight if there is one."""
    shutil.copytree(bases["tied"], tmp_path / "model")
    path = next(path for path in (tmp_path / "model").glob("*.safetensors") if "model.norm.weight" in load_file(path))
    state = load_file(path)
    head = torch.randn(models.VOCABULARY, 64)
    save_file({**state, "lm_head.weight": head}, path, metadata={"format": "pt"})
    index = tmp_path / "model/model.safetensors.index.json"
    changed = json.loads(index.read_text())
    changed["weight_map"]["lm_head.weight"] = path.name
    index.write_text(json.dumps(changed))
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert torch.equal(read(tmp_path / "m.gguf")["output.weight"], head)
    assert torch.equal(models.load(tmp_path / "model").lm_head.weight, head)


def test_tensor_that_transformers_does_not_read_is_named_and_left_out(tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path), name: torch.rand(8)}, path, metadata={"format": "pt"})
    report = export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert f"1 tensors that transformers does not read were left out: {name}" in str(report)


def test_bias_is_reordered_like_the_rows_of_its_weight(bases, tmp_path):
    export_model(bases["biased"], tmp_path / "m.gguf", progress=False)
    state, written = models.load(bases["biased"]).state_dict(), read(tmp_path / "m.gguf")
    assert sum(name.endswith(".bias") for name in written) == sum(name.endswith(".bias") for name in state) == 14
    for layer, heads in (("q", 4), ("k", 2)):
        for part in ("weight", "bias"):
            tensor, own = written[f"blk.1.attn_{layer}.{part}"], state[f"model.layers.1.self_attn.{layer}_proj.{part}"]
            halves = tensor.view(heads, 8, 2, -1).transpose(1, 2).reshape(own.shape)  # separated again
            assert torch.equal(halves, own) and not torch.equal(tensor, own)
    assert torch.equal(written["blk.1.ffn_down.bias"], state["model.layers.1.mlp.down_proj.bias"])


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_matrix_is_rounded_once_to_16_bits(bases, to, dtype, tmp_path):
    report = export_model(bases["LlamaForCausalLM"], tmp_path / "m.gguf", to, progress=False)
    state = from_gguf(tmp_path / "m.gguf", dtype=torch.float32).state_dict()
    for key, tensor in models.load(bases["LlamaForCausalLM"]).state_dict().items():
        assert torch.equal(state[key], tensor if tensor.dim() == 1 else tensor.to(dtype).float()), key
    assert set(kinds(tmp_path / "m.gguf").values()) == {to.upper(), "F32"}
    assert report.bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)


def test_default_is_the_dtype_of_the_model(bases, tmp_path):
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        make("LlamaForCausalLM", dtype).save_pretrained(tmp_path / kind)
        export_model(tmp_path / kind, tmp_path / f"{kind}.gguf", progress=False)
        assert kinds(tmp_path / f"{kind}.gguf")["blk.0.ffn_up.weight"] == kind
        assert fields(tmp_path / f"{kind}.gguf")["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[kind]


# {type: (steps in a block's largest |W|, for q4_1 and q5_1 in its max - min; how many an element may be off)}.
# That is half a step, or a whole one at the end of q4_0 and q5_0 that has a step less than the other.
STEPS = {"q8_0": (127, 0.5), "q5_0": (16, 1), "q4_0": (8, 1), "q5_1": (31, 0.5), "q4_1": (15, 0.5)}


@pytest.mark.parametrize("to", STEPS)
def test_matrix_in_few_bits_is_within_half_a_step(bases, to, tmp_path):
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
    first, second = read(tmp_path / "nf4.gguf"), read(tmp_path / "decoded.gguf")
    assert first.keys() == second.keys() and all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_metadata_says_what_config_json_says(tmp_path):
    model = make("Qwen3ForCausalLM", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model.save_pretrained(tmp_path / "a model")
    export_model(tmp_path / "a model", tmp_path / "m.gguf", progress=False)
    found = {key: value for key, value in fields(tmp_path / "m.gguf").items() if not key.startswith("GGUF.")}
    expected = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "a model",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "qwen3.vocab_size": models.VOCABULARY,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 128,
        "qwen3.attention.value_length": 128,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "qwen3.rope.dimension_count": 128,
        "qwen3.rope.freq_base": 5e5,
        "tokenizer.ggml.model": "none",
    }
    assert found == expected


ROPES = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rope_is_in_the_file(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    model = make("LlamaForCausalLM", rope_parameters=rope)
    model.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    found = fields(tmp_path / "m.gguf")
    if kind == "llama3":  # llama.cpp divides theta^(-2i/d) by these
        factors = read(tmp_path / "m.gguf")["rope_freqs.weight"]
        frequencies = 1e4 ** (-torch.arange(0, 16, 2) / 16) / factors
        torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq)
        assert factors.max() == pytest.approx(8.0) and factors.min() == 1
        return
    assert found["llama.rope.scaling.type"] == kind and found["llama.rope.scaling.factor"] == 4
    assert found.get("llama.rope.scaling.original_context_length") == ROPES[kind].get(
        "original_max_position_embeddings"
    )


def test_context_ends_where_the_sliding_window_does(tmp_path):
    """Within it both compute the same; llama.cpp would look further back."""
    make("MistralForCausalLM", sliding_window=100).save_pretrained(tmp_path / "model")
    report = export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 100
    assert "says 100 tokens of context, not 512" in str(report)


@pytest.mark.parametrize(
    ("family", "architecture"), [("gpt2", "GPT2LMHeadModel"), ("gpt-neox", "GPTNeoX"), ("t5", "T5")]
)
def test_other_architecture_is_named_in_the_error(family, architecture, tmp_path):
    models.make(family).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as error:
        main(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "m.gguf")])
    assert re.match(f"export: .*expected one of LlamaForCausalLM, .*, got {architecture}", str(error.value))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, the only one that llama.cpp has for it, got gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type: expected one of"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 9.0}}, "beta_fast=9"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -1.0}},
            "factor: expected a positive",
        ),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps: expected a positive number, got 1e-60"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings: expected a number from 1 to"),
        ({"dtype": "float64"}, "dtype: expected float32, bfloat16 or float16, got float64"),
        ({"num_attention_heads": 64, "head_dim": 1, "num_key_value_heads": 32}, "head_dim: expected an even number"),
    ],
    ids=str,
)
def test_setting_that_llama_cpp_would_leave_out_is_named(bases, changes, message, tmp_path):
    model = make("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", **changes)
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
        (["--model", "model", "--out", "model"], "model: expected a new file"),
        (["--model", "model", "--out", "m.gguf", "--to", "q4_k"], "to: expected one of f32, f16, bf16, q8_0"),
        (
            ["--base", "model", "--adapter", "model", "--out", "m.gguf"],
            "adapter_config.json: expected a file that PEFT",
        ),
        (["--base", "model", "--adapter", "model", "--out", "a", "--to", "q8_0"], "expected one of f32, f16, bf16 for"),
        (["--model", "model", "--out", "out", "--to", "int4", "--blocksize", "128"], "expected a divisor of 96, which"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_argument_is_one_sentence(bases, arguments, message, tmp_path, monkeypatch):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        main(["export", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value).strip()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [["--out", "m"], ["--base", "b", "--out", "m"], ["--model", "m", "--base", "b", "--out", "m"]]
)
def test_model_or_base_and_adapter_are_asked_for(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["export", *arguments])
    assert "expected --model, or --base and --adapter" in capsys.readouterr().err


# ---- a file appears whole or not at all ------------------------------------------------------------------------------


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


def test_link_out_of_the_folder_is_named_in_the_error(bases, tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model/tokenizer.json").symlink_to("../secret")
    with pytest.raises(ValueError, match="expected a file of this folder, got a link to"):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "secret"}


def test_memory_holds_a_tensor_a_few_times(tmp_path):
    """A model of 19 MB, whose largest tensor has 1.8 MB in fp32."""
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
