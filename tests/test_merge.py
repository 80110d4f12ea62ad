"""Guards `python -m qlora_native merge` and `quantize`: what they write, their memory, and interruptions."""

import json
import os
import shutil
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


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weight_is_quantized_once(bases, family, tmp_path):
    models.save_adapter(bases[family], tmp_path / "adapter", family)
    for to in ("fp32", "nf4"):
        report = convert(bases[family], tmp_path / to, tmp_path / "adapter", to, progress=False)
    merged, layers = load(tmp_path / "fp32", family), models.layers_of(quantized(tmp_path / "nf4", family))
    assert report.quantized == len(layers) > 0
    for name, layer in layers.items():
        source = merged.get_submodule(name)
        weight = source.weight if isinstance(source, torch.nn.Linear) else source.weight.t()
        assert torch.equal(layer.dequantize(torch.float32), qn.quantize(weight.detach()).dequantize()), name
    assert {path.name for path in bases[family].iterdir()} == {path.name for path in (tmp_path / "fp32").iterdir()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_say_whether_a_weight_is_transposed_and_not_the_adapter(bases, family, tmp_path):
    """`fan_in_fan_out` of a recipe for GPT-2 may be in an adapter of any model, or missing from one of GPT-2."""
    models.save_adapter(bases[family], tmp_path / "adapter", family)
    written = []
    for value in (False, True):
        models.edit_json(tmp_path / "adapter/adapter_config.json", fan_in_fan_out=value)
        convert(bases[family], tmp_path / str(value), tmp_path / "adapter", "fp32", progress=False)
        written.append(tensors_of(tmp_path / str(value)))
    models.assert_same_bits(*written)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_checkpoint_is_what_loading_quantizes(bases, family, tmp_path):
    report = convert(bases[family], tmp_path / "out", to="nf4", progress=False)
    expected = quantized(bases[family], family)
    actual = load(tmp_path / "out", family, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert len(models.layers_of(actual)) == len(models.layers_of(expected)) == report.quantized
    models.assert_same_bits(actual.state_dict(), expected.state_dict())
    assert 0.05 < report.error < 0.15  # of normal values in NF4: about 0.09


def test_merge_into_4_bits_reports_its_rounding(bases, tmp_path):
    convert(bases["llama"], tmp_path / "base", to="nf4", progress=False)
    models.save_adapter(bases["llama"], tmp_path / "adapter")
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
    models.assert_same_bits(*(tensors_of(tmp_path / name) for name in ("base", "same")))


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
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


def test_layer_that_the_files_have_within_another_tensor_is_refused(tmp_path):
    models.joined().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"files have layers.0.self_attn.k_proj.weight within another tensor"):
        convert(tmp_path / "base", tmp_path / "out", to="nf4", progress=False)
    model = transformers.NomicBertModel.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter: .*got layers.0.self_attn.q_proj.weight, which they have within"):
        convert(tmp_path / "base", tmp_path / "out", tmp_path / "adapter", progress=False)
    assert not (tmp_path / "out").exists()


def test_report_names_folders_that_stay_with_the_base(bases, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "base")
    (tmp_path / "base/additional_chat_templates").mkdir()
    report = convert(tmp_path / "base", tmp_path / "out", to="fp16", progress=False)
    assert "folders of the base are not copied: additional_chat_templates" in report.notes


def test_layer_that_a_base_in_4_bits_keeps_in_16_stays_so(bases, tmp_path):
    kept = "model.layers.0.mlp.down_proj"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", kept])
    load(bases["llama"], quantization_config=config).save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "out", to="nf4", double_quant=False, progress=False)
    models.assert_same_bits(*(tensors_of(tmp_path / name) for name in ("base", "out")))
    layers = models.layers_of(quantized(tmp_path / "out"))
    assert kept not in layers and "model.layers.1.mlp.down_proj" in layers


def test_tokenizer_of_the_adapter_is_the_merged_models(bases, tmp_path):
    peft.get_peft_model(load(bases["llama"]), peft.LoraConfig()).save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_text('{"new": "token"}')
    convert(bases["llama"], tmp_path / "out", tmp_path / "adapter", progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == '{"new": "token"}'


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
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    models.save_adapter(tmp_path / "plain", tmp_path / "adapter", **options)
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
    models.save_adapter(tmp_path / "plain", tmp_path / "adapter", target_modules=["q_proj"])
    places = (f"--{name}={tmp_path / name}" for name in ("base", "adapter", "out"))
    main(["merge", *places])
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {dtype}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and "quantization_config" not in config
    text = f"weights in 4 bits were written in the dtype that they had before: {config['dtype']} (14)"
    assert text in capsys.readouterr().out


def test_tensor_that_is_not_quantized_keeps_the_dtype_of_the_base(bases, tmp_path):
    """Also one that the adapter has in another dtype."""
    models.save_adapter(bases["llama"], tmp_path / "adapter", target_modules=["lm_head"], modules_to_save=["norm"])
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


UNREAD = [
    ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),  # older versions stored what is computed today
    ("llama", ["v_head.summary.weight", "score.weight", "model.layers.2.mlp.up_proj.weight"]),
    ("gpt2", ["transformer.h.0.attn.masked_bias"]),
]


@pytest.mark.parametrize("to", [None, "fp16", "nf4"])
@pytest.mark.parametrize(("family", "names"), UNREAD)
def test_tensor_that_transformers_does_not_read_is_named_and_copied(bases, family, names, to, tmp_path):
    added = {name: torch.rand(2, 64) for name in names}
    base = changed(bases[family], tmp_path / "base", **added)
    report = convert(base, tmp_path / "out", to=to, progress=False)
    assert f"{len(names)} tensors that transformers does not read were copied as they are: {min(names)}" in str(report)
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in added.items())


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
    base = changed(bases["llama"], tmp_path / "base", **{name: torch.rand(1)})
    with pytest.raises(ValueError, match=f"base/model.safetensors: {name}: expected a tensor that a LlamaForCausalLM"):
        convert(base, tmp_path / "out", progress=False)


def test_scale_of_a_weight_that_has_another_name_in_the_files_is_refused(bases, tmp_path):
    """Files of GPT-2 leave out "transformer."."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(bases["gpt2"]).items()}
    base, name = changed(bases["gpt2"], tmp_path / "base"), "h.1.mlp.c_fc.weight_scale"
    save_file({**state, name: torch.rand(1)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: expected a tensor that a GPT2LMHeadModel has"):
        convert(base, tmp_path / "out", progress=False)


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


SHARD = 12 * 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    model = models.make("llama", torch.bfloat16, layers=12, width=512, inner=1536)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    models.save_adapter(folder / "base", folder / "adapter", target_modules=["q_proj", "up_proj"])
    return folder


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("command", [["quantize", "--model"], ["merge", "--adapter", "adapter", "--base"]])
def test_interrupted_command_has_no_result(large, command, sent, tmp_path):
    # A shell starts its background jobs with SIGINT ignored, and what they start inherits that.
    options = {"stderr": subprocess.DEVNULL, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    command = [sys.executable, "-m", "qlora_native", *command, "base", "--out", str(tmp_path / "out")]
    process, deadline = subprocess.Popen(command, cwd=large, **options), time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, "it never wrote anything"
        time.sleep(0.002)
    process.send_signal(sent)
    assert process.wait() != 0
    rest = list(tmp_path.iterdir())
    assert all(path.name.startswith(".out.partial-") for path in rest) and (sent == signal.SIGKILL or not rest)
    assert not any((path / "config.json").exists() for path in rest)


@pytest.mark.parametrize("command", ["merge", "quantize"])
@pytest.mark.parametrize(
    ("module", "moment"),
    [(checkpoints, "save_file"), (merge.shutil, "copy2"), (Path, "write_text"), (os, "fsync"), (os, "replace")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_interruption_at_any_moment_leaves_no_files(bases, command, module, moment, tmp_path, monkeypatch):
    adapter = None
    if command == "merge":
        models.save_adapter(bases["llama"], tmp_path / "adapter")
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
