"""Guards examples/cpp_trainer, built from the installed package: it learns, with torch's gradients and adapters.

And bad files: each ends in one sentence that names it, and nothing is written.
"""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from pydoc_data import topics  # 750 kB of English on every Python

import numpy
import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_package import run  # noqa: E402

from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
SEQUENCE, BATCH, SEED = 64, 2, 7
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    numpy.frombuffer(Path(topics.__file__).read_bytes(), dtype=numpy.uint8).astype(numpy.int32).tofile(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a Llama of 0.3 M parameters that has seen some Python."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    options = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **options))
    text = torch.tensor(list(Path(subprocess.__file__).read_bytes()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in range(0, 60 * 512, 512):
        window = text[start : start + 512].view(8, 64)
        model(input_ids=window, labels=window).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("model")
    model.bfloat16().save_pretrained(folder)
    return folder


def train(trainer, model, tokens, out, *options, check=True, **environment):
    """What the trainer says. A small model: two threads would wait for each other longer than they work."""
    command = [trainer, model, tokens, out, "--sequence", SEQUENCE, "--batch", BATCH, "--seed", SEED, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if check:
        return run(*command, env=environment)
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)


def in_torch(model, adapter):
    """The same model in torch, with an adapter of the trainer's."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)


def losses(output):
    return [float(line.rpartition(" ")[2]) for line in output.splitlines() if line.startswith("held-out loss")]


def cross_entropy(model, windows):
    logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def test_trainer_learns_and_saves_an_adapter_that_peft_loads(trainer, model, tokens, tmp_path):
    options = ("--steps", 60, "--dropout", 0.05, "--lr", 3e-3)
    said = train(trainer, model, tokens, tmp_path / "out", *options)
    before, after = losses(said)
    assert after < before - 0.1, said
    assert "step 1 of 60: loss" in said and "step 60 of 60: loss" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    text = torch.from_numpy(numpy.fromfile(tokens, dtype=numpy.int32)).long()
    held_out = text[len(text) * 9 // 10 :][: 8 * BATCH * (SEQUENCE + 1)].view(-1, SEQUENCE + 1)
    adapted = in_torch(model, tmp_path / "out").eval()
    with torch.no_grad():
        # Up to 160 terms (the inner width) are added in fp32 in two orders, in 3 blocks of 7 products.
        close = {"rel": 3 * 7 * 160**0.5 * 2**-24}
        assert cross_entropy(adapted, held_out).item() == pytest.approx(after, **close)
        with adapted.disable_adapter():
            assert cross_entropy(adapted, held_out).item() == pytest.approx(before, **close)
    # A second run gives the same bits, also with a slash behind its folder.
    train(trainer, model, tokens, f"{tmp_path}/again/", *options)
    first, second = ((tmp_path / name / FILES[1]).read_bytes() for name in ("out", "again"))
    assert first == second


def windows(tokens):
    """The trainer's first two batches: std::mt19937 is NumPy's MT19937, of which the adapters take the first number."""
    text = numpy.fromfile(tokens, dtype=numpy.int32)
    random = numpy.random.MT19937()
    random._legacy_seeding(SEED)
    random.random_raw()
    for _ in range(2):
        starts = random.random_raw(BATCH) % (len(text) * 9 // 10 - SEQUENCE)
        yield torch.from_numpy(numpy.stack([text[start : start + SEQUENCE + 1] for start in starts])).long()


def gradients(model, batch):
    model.zero_grad()
    cross_entropy(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_of_an_adapter_is_torchs(trainer, model, tokens, tmp_path):
    """AdamW's first step with a gradient moves by its sign: B in step one, while B is 0, and A in step two."""
    states = []
    for steps in (1, 2):
        train(trainer, model, tokens, tmp_path / f"after-{steps}", "--steps", steps)
        adapted = in_torch(model, tmp_path / f"after-{steps}")
        states.append({name: p.detach().clone() for name, p in adapted.named_parameters() if "lora" in name})
    first, second = windows(tokens)
    adapted = in_torch(model, tmp_path / "after-1")
    at_step_two = gradients(adapted, second)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    at_step_one = gradients(adapted, first)
    for name in states[0]:
        is_b = "lora_B" in name
        gradient = (at_step_one if is_b else at_step_two)[name]
        moved = states[0][name] if is_b else states[1][name] - states[0][name]
        clear = gradient.abs() > 1e-3 * gradient.abs().max()  # beyond the rounding of two orders
        assert clear.float().mean() > 0.5, name
        wrong = moved.sign()[clear] != -gradient.sign()[clear]
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {int(clear.sum())}"


def test_kernels_of_cuda_train_the_same_adapter(trainer, model, tokens, tmp_path):
    options = ("--steps", 6, "--lr", 3e-3)
    cpu = losses(train(trainer, model, tokens, tmp_path / "cpu", *options))
    emulated = losses(train(trainer, model, tokens, tmp_path / "cuda", *options, QLN_BACKEND="cuda_emulated"))
    assert emulated == pytest.approx(cpu, rel=1e-5)
    assert cpu[1] < cpu[0] - 0.01, "a training that does nothing"


def check_refused(trainer, model, tokens, out, *parts, options=(), status=1):
    done = train(trainer, model, tokens, out, "--steps", 1, *options, check=False)
    assert done.returncode == status and done.stdout == "", done
    assert done.stderr.startswith("trainer: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not out.exists()


def config(**changes):
    return lambda folder: models.edit_json(folder / "config.json", **changes)


def text(text):
    return lambda folder: (folder / "config.json").write_text(text)


def data(change):
    """The bytes of the weights' file are changed."""

    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(**fields):
    """The weights' header says something else of NORM."""

    def change(data):
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:end])
        header[NORM].update(fields)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[end:]

    return data(change)


def length(number):
    return data(lambda data: struct.pack("<Q", number) + data[8:])


def tensors(changes):
    return lambda folder: models.edit_tensors(folder / "model.safetensors", changes)


def pipe(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


NORM = "model.norm.weight"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"
DAMAGES = [
    (config(hidden_size=64), "model.embed_tokens.weight: expected [256,64] as config.json says, got [256,96]"),
    (config(head_dim=2**40), "head_dim: expected an integer from 1 to 4194304, got 1099511627776"),
    (config(head_dim=15), "head_dim: expected an even size of a head, got 15"),
    (config(num_hidden_layers=4), "model.layers.3.input_layernorm.weight: expected a tensor of this name, got none"),
    (config(num_hidden_layers=2), 'expected tensors of this model, got "model.layers.2.'),
    (config(num_attention_heads=0), "num_attention_heads: expected an integer from 1 to 4096, got 0"),
    (config(num_key_value_heads=3), "num_key_value_heads: expected a divisor of num_attention_heads, got 3"),
    (config(hidden_size=96.0), "hidden_size: expected an integer from 1 to 16777216, got 96.0"),
    (config(hidden_size=2**64 - 1), "hidden_size: expected an integer from 1 to 16777216, got 18446744073709551615"),
    (config(rms_norm_eps=-1e-5), "rms_norm_eps: expected a number from 0.0 to 1.0, got -1e-05"),
    (config(rope_parameters={"rope_theta": 0}), '"rope_parameters": rope_theta: expected a number from 1.0'),
    (config(rope_parameters={"rope_type": "yarn"}), 'rope_type: expected default, got "yarn"'),
    (config(rope_scaling={}), "rope_scaling: expected rotary embeddings without scaling"),
    (config(model_type="gpt2"), 'model_type: expected llama, got "gpt2"'),
    (config(model_type="\u001b\U0001f600" * 400), r'expected llama, got "\u001b\ud83d\ude00\u001b'),
    (config(attention_bias=True), "attention_bias: expected false, got true"),
    (config(quantization_config={"quant_method": "fp8"}), "quantization_config: expected a model in 16 or 32 bits"),
    (text("[]"), "config.json: expected a JSON object, got []"),
    (text('{"a": {"b": 1}, "b": 2, "a": 3}'), 'config.json: expected each key once, got a second "a"'),
    (text('{"a": 1e999}'), "config.json: [json.exception.out_of_range"),
    (text('{"a": "\\ud83d"}'), "config.json: [json.exception.parse_error"),
    (text("[" * 100_000), "config.json: expected JSON of at most 16 levels"),
    (pipe, "config.json: expected a file"),
    (header(shape=[2**32, 2**32], data_offsets=[0, 0]), "shape: expected that of the data_offsets, got [4294967"),
    (header(shape=[2**53, 2**53, 0], data_offsets=[0, 0]), "shape: expected that of the data_offsets"),
    (header(shape=[-96]), "shape: expected integers from 0 to 2^53, got [-96]"),
    (header(shape=[2**63]), "shape: expected integers from 0 to 2^53, got [9223372036854775808]"),
    (header(shape=96), "shape: expected integers from 0 to 2^53, got 96"),
    (header(dtype="F32"), "shape: expected that of the data_offsets, got [96]"),
    (header(dtype="F8_E4M3", shape=[192]), 'dtype: expected F32, BF16 or F16, got "F8_E4M3"'),
    (header(dtype="F" + "9" * 1000), 'dtype: expected F32, BF16 or F16, got "F999'),
    (header(data_offsets=[2**52, 2**52 + 192]), "data_offsets: expected a range of the file's"),
    (header(data_offsets=[0, 10**30]), "data_offsets: expected integers from 0"),
    (header(data_offsets=[0, 192, 384]), "data_offsets: expected a range of the file's"),
    (header(data_offsets=None), f'"{NORM}": data_offsets: expected integers from 0 to 2^53, got null'),
    *((data(lambda data, end=end: data[:end]), "model.safetensors: ") for end in (0, 7, 8, 100, -1)),
    *((length(number), str(number)) for number in (2**64 - 1, 2**63, 100_000_001)),
    (tensors({SCALE: torch.ones(160)}), f'got "{SCALE}"'),
    (tensors({"lm_head.weight": torch.zeros(256, 96)}), "lm_head.weight: expected the embeddings, to which config."),
    (tensors({NORM: torch.full((96,), torch.inf)}), f"{NORM}: expected finite values, got inf at 0"),
    (tensors({NORM: torch.full((96,), torch.inf).half()}), f"{NORM}: expected finite values, got nan at 0"),
    (tensors({NORM: torch.ones(1, 96)}), f"{NORM}: expected [96] as config.json says, got [1,96]"),
    (
        lambda folder: save_file({NORM: torch.ones(96)}, folder / "other.safetensors"),
        "is in another file of the folder",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[f"{i}" for i in range(len(DAMAGES))])
def test_damage_of_a_model_is_named_in_the_error(trainer, model, tokens, tmp_path, damage, message):
    folder = shutil.copytree(model, tmp_path / "model")
    damage(folder)
    check_refused(trainer, folder, tokens, tmp_path / "out", message)


def test_tensors_of_all_dtypes_and_those_that_are_computed_are_read(trainer, model, tokens, tmp_path):
    expected = train(trainer, model, tokens, tmp_path / "out", "--steps", 1)
    folder, state = shutil.copytree(model, tmp_path / "model"), load_file(model / "model.safetensors")
    changes = {name: tensor.float() for name, tensor in state.items() if "norm" in name}
    changes["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    changes["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    changes[NORM] = state[NORM].half()
    assert torch.equal(changes[NORM].float(), state[NORM].float())
    tensors(changes)(folder)
    assert losses(train(trainer, folder, tokens, tmp_path / "again", "--steps", 1)) == losses(expected)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "tokens.bin: expected a tenth of 65 tokens or more"),
        (bytes(1001), "tokens.bin: expected int32 token ids, got 1001 bytes"),
        (bytes(4000) + struct.pack("<i", -1), "got -1 at 1000"),
        (bytes(4000) + struct.pack("<i", 256), "expected tokens below the model's vocabulary of 256, got 256 at 1000"),
    ],
)
def test_bad_tokens_are_located_in_the_error(trainer, model, tmp_path, contents, message):
    (tmp_path / "tokens.bin").write_bytes(contents)
    check_refused(trainer, model, tmp_path / "tokens.bin", tmp_path / "out", message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "x"), "--rank: expected a whole number from 1.0 to 65536.0, got x"),
        (("--rank", "1.5"), "--rank: expected a whole number"),
        (("--lr", "nan"), "--lr: expected a number from 0.0"),
        (("--dropout", "1.5"), "--dropout: expected a number from 0.0 to 0.999, got 1.5"),
        (("--steps",), "--steps: expected a whole number"),
        (("--rnak", "8"), "unknown option --rnak"),
    ],
)
def test_bad_option_is_named_in_the_error(trainer, model, tokens, tmp_path, options, message):
    check_refused(trainer, model, tokens, tmp_path / "out", message, options=options)


def test_folder_that_exists_is_kept(trainer, model, tokens, tmp_path):
    (tmp_path / "kept").write_text("kept")
    done = train(trainer, model, tokens, tmp_path, check=False)
    assert (done.returncode, done.stderr) == (1, f"trainer: {tmp_path}: expected a new folder, it exists\n")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
