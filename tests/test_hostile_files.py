"""Guards against hostile folders, and files that a full disk has cut short: each is refused in one sentence.

`python -m qlora_native quantize` reads them. It must not believe a name, a number or a shape that the files contradict.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import qlora_native as qn  # noqa: E402
from qlora_native.__main__ import main  # noqa: E402
from qlora_native._core.json import parse_object  # noqa: E402
from qlora_native.convert._checkpoints import Checkpoint  # noqa: E402
from qlora_native.convert.merge import convert  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = models.make("llama", torch.bfloat16)
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    model.save_pretrained(folder / "one")
    convert(folder / "one", folder / "nf4", progress=False, to="nf4")
    return folder


@pytest.fixture
def copies(made, tmp_path):
    shutil.copytree(made, tmp_path / "copies")
    return tmp_path / "copies"


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def refused(copies, message, model="shards"):
    """The command ends with one sentence, makes no folder and changes no file."""
    before = contents(copies.parent)
    with pytest.raises(SystemExit) as error:
        main(["quantize", "--model", str(copies / model), "--out", str(copies / "out")])
    text = str(error.value)
    assert message in text and "\n" not in text.strip(), text
    assert contents(copies.parent) == before
    assert not [path for path in copies.iterdir() if "out" in path.name]


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret/model.safetensors", "expected the name of a file in it, got '../secret/model.safetensors'"),
        ("{tmp}/secret/model.safetensors", "expected the name of a file in it"),
        ("..", "expected names of safetensors files"),
        ("config.json", "expected names of safetensors files, got 'config.json'"),
        ("a\\b.safetensors", "expected the name of a file in it"),
        ("nothing.safetensors", "nothing.safetensors"),
        (7, "expected names of safetensors files, got '7'"),
        ("link.safetensors", "expected a file of this folder, got a link to"),
        ("circle.safetensors", "circle.safetensors"),
        ("folder.safetensors", "expected a file, got something else"),
    ],
)
def test_name_outside_of_the_folder_is_named_in_the_error(copies, name, message):
    (copies / "secret").mkdir()
    secret = copies / "secret/model.safetensors"
    shutil.copy(copies / "one/model.safetensors", secret)
    (copies / "shards/link.safetensors").symlink_to(secret)
    (copies / "shards/circle.safetensors").symlink_to("circle.safetensors")
    (copies / "shards/folder.safetensors").mkdir()
    name = name.format(tmp=copies) if isinstance(name, str) else name
    edit(copies / "shards" / INDEX, lambda index: index["weight_map"].update({UP: name}))
    refused(copies, message)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_link_out_of_the_folder_is_named_in_the_error(copies, name):
    (copies / "secret").write_text("{}")
    (copies / "one" / name).unlink(missing_ok=True)
    (copies / "one" / name).symlink_to("../secret")
    refused(copies, "expected a file of this folder, got a link to", "one")


def test_snapshot_of_the_hub_cache_is_read(copies):
    snapshot, blobs = copies / "models--a--b/snapshots/0123", copies / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((copies / "shards").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    main(["quantize", "--model", str(snapshot), "--out", str(copies / "out")])
    written = list((copies / "out").iterdir())
    assert {path.name for path in written} == {path.name for path in snapshot.iterdir()}
    assert not any(path.is_symlink() for path in written)


def test_model_of_the_hub_cache_is_found_by_its_id(copies, monkeypatch):
    calls = []

    def snapshot_download(name, local_files_only):
        calls.append((name, local_files_only))
        return str(copies / "one")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    main(["quantize", "--model", "someone/a-model", "--out", str(copies / "out")])
    assert calls == [("someone/a-model", True)] and (copies / "out/config.json").exists()


@pytest.mark.parametrize("name", ["someone/a-model", "nowhere"])
def test_missing_folder_is_one_sentence(copies, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(copies))
    monkeypatch.chdir(copies)
    with pytest.raises(SystemExit, match=f"{name}: expected the folder of a checkpoint"):
        main(["quantize", "--model", name, "--out", "out"])
    assert not Path("out").exists()


def test_tensor_that_the_index_lacks_or_the_files_is_named(copies):
    edit(copies / "shards" / INDEX, lambda index: index["weight_map"].update({"x": index["weight_map"][UP]}))
    refused(copies, "expected the tensor x, which the index names, got none")
    edit(copies / "shards" / INDEX, lambda index: [index["weight_map"].pop(name) for name in ("x", UP)])
    refused(copies, f"weight_map: expected the tensor {UP}, which model-")


NESTED = f"{UP}.nested_absmax"


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("one", {UP: None}, f"expected all tensors of a LlamaForCausalLM, got no {UP}"),
        ("one", {UP: torch.ones(72, 48)}, f"{UP}: expected the shape [72, 96], as config.json says, got [72, 48]"),
        ("nf4", {UP: None}, f"expected the tensor {UP}, whose quant_state is there, got none"),
        ("nf4", {NESTED: None}, f"{UP}, absmax: expected torch.float32, got torch.uint8"),
        ("nf4", {NESTED: torch.tensor([torch.nan])}, f"{UP}, nested_absmax: expected finite values, got NaN or Inf"),
    ],
)
def test_damaged_tensor_is_named(copies, model, changes, message):
    models.edit_tensors(copies / model / "model.safetensors", changes)
    refused(copies, message, model)
    if model == "nf4":
        with pytest.raises((RuntimeError, ValueError)):
            models.load(copies / model, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_tensor_that_two_files_have_is_named(copies):
    first, second = sorted((copies / "shards").glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    models.edit_tensors(second, {name: tensor})
    refused(copies, f"{name}: expected one tensor of that name, got one in {first.name} and one in {second.name}")


def test_key_that_occurs_twice_is_named_in_the_error(copies):
    path = copies / "shards" / INDEX
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{UP}": "a.safetensors",'))
    refused(copies, f"the key '{UP}' occurs twice")


def test_time_to_find_a_key_that_occurs_twice_is_that_of_reading():
    """A comparison of each key with each other takes minutes."""
    keys = ",".join(f'"{number}":0' for number in range(200_000))
    parse_object(f"{{{keys}}}", "unique")
    start = time.process_time()
    with pytest.raises(ValueError, match="the key '7' occurs twice"):
        parse_object(f'{{{keys},"7":0}}', "twice")
    assert time.process_time() - start < 10


CLASSES = ["Trainer", "pipeline", "AutoConfig", "LlamaConfig", "__doc__", "None", 5, None]


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        *(("one", {"architectures": [name]}, "architectures: expected a model class of transf") for name in CLASSES),
        ("one", {"architectures": "LlamaForCausalLM"}, ""),
        ("one", {"hidden_size": 64}, ""),
        ("one", {"hidden_size": "96"}, ""),
        ("one", {"num_hidden_layers": 10**9}, ""),
        ("one", {"num_attention_heads": 0}, ""),
        ("one", {"vocab_size": 2_000_000}, ""),
        ("nf4", {"intermediate_size": 36}, "as config.json says, got ["),
        ("one", {"head_dim": 4096}, ""),
        ("one", {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, ""),
        ("one", {"model_type": "no-such-model"}, ""),
        ("one", {"dtype": "no-such-dtype"}, ""),
    ],
    ids=str,
)
def test_contradiction_of_config_and_files_is_one_sentence(copies, model, change, message):
    models.edit_json(copies / model / "config.json", **change)
    refused(copies, message, model)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape").decode("latin1")]
)
def test_bad_json_of_the_config_is_named_in_the_error(copies, text):
    (copies / "one/config.json").write_text(text)
    refused(copies, "config.json: expected a JSON object", "one")


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("model", ["one", "shards"])
def test_file_that_was_cut_short_is_named(copies, fraction, model):
    path = sorted((copies / model).glob("*.safetensors"))[-1]
    os.truncate(path, int(path.stat().st_size * fraction))
    refused(copies, f"{path.name}: expected a whole safetensors file, got another, or a part of one", model)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
@pytest.mark.parametrize("model", ["one", "shards"])
def test_file_that_may_not_be_read_is_named_with_the_reason(made, model):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        copy = Path(shutil.copytree(made / model, Path(folder) / "copy"))
        Path(folder).chmod(0o755)
        secret = min(copy.glob("*.safetensors"))
        secret.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=f"Permission denied: '{re.escape(str(secret))}'"):
                Checkpoint(copy)
        finally:
            os.seteuid(0)


def test_disk_that_is_full_is_one_sentence(copies):
    """A limit on the size of files stands for it: writing fails, as it does on a full disk, with the system's error."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "qlora_native", "quantize", "--model", copies / "one", "--out", copies / "out"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1 and not done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr and last.startswith("quantize: ") and "cannot be written" in last, done.stderr
    assert not [path for path in copies.iterdir() if "out" in path.name]


def _tensor(key, change):
    return lambda state: state.update({key: change(state[key])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_tensor("weight", lambda w: torch.randn(w.shape)), "weight: expected torch.uint8, as the layer has it, got"),
        (_tensor("weight", lambda w: w[:4]), "size mismatch for weight"),
        (_tensor("weight", lambda w: w.to(torch.int8)), "weight: expected torch.uint8"),
        (_tensor("absmax", lambda w: w.float()), "absmax: expected torch.uint8, as the layer has it, got torch.float"),
        (_tensor("nested_absmax", lambda w: w.half()), "nested_absmax: expected torch.float32"),
        (_tensor("nested_absmax", lambda w: w * float("nan")), "nested_absmax: expected finite values"),
        (_tensor("nested_code", lambda w: w / 0), "nested_code: expected finite values"),
        (_tensor("offset", lambda w: w + float("inf")), "offset: expected finite values"),
        (_tensor("codebook", lambda w: w.double()), "codebook: expected torch.float32"),
        (_tensor("codebook", lambda w: w.tolist()), "codebook: expected a tensor, got list"),
        (_tensor("bias", lambda w: w.long()), "bias: expected torch.float32"),
    ],
)
def test_damage_of_a_state_dict_is_named_in_the_error_and_changes_nothing(damage, message):
    layer = qn.nn.Linear4bit.from_linear(torch.nn.Linear(64, 8))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    damage(state)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=strict)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


def test_bias_of_another_floating_dtype_is_cast():
    layer = qn.nn.Linear4bit.from_linear(torch.nn.Linear(64, 8))
    state = {**layer.state_dict(), "bias": torch.ones(8, dtype=torch.bfloat16)}
    layer.load_state_dict(state)
    assert layer.bias.dtype == torch.float32 and torch.equal(layer.bias, torch.ones(8))
