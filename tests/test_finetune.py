"""Guards examples/finetune.py, generate.py and their data, on a model that takes seconds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import models  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import docstrings  # noqa: E402
import finetune  # noqa: E402
import generate  # noqa: E402
import pairs  # noqa: E402
import processes  # noqa: E402
import qlora_native as qn  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

DATA = [{"prompt": f"What is {i} plus 1?", "response": f"It is {i + 1}.", "group": str(i // 4)} for i in range(40)]
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer under model/, and pairs in data.jsonl."""
    folder = tmp_path_factory.mktemp("finetune")
    tokenizer = models.tokenizer(f"{d['prompt']} {d['response']}" for d in DATA)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    model = models.make("llama", layers=LAYERS, width=64, inner=96)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(json.dumps(pair) for pair in DATA) + "\n")
    return folder


def run(folder, *arguments, launcher=(), model="model", program="finetune.py", fails=False):
    """What the program says on stdout and stderr."""
    command = [sys.executable, *launcher, EXAMPLES / program, "--model", folder / model, *arguments]
    # An empty HF_HOME, so that a user's configuration of accelerate does not decide how the program runs.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (shown.returncode != 0) == fails, shown.stderr
    return shown


def figures(output):
    return json.loads((output / "figures.json").read_text())


@pytest.mark.parametrize(
    "options", [[], ["--format", "int4", "--no-double-quant", "--target-modules", "q_proj", "v_proj", "--dropout", "0"]]
)
def test_run_on_own_data_writes_adapter_and_figures(folder, options):
    output = folder / f"out-{len(options)}"
    shown = run(folder, "--data", folder / "data.jsonl", "--steps", "15", "--output", output, *options)
    lines = shown.stderr.splitlines()
    assert "\r" not in shown.stderr, "a bar in a log file"
    assert [line[:10] for line in lines if line[:1] != " "] == ["quantize: ", "step 15 of", "quantize: "], shown.stderr
    assert re.search(r"^step 15 of 15: loss \d+\.\d+, \d+ tokens/s$", shown.stderr, re.MULTILINE)
    found = figures(output)
    loss = found["held_out_loss"]
    assert loss["reloaded"] == pytest.approx(loss["after"], rel=1e-6)
    assert loss["after"] < loss["before"]
    assert len(found["losses"]) == 15
    assert len(re.findall(r"^What is .*\n  before: .*\n  after:  ", shown.stdout, re.MULTILINE)) == 3
    sixteen, quantized = found["base_weight_bytes"].values()
    assert sixteen == 2 * LAYERS * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert 1 / 4 < quantized / sixteen < 1 / 2  # the tables of so small layers weigh as much as their codes
    assert peft.PeftConfig.from_pretrained(output / "adapter").peft_type == "LORA"
    assert {path.name for path in output.iterdir()} == {"adapter", "figures.json"}


def test_calibrated_base_is_saved_and_a_run_goes_on_over_it(folder):
    output = folder / "out-calibrated"
    options = ("--data", folder / "data.jsonl", "--calibrate", "--steps", "6", "--save-steps", "2", "--output", output)
    shown = run(folder, *options)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^calibrated 14 of 14 weights in \d+ s$", shown.stdout, re.MULTILINE)
    loss = json.loads((output / "figures.json").read_text())["held_out_loss"]
    assert loss["reloaded"] == pytest.approx(loss["after"], rel=1e-6)
    weights = (output / "base/model.safetensors").read_bytes()
    again = run(folder, *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert "calibrated 14 of" not in again.stdout
    other = run(folder, *options, "--resume", "--seed", "7", fails=True)
    assert f"--resume: expected seed 0, with which {output / 'base'} was made, got 7" in other.stderr
    (output / "checkpoint.pt").touch()
    unfinished = run(folder, *options, "--seed", "7", fails=True)
    assert "checkpoint.pt is of an unfinished run: add --resume, or remove it" in unfinished.stderr
    assert (output / "base/model.safetensors").read_bytes() == weights
    later = run(
        folder, "--data", folder / "data.jsonl", "--steps", "1", "--output", folder / "later", model=output / "base"
    )
    assert later.returncode == 0, later.stderr


@pytest.mark.parametrize("written_by", ["quantize_model", "bitsandbytes"])
def test_model_in_4_bits_is_trained_as_it_is(folder, eager, written_by):
    """Ours, and bitsandbytes' where that is installed, which transformers would give to it."""
    name = f"4-bit-{written_by}"
    if written_by == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        stock = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = models.load(folder / "model", quantization_config=stock)
    else:
        model = qn.nn.quantize_model(models.load(folder / "model"), double_quant=False, progress=False)
    model.save_pretrained(folder / name)
    transformers.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / name)
    run(folder, "--data", folder / "data.jsonl", "--output", folder / f"out-{name}", *SHORT, model=name)
    found = figures(folder / f"out-{name}")
    assert found["held_out_loss"]["after"] < found["held_out_loss"]["before"]
    assert "nf4" in found["base_weight_bytes"] and found["arguments"]["no_double_quant"] is True
    shown = run(folder, "--data", folder / "data.jsonl", "--format", "fp4", model=name, fails=True)
    assert "--format: expected nf4, which the files of --model have, got fp4" in shown.stderr


def test_quantized_files_are_trained_in_their_bytes(folder, tmp_path):
    base = shutil.copytree(folder / "model", tmp_path / "fp8")
    changes = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            blocks = [-(-size // 128) for size in weight.shape]
            scale = weight.abs().max().float() / 448
            changes |= {
                name: (weight / scale).to(torch.float8_e4m3fn),
                f"{name}_scale_inv": scale.expand(blocks).clone(),
            }
    models.edit_tensors(base / "model.safetensors", changes)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(config))
    data = ("--data", folder / "data.jsonl", "--output", tmp_path / "out")
    assert " in fp8\n" in run(folder, *data, *SHORT, model=base).stdout
    found = figures(tmp_path / "out")
    assert found["held_out_loss"]["after"] < found["held_out_loss"]["before"]
    assert found["arguments"]["format"] == "file"
    shown = run(folder, *data, "--format", "nf4", model=base, fails=True)
    assert "expected weights in 16 bits, or no --format and no --calibrate, got fp8" in shown.stderr
    shown = run(folder, *data, "--format", "file", fails=True)
    assert "--format file: expected a model whose weights are quantized, got one in 16 bits" in shown.stderr


def test_weight_with_a_scale_beside_it_is_refused(folder, tmp_path):
    """Codes in FP8 whose config does not say so: transformers casts them, and leaves the scales out."""
    base = shutil.copytree(folder / "model", tmp_path / "fp8")
    name = "model.layers.0.mlp.up_proj.weight"
    changes = {name: torch.ones(96, 64).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.tensor([[1e-3]])}
    models.edit_tensors(base / "model.safetensors", changes)
    shown = run(folder, "--data", folder / "data.jsonl", "--output", tmp_path / "out", model=base, fails=True)
    assert f"got quantized ones: {name}_scale_inv is beside a weight" in shown.stderr


def test_one_process_in_the_place_of_several_is_told_so(monkeypatch):
    """accelerate launch --cpu --num_processes 2 starts one process, which has the address of others."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert processes.join("cpu") == "cpu"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SystemExit, match="accelerate launch: expected several processes, .*, got one"):
        processes.join("cpu")


SHORT = ["--steps", "8", "--dropout", "0", "--batch-size", "5"]


@pytest.fixture(scope="module")
def alone(folder):
    run(folder, "--data", folder / "data.jsonl", "--output", folder / "alone", *SHORT)
    return figures(folder / "alone")


ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]


@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_launched_run_learns_what_one_process_does(folder, alone, launcher):
    if "accelerate" in launcher[1]:
        pytest.importorskip("accelerate")
    output = folder / launcher[1]
    run(folder, "--data", folder / "data.jsonl", "--output", output, *SHORT, launcher=launcher)
    found = figures(output)
    assert found["processes"] == 2 and alone["processes"] == 1
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert found["held_out_loss"]["after"] == pytest.approx(alone["held_out_loss"]["after"], rel=1e-3)


def in_this_process(folder, output, *options):
    paths = {"--model": folder / "model", "--data": folder / "data.jsonl", "--output": output}
    finetune.main([*(str(word) for option in paths.items() for word in option), *options])


def tensors_of(output):
    return load_file(output / "adapter/adapter_model.safetensors")


def test_adapter_stays_with_a_loss_that_differs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune.math, "isclose", lambda *args, **options: False)  # as for a loss that is 1e-6 away
    in_this_process(folder, tmp_path / "out", *SHORT)
    shown = capsys.readouterr().err
    assert re.search(r"warning: the loss was \d\.\d{7} before saving, and is \d\.\d{7} now", shown)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "figures.json"}
    assert len(tensors_of(tmp_path / "out")) == 2 * 7 * LAYERS


SAVED = ["--steps", "8", "--batch-size", "5", "--save-steps", "2"]


def interrupted(main, step):
    """Call `main`, and end it in the midst of a step, when gradients are there and the update is not made."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_or_end(*args):
        calls.append(args)
        if len(calls) == step:
            raise KeyboardInterrupt
        return clip(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_end)
        with pytest.raises(KeyboardInterrupt):
            main()


def check_resumed(whole, cut):
    losses = [figures(output)["losses"] for output in (whole, cut)]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    assert all(map(torch.equal, tensors_of(whole).values(), tensors_of(cut).values()))
    assert not (cut / "checkpoint.pt").exists()


@pytest.mark.usefixtures("one_thread")
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(folder, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    in_this_process(folder, whole, *SAVED)
    interrupted(lambda: in_this_process(folder, cut, *SAVED), step=6)
    assert {path.name for path in cut.iterdir()} == {"adapter", "checkpoint.pt"}
    assert not all(map(torch.equal, tensors_of(whole).values(), tensors_of(cut).values()))
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "data.jsonl").read_text().replace("It is", "That is"))
    for options, message in (
        ([], "checkpoint.pt is of an unfinished run: add --resume, or remove it"),
        (["--resume", "--lr", "0.5"], "--resume: expected lr 0.001, with which .*checkpoint.pt was made, got 0.5"),
        (["--resume", "--data", str(other)], "--resume: expected data [0-9]+, with which"),
    ):
        with pytest.raises(SystemExit, match=message):
            in_this_process(folder, cut, *SAVED, *options)
    capsys.readouterr()
    in_this_process(folder, cut, *SAVED, "--resume")
    assert "resumed after step 4" in capsys.readouterr().out
    check_resumed(whole, cut)


# What each of two processes does: the three runs, one after the other, in one group.
THREE_RUNS = """
import sys
from pathlib import Path

sys.path[:0] = {paths!r}
import test_finetune as tests

folder, output = Path({folder!r}), Path({output!r})
tests.processes.join("cpu")
tests.processes.join = lambda device: device
tests.in_this_process(folder, output / "whole", *tests.SAVED)
tests.interrupted(lambda: tests.in_this_process(folder, output / "cut", *tests.SAVED), step=6)
tests.in_this_process(folder, output / "cut", *tests.SAVED, "--resume")
"""


def test_resumed_run_of_two_processes_has_the_bits_of_an_uninterrupted_one(folder, tmp_path):
    program = tmp_path / "three_runs.py"
    paths = [str(EXAMPLES), str(Path(__file__).parent)]
    program.write_text(THREE_RUNS.format(paths=paths, folder=str(folder), output=str(tmp_path)))
    shown = run(folder, launcher=TORCHRUN, program=program)
    assert "resumed after step 4" in shown.stdout
    check_resumed(tmp_path / "whole", tmp_path / "cut")


# Saves again and again in a child process, which is killed, and looks at what is there.
SAVES = """
import argparse, os, random, signal, sys, time
from pathlib import Path

import peft, torch, transformers
from safetensors.torch import load_file

sys.path.insert(0, {examples!r})
import checkpoints

torch.set_num_threads(1)
args = argparse.Namespace(output=Path({output!r}), resume=True, save_steps=1, device="cpu")
model = transformers.AutoModelForCausalLM.from_pretrained({model!r})
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

random.seed(0)
for trial in range({trials}):
    child = os.fork()
    if child == 0:
        keeper = checkpoints.Checkpoints(args, [])
        for step in range(1, 1000):
            for param in trained:
                param.data.fill_(step)
            keeper.save(model, optimizer, schedule, [0.0] * step)
    time.sleep(random.uniform(0.02, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    keeper = checkpoints.Checkpoints(args, [])
    if keeper.saved:
        step = len(keeper.restore(model, optimizer, schedule))
        assert all((param == step).all() for param in trained)
    if keeper.adapter.exists():
        saved = load_file(keeper.adapter / "adapter_model.safetensors")
        assert len(saved) == len(trained) and len(set(t.unique().item() for t in saved.values())) == 1
        peft.PeftConfig.from_pretrained(keeper.adapter)
print("whole" if keeper.saved else "nothing was saved")
"""


def test_killed_run_leaves_whole_files(folder, tmp_path):
    program = SAVES.format(examples=str(EXAMPLES), output=str(tmp_path / "out"), model=str(folder / "model"), trials=15)
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0 and "whole" in shown.stdout, shown.stderr


def in_4_bits(folder):
    return qn.nn.quantize_model(models.load(folder, dtype=torch.float32), skip=("lm_head",), progress=False)


@pytest.fixture(scope="module")
def two_adapters(folder):
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(in_4_bits(folder / "model"), config).save_pretrained(folder / f"adapter-{seed}")
    return [folder / "adapter-1", folder / "adapter-2"]


def test_generate_switches_and_merges(folder, two_adapters, tmp_path):
    prompt, merged = "What is 3 plus 1?", tmp_path / "merged"
    options = ["--adapter", *two_adapters, "--prompt", prompt, "--merge", merged, "--dtype", "float32"]
    shown = run(folder, *options, program="generate.py")
    sections = dict(section.split("\n", 1) for section in shown.stdout.strip().split("\n\n"))
    tokenizer, adapted = transformers.AutoTokenizer.from_pretrained(folder / "model"), [in_4_bits(folder / "model")]
    adapted += [peft.PeftModel.from_pretrained(in_4_bits(folder / "model"), path) for path in two_adapters]
    adapted.append(models.load(merged, quantization_config=BitsAndBytesConfig(load_in_4bit=True)))
    assert sum(isinstance(module, qn.nn.Linear4bit) for module in adapted[-1].modules()) == 7 * LAYERS
    answers = [finetune.answers(model, tokenizer, [prompt])[0] for model in adapted]
    names = [f"adapter-{i}: {path}" for i, path in enumerate(two_adapters, 1)]
    names = ["without an adapter", *names, f"merged: {merged}"]
    assert sections == {n: f"  {prompt}\n    {answer}" for n, answer in zip(names, answers, strict=True)}
    assert len(set(answers[:3])) == 3
    assert transformers.AutoTokenizer.from_pretrained(merged).vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "data.jsonl:2: not JSON"),
        ('["a", "b"]', 'data.jsonl:2: expected an object with a non-empty text "prompt", got ["a", "b"]'),
        ('{"prompt": "a"}', 'data.jsonl:2: expected an object with a non-empty text "response"'),
        ('{"prompt": " ", "response": "b"}', 'data.jsonl:2: expected an object with a non-empty text "prompt"'),
        ('{"prompt": "a", "response": 3}', 'data.jsonl:2: expected an object with a non-empty text "response"'),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(SystemExit) as error:
        pairs.read_pairs(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "nowhere"], "--adapter: no adapter_config.json in nowhere"),
        (["--adapter", "adapter", "--merge", "adapter"], "--merge: expected a new folder, adapter exists"),
        (["--dropout", "1"], "--dropout: expected a number in [0, 1), got 1.0"),
        (["--steps", "0"], "--steps: expected a positive number, got 0"),
        (["--save-steps", "0"], "--save-steps: expected a positive number, got 0"),
        (["--data", "nowhere.jsonl"], "--data: no file nowhere.jsonl"),
        (["--format", "nf5"], "invalid choice: 'nf5'"),
    ],
)
def test_bad_argument_is_found_at_once(options, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        if options[0] == "--adapter":
            generate.arguments(["--model", "model", "--prompt", "a", *options])
        finetune.arguments(options)
    assert message in capsys.readouterr().err


def test_group_is_on_one_side_of_the_split():
    training, held = pairs.split(DATA, seed=0)
    assert len(held) == len(DATA) / 10 and len(training) + len(held) == len(DATA)
    assert {pair["group"] for pair in training}.isdisjoint(pair["group"] for pair in held)
    with pytest.raises(SystemExit, match="cannot hold anything out"):
        pairs.split(DATA[:4], seed=0)


def test_response_and_its_end_alone_are_learned(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        (example,) = pairs.encode(tokenizer, DATA[:1], 256)
        assert tokenizer.decode(example.ids[example.start :]) == "It is 1.</s>"
        assert tokenizer.decode(example.ids).count("What is 0 plus 1?") == 1
        (cut,) = pairs.encode(tokenizer, DATA[:1], example.start + 2)
        assert cut.ids == example.ids[: example.start + 2]


def test_batches_hold_each_pair_once_an_epoch():
    examples = [pairs.Example([0] * (1 + i % 7), 1) for i in range(50)]
    made = list(pairs.batches(examples, 14, 8, seed=0))
    assert len(made) == 14
    seen = [id(example) for batch in made for example in batch]
    assert len(seen) == 100 and all(seen.count(id(example)) == 2 for example in examples)


def test_standard_library_gives_many_distinct_pairs():
    found = docstrings.pairs()
    assert len(found) == 5000 and found == docstrings.pairs()
    training, held = pairs.split(found, seed=0)
    assert 450 <= len(held) <= 500
    words = [{frozenset(pair["response"].lower().split()) for pair in side} for side in (training, held)]
    assert words[0].isdisjoint(words[1])
