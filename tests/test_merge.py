"""Guards `python -m qlora_native merge` and `quantize`: what they write, their memory, and interruptions."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from models import load, tensors_of  # noqa: E402
from peak import megabytes, peaks  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.__main__ import main  # noqa: E402
from qlora_native.convert import _checkpoints as checkpoints  # noqa: E402
from qlora_native.convert import merge  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Setting `fan_in_fan_out`")
FAMILIES = ("llama", "gpt-neox", "t5", "gpt2")


def quantized(folder, family="llama"):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return load(folder, family, quantization_config=config)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: folder in many shards, with a tokenizer's file beside it}."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        models.make(family, torch.bfloat16).save_pretrained(made[family], max_shard_size="60KB")
        (made[family] / "tokenizer.json").write_text("{}")
    return made


def adapter_of(folder, family, out, **changes):
    """A PEFT adapter with random values over `folder`; gives PEFT's own merged model, in fp32."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    model = peft.get_peft_model(load(folder, family, dtype=torch.float32), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data *= 1.5
    model.save_pretrained(out)
    return model.merge_and_unload()


VARIANTS = [
    {},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3, "v_proj": 1}},
    {"use_dora": True},
    {"modules_to_save": ["lm_head", "o_proj"], "target_modules": ["q_proj", "embed_tokens"]},
]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", v) for v in VARIANTS] + [("gpt-neox", {"lora_bias": True}), ("t5", {}), ("gpt2", {})],
)
def test_merged_checkpoint_is_what_peft_merges(bases, family, changes, tmp_path):
    expected = adapter_of(bases[family], family, tmp_path / "adapter", **changes)
    report = convert(bases[family], tmp_path / "out", tmp_path / "adapter", "fp32", progress=False)
    assert report.merged > 0 and report.quantized == 0
    merged = load(tmp_path / "out", family)
    assert merged.dtype == torch.float32
    state = merged.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert {path.name for path in bases[family].iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    convert(bases[family], tmp_path / "bf16", tmp_path / "adapter", "bf16", progress=False)
    rounded = load(tmp_path / "bf16", family, dtype="auto").state_dict()
    assert not [n for n, t in rounded.items() if not torch.equal(t, state[n].to(t.dtype))]
    report = convert(bases[family], tmp_path / "nf4", tmp_path / "adapter", "nf4", progress=False)
    layers = models.layers_of(load(tmp_path / "nf4", family, quantization_config=BitsAndBytesConfig(load_in_4bit=True)))
    assert report.quantized == len(layers)
    for name, layer in layers.items():
        source = merged.get_submodule(name)
        weight = source.weight if isinstance(source, torch.nn.Linear) else source.weight.t()
        assert torch.equal(layer.dequantize(torch.float32), qn.quantize(weight.detach()).dequantize()), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_say_whether_a_weight_is_transposed_and_not_the_adapter(bases, family, tmp_path):
    """`fan_in_fan_out` of a recipe for GPT-2 may be in an adapter of any model, or missing from one of GPT-2."""
    adapter_of(bases[family], family, tmp_path / "adapter")
    path, written = tmp_path / "adapter" / "adapter_config.json", []
    for value in (False, True):
        path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": value}))
        convert(bases[family], tmp_path / str(value), tmp_path / "adapter", "fp32", progress=False)
        written.append(tensors_of(tmp_path / str(value)))
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_checkpoint_is_what_loading_quantizes(bases, family, tmp_path):
    report = convert(bases[family], tmp_path / "out", to="nf4", progress=False)
    expected = quantized(bases[family], family)
    actual = load(tmp_path / "out", family, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert len(models.layers_of(actual)) == len(models.layers_of(expected)) == report.quantized
    state = actual.state_dict()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert 0.05 < report.error < 0.15  # of normal values in NF4: about 0.09


def test_merge_into_4_bits_reports_its_rounding(bases, tmp_path):
    """Base in 4 bits already; the merged weight is rounded once, and the error reported is the one that was made."""
    convert(bases["llama"], tmp_path / "base", to="nf4", progress=False)
    adapter_of(bases["llama"], "llama", tmp_path / "adapter")
    dense = convert(tmp_path / "base", tmp_path / "fp32", tmp_path / "adapter", "fp32", progress=False)
    report = convert(tmp_path / "base", tmp_path / "out", tmp_path / "adapter", "nf4", progress=False)
    assert dense.merged == report.merged == report.quantized == 14
    exact = load(tmp_path / "fp32", dtype=torch.float32)
    model = load(tmp_path / "out", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    errors, weights = [], []
    for name, layer in models.layers_of(model).items():
        weight = exact.get_submodule(name).weight.double()
        errors.append((layer.dequantize(torch.float32).double() - weight).norm())
        weights.append(weight.norm())
        assert report.errors[name] == pytest.approx((errors[-1] / weights[-1]).item(), rel=1e-4)
        assert layer.dtype == torch.bfloat16
    total = torch.stack(errors).norm() / torch.stack(weights).norm()
    assert report.error == pytest.approx(total.item(), rel=1e-4)
    assert "relative to what the adapter added" in str(report)
    # Not adapted, and quantized as it is wanted: the very bytes.
    convert(tmp_path / "base", tmp_path / "same", to="nf4", progress=False)
    before, after = (
        {n: t for p in f.glob("*.safetensors") for n, t in load_file(p).items()}
        for f in (tmp_path / "base", tmp_path / "same")
    )
    assert before.keys() == after.keys() and all(torch.equal(after[n], t) for n, t in before.items())


def test_index_and_config_match_the_files(bases, tmp_path):
    report = convert(bases["llama"], tmp_path / "out", to="fp4", blocksize=128, double_quant=False, progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == report.bytes == total
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["blocksize"] == 128 and config["bnb_4bit_quant_type"] == "fp4"
    assert config["bnb_4bit_use_double_quant"] is False


# ---- dtypes ----------------------------------------------------------------------------------------------------------

LAST = "model.layers.1.mlp.down_proj.weight"


def changed(base, out, **tensors):
    """A copy of a folder in one file, with other tensors."""
    out.mkdir()
    save_file({**tensors_of(base), **tensors}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((base / "config.json").read_text())
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_base_is_the_default(bases, dtype, tmp_path, capsys):
    models.make("llama", dtype).save_pretrained(tmp_path / "plain")
    base = changed(tmp_path / "plain", tmp_path / "base", **{"model.norm.weight": torch.full((96,), 1.0001)})
    adapter_of(
        tmp_path / "plain", "llama", tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    places = (f"--{name}={tmp_path / name}" for name in ("base", "adapter", "out"))
    main(["merge", *places])
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    touched = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert touched == {*(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)), "lm_head.weight"}
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((base / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    counts = f"{name} (20), float32 (1)" if dtype != torch.float32 else "float32 (21)"
    assert f"dtypes of the base were kept: {counts} (--to chooses another)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_in_4_bits_is_merged_into_the_dtype_that_it_had(dtype, tmp_path, capsys):
    models.make("llama", dtype).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "base", to="nf4", progress=False)
    adapter_of(tmp_path / "plain", "llama", tmp_path / "adapter", target_modules=["q_proj"])
    places = (f"--{name}={tmp_path / name}" for name in ("base", "adapter", "out"))
    main(["merge", *places])
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {dtype}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and "quantization_config" not in config
    text = f"weights in 4 bits were written in the dtype that they had before: {config['dtype']} (14)"
    assert text in capsys.readouterr().out


def test_tensor_that_is_not_quantized_keeps_the_dtype_of_the_base(bases, tmp_path):
    """Also one that the adapter brings in another dtype."""
    adapter_of(bases["llama"], "llama", tmp_path / "adapter", target_modules=["lm_head"], modules_to_save=["norm"])
    convert(bases["llama"], tmp_path / "out", tmp_path / "adapter", "nf4", progress=False)
    written = tensors_of(tmp_path / "out")
    assert written["model.norm.weight"].dtype == written["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("to", "dtype", "value", "message"),
    [
        ("fp16", torch.bfloat16, 1e5, r"at most 65504, as float16 has \(convert to bf16 or fp32\), got 99840"),
        ("fp16", torch.float32, -65520.0, r"at most 65504, as float16 has \(convert to bf16 or fp32\), got -65520"),
        ("bf16", torch.float32, 3.4e38, r"at most 3.38953e\+38, as bfloat16 has \(convert to fp32\), got 3.4e\+38"),
    ],
)
@pytest.mark.parametrize("name", [LAST, "model.norm.weight", "model.embed_tokens.weight"])
def test_value_beyond_the_dtype_is_named_in_the_error(bases, to, dtype, value, message, name, tmp_path):
    tensor = tensors_of(bases["llama"])[name].to(dtype)
    tensor.view(-1)[5] = value
    base = changed(bases["llama"], tmp_path / "base", **{name: tensor})
    with pytest.raises(ValueError, match=f"base/model.safetensors: {name}: expected values of {message}"):
        convert(base, tmp_path / "out", to=to, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    convert(base, tmp_path / "out", to="fp32", progress=False)
    assert torch.equal(tensors_of(tmp_path / "out")[name], tensor.float())


def test_infinity_of_the_base_stays_one(bases, tmp_path):
    """Only a change of a value is refused."""
    tensor = torch.tensor([float("inf"), float("-inf"), float("nan")] * 32).bfloat16()
    base = changed(bases["llama"], tmp_path / "base", **{"model.norm.weight": tensor})
    for to in (None, "fp16"):
        convert(base, tmp_path / str(to), to=to, progress=False)
        written = tensors_of(tmp_path / str(to))["model.norm.weight"]
        assert torch.equal(written.float().nan_to_num(0.5), tensor.float().nan_to_num(0.5))


@pytest.mark.parametrize("to", ["nf4", "fp4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named_with_its_file(bases, to, value, tmp_path):
    tensor = tensors_of(bases["llama"])[LAST]
    tensor[3, 5] = value
    base = changed(bases["llama"], tmp_path / "base", **{LAST: tensor})
    with pytest.raises(ValueError, match=f"base/model.safetensors: {LAST}: expected .*finite.*, got"):
        convert(base, tmp_path / "out", to=to, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("to", [None, "fp16", "nf4"])
def test_tensor_that_transformers_does_not_read_is_named_and_copied(bases, to, tmp_path, capsys):
    """Files of older versions have buffers that the model computes today."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    buffer = torch.rand(12)
    base = changed(bases["llama"], tmp_path / "base", **{name: buffer})
    report = convert(base, tmp_path / "out", to=to, progress=False)
    assert f"1 tensors that transformers does not read were copied as they are: {name}" in str(report)
    assert torch.equal(tensors_of(tmp_path / "out")[name], buffer)


OTHER_HEADS = [
    # The files of BERT have another output layer and a pooler, which the class for masked words lacks.
    ("bert", ["cls.seq_relationship.weight", "bert.pooler.dense.weight", "bert.pooler.dense.bias"]),
    ("llama", ["v_head.summary.weight", "score.weight", "model.layers.2.mlp.up_proj.weight"]),
    ("gpt2", ["transformer.h.0.attn.masked_bias"]),
]


@pytest.mark.parametrize(("family", "names"), OTHER_HEADS)
def test_parts_that_the_class_lacks_are_named_and_copied(bases, family, names, tmp_path):
    """transformers reads such files with a warning."""
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
        )
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    added = {name: torch.rand(2, 64) for name in names}
    base = changed(tmp_path / "bert" if family == "bert" else bases[family], tmp_path / "base", **added)
    report = convert(base, tmp_path / "out", progress=False)
    assert f"{len(names)} tensors that transformers does not read were copied as they are: {min(names)}" in str(report)
    before, after = (tensors_of(folder) for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.weight.scale",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.norm.weight_scale",
        "lm_head.SCB",
    ],
)
def test_tensor_that_belongs_to_a_weight_is_refused(bases, name, tmp_path):
    """Without it the weight is another one."""
    base = changed(bases["llama"], tmp_path / "base", **{name: torch.rand(1)})
    with pytest.raises(ValueError, match=f"base/model.safetensors: {name}: expected a tensor that a LlamaForCausalLM"):
        convert(base, tmp_path / "out", progress=False)


def test_scale_of_a_weight_that_has_another_name_in_the_files_is_refused(bases, tmp_path):
    """Files of GPT-2 leave out "transformer."."""
    base, name = tmp_path / "base", "h.1.mlp.c_fc.weight_scale"
    base.mkdir()
    (base / "config.json").write_text((bases["gpt2"] / "config.json").read_text())
    state = {key.removeprefix("transformer."): tensor for key, tensor in tensors_of(bases["gpt2"]).items()}
    save_file({**state, name: torch.rand(1)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: expected a tensor that a GPT2LMHeadModel has"):
        convert(base, tmp_path / "out", progress=False)


# ---- what cannot be merged -------------------------------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename(folder, old, new):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): t for name, t in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, peft_type="LOKR"), "peft_type: expected one of LORA, LOHA, IA3, TRAINABLE_TOKENS, got LOKR"),
        (lambda f: edit(f, use_qalora=True), "use_qalora: expected none, as it cannot be merged here, got True"),
        (lambda f: edit(f, init_lora_weights="pissa_niter_4"), "init_lora_weights: expected one that leaves the base"),
        (lambda f: edit(f, init_lora_weights="OLoRA"), "init_lora_weights: expected one that leaves the base"),
        (lambda f: edit(f, init_lora_weights="loftq"), "init_lora_weights: expected one that leaves the base"),
        (
            lambda f: rename(f, "layers.1.mlp.up_proj", "layers.7.mlp.up_proj"),
            "base has and adapter_config.json adapts, got model",
        ),
        (lambda f: rename(f, "lora_A", "lora_X"), "adapter_config.json adapts, got model.layers.0"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: expected a file that PEFT"),
    ],
)
def test_mismatch_of_an_adapter_is_named_in_the_error(bases, damage, message, tmp_path):
    adapter_of(bases["llama"], "llama", tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        convert(bases["llama"], tmp_path / "out", tmp_path / "adapter", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_bad_argument_leaves_no_files(bases, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    for arguments, message in (
        (["quantize", "--model", str(tmp_path / "taken"), "--out", str(tmp_path / "out")], "found neither"),
        (["quantize", "--model", str(bases["llama"]), "--out", str(tmp_path / "taken")], "a new or empty folder"),
        (["quantize", "--model", str(bases["llama"]), "--out", str(tmp_path / "o"), "--blocksize", "65"], "blocksize"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert message in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}
    main(["quantize", "--model", str(bases["llama"]), "--out", str(tmp_path / "out")])
    assert "quantized 14 layers, wrote" in capsys.readouterr().out


# ---- memory and interruption -----------------------------------------------------------------------------------------


SHARD = 12 * 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 75 MB in shards of at most 12 MB, and an adapter."""
    folder = tmp_path_factory.mktemp("large")
    models.make("llama", torch.bfloat16, layers=12, width=512, inner=1536).save_pretrained(
        folder / "base", max_shard_size=SHARD
    )
    adapter_of(folder / "base", "llama", folder / "adapter", target_modules=["q_proj", "up_proj"])
    return folder


COMMANDS = {
    "merge": ["merge", "--adapter", "adapter", "--base"],
    "quantize": ["quantize", "--model"],
}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_command_leaves_no_result(large, command, sent, tmp_path):
    # A shell starts its background jobs with SIGINT ignored, and what they start inherits that.
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_native", *COMMANDS[command], "base", "--out", str(tmp_path / "out")],
        cwd=large,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, "it never wrote anything"
        time.sleep(0.002)
    os.kill(process.pid, sent)
    assert process.wait() != 0
    assert not (tmp_path / "out").exists()
    left = list(tmp_path.iterdir())
    assert all(path.name.startswith(".out.partial-") for path in left)
    assert sent == signal.SIGKILL or not left
    assert not any((path / "config.json").exists() for path in left)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("module", "moment"),
    [(checkpoints, "save_file"), (merge.shutil, "copy2"), (Path, "write_text"), (os, "fsync"), (os, "replace")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_interruption_at_any_moment_leaves_no_files(bases, command, module, moment, tmp_path, monkeypatch):
    adapter = None
    if command == "merge":
        adapter_of(bases["llama"], "llama", tmp_path / "adapter")
        adapter = tmp_path / "adapter"
    before = {path.name for path in tmp_path.iterdir()}
    original = getattr(module, moment)
    with monkeypatch.context() as patch:
        calls = []

        def interrupted(*args, **options):
            calls.append(args)
            if len(calls) == 2 or moment in ("copy2", "replace"):  # of which there is one
                raise KeyboardInterrupt
            return original(*args, **options)

        patch.setattr(module, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(bases["llama"], tmp_path / "out", adapter, "nf4", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == before
    convert(bases["llama"], tmp_path / "out", adapter, "nf4", progress=False)  # and it can be done again


def test_memory_holds_one_shard(large, tmp_path):
    prepare = f"""
import itertools
from qlora_native.convert.merge import convert
folder, out = {str(large)!r}, (f"{tmp_path}/{{i}}" for i in itertools.count())
def run(adapter, to):
    convert(folder + "/base", next(out), adapter and f"{{folder}}/{{adapter}}", to, progress=False)
run("adapter", "bf16")  # code, threads, caches
"""
    extra = peaks(prepare, "run('adapter', 'bf16')", "run('adapter', 'nf4')", "run(None, 'nf4')")
    weight = 512 * 1536 * 4  # the largest in fp32: it is there twice, beside a rounded copy and what a call takes
    bounds = [SHARD + 4 * weight, SHARD / 3 + 4 * weight, SHARD / 3 + 4 * weight]
    assert all(e < bound for e, bound in zip(extra, bounds, strict=True)), megabytes(extra)
