"""Guards examples/cpp_trainer, built from the installed package: it learns, with torch's gradients and adapters."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from pydoc_data import topics  # noqa: E402  (750 kB of English on every Python)

from safetensors.torch import load_file  # noqa: E402
from test_package import ROOT, cmake, run  # noqa: E402

from qlora_native import _C  # noqa: E402
from qlora_native.integrations.transformers import BitsAndBytesConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
EXAMPLE = ROOT / "examples/cpp_trainer"
TEXT = Path(topics.__file__)
SEQUENCE, BATCH, SEED = 64, 2, 7
NO_GPU = _C.cuda_unavailable_reason()
FEW = ("--sequence", SEQUENCE, "--batch", BATCH, "--seed", SEED, "--clip", 0, "--lr", 0.1, "--warmup", 100)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that has seen some Python, in 4 bits with double quantization."""
    folder = tmp_path_factory.mktemp("base")
    code = [Path(subprocess.__file__), Path(os.__file__)]
    run(sys.executable, EXAMPLE / "make_model.py", "--steps", 80, "--out", folder / "dense", "--data", *code)
    run(sys.executable, "-m", "qlora_native", "quantize", "--model", folder / "dense", "--out", folder / "nf4")
    return folder / "nf4"


def in_torch(base, adapter=None):
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def losses(output):
    return [float(line.rpartition(" ")[2]) for line in output.splitlines() if line.startswith("held-out loss")]


def test_trainer_learns_and_saves_an_adapter_that_peft_loads(trainer, base, tmp_path):
    out = tmp_path / "adapter"
    data = ("--model", base, "--data", TEXT, "--out", out, "--logits", tmp_path / "logits.safetensors")
    before, after = losses(run(trainer, *data, "--steps", 60, "--dropout", 0.05, "--every", 20))
    assert after < before - 0.1, (before, after)
    saved = load_file(tmp_path / "logits.safetensors")
    ids, actual = saved["input_ids"].long(), saved["logits"]
    model = in_torch(base, out).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    assert (actual - without).norm() > 0.02 * without.norm(), "an adapter that does nothing"
    # A second run gives the same bits.
    run(trainer, *data, "--steps", 60, "--dropout", 0.05, "--every", 60)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], actual)


def windows():
    """The token ids of the trainer's first two batches: std::mt19937 is NumPy's MT19937."""
    text = TEXT.read_bytes()
    random = numpy.random.MT19937()
    random._legacy_seeding(SEED)
    for _ in range(2):
        starts = random.random_raw(BATCH) % (len(text) * 9 // 10 - SEQUENCE)
        yield torch.tensor([list(text[start : start + SEQUENCE + 1]) for start in starts.tolist()])


def gradients(model, batch):
    model.zero_grad()
    logits = model(input_ids=batch[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_of_an_adapter_is_torchs(trainer, base, tmp_path):
    """AdamW's first step with a gradient moves by its sign: B in step one, while B is 0, and A in step two."""
    states = []
    for steps in (1, 2):
        out = tmp_path / f"after-{steps}"
        run(trainer, "--model", base, "--data", TEXT, "--out", out, "--steps", steps, *FEW)
        model = in_torch(base, out)
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name})
    first, second = windows()
    model = in_torch(base, tmp_path / "after-1")
    parameters = dict(model.named_parameters())
    at_step_two = gradients(model, second)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    at_step_one = gradients(model, first)
    for name in states[0]:
        is_b = "lora_B" in name
        gradient = (at_step_one if is_b else at_step_two)[name]
        moved = states[0][name] if is_b else states[1][name] - states[0][name]
        clear = gradient.abs() > 1e-3 * gradient.abs().max()  # beyond the rounding of two ways to sum
        assert clear.float().mean() > 0.5, name
        wrong = moved.sign()[clear] != -gradient.sign()[clear]
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {int(clear.sum())}"


def trained(trainer, base, out, *options, **environment):
    """Losses and logits of a few steps."""
    options = (*("--steps", 6, "--lr", 3e-3, "--warmup", 0, "--sequence", SEQUENCE, "--batch", BATCH), *options)
    files = ("--model", base, "--data", TEXT, "--out", out, "--logits", out / "logits.safetensors")
    # A small model: two threads would wait for each other longer than they work.
    output = run(trainer, *files, *options, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return losses(output), load_file(out / "logits.safetensors")["logits"]


def check_same_training(actual, expected):
    (loss, logits), (expected_loss, expected_logits) = actual, expected
    assert loss == pytest.approx(expected_loss, abs=1e-4), "the last digit that is printed"
    # fp32 sums of up to 352 terms (make_model.py's inner width) in two orders, in 4 layers of 7 products.
    assert (logits - expected_logits).norm() < 4 * 7 * 352**0.5 * 2**-24 * expected_logits.norm()
    assert expected_loss[1] < expected_loss[0] - 0.01, "a training that does nothing"


def test_other_backend_trains_the_same_adapter(trainer, base, tmp_path):
    """The kernels of --device cuda, in the emulator."""
    emulated = trained(trainer, base, tmp_path / "emulated", QLN_BACKEND="cuda_emulated")
    check_same_training(emulated, trained(trainer, base, tmp_path / "cpu"))


@pytest.mark.skipif(NO_GPU != "", reason=NO_GPU)
def test_gpu_trains_the_same_adapter(trainer, base, tmp_path):
    gpu = trained(trainer, base, tmp_path / "cuda", "--device", "cuda")
    check_same_training(gpu, trained(trainer, base, tmp_path / "cpu"))


@pytest.mark.skipif(NO_GPU == "", reason="a GPU can be used here")
def test_missing_gpu_is_named(trainer, base, tmp_path):
    command = [trainer, "--device", "cuda", "--model", base, "--data", TEXT, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"trainer: --device cuda: {NO_GPU}\n")


def test_trainer_is_built_without_the_toolkit(tmp_path):
    """no_cuda.cpp: of a package with CUDA the toolkit is required anyway."""
    package = run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()
    if "CUDA::" in (Path(package) / "qlora_nativeTargets.cmake").read_text():
        pytest.skip("qlora_native was built with CUDA")
    cmake(
        *("-S", EXAMPLE, "-B", tmp_path, "-G", "Ninja", f"-Dqlora_native_DIR={package}"),
        *("-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-Werror"),
    )
    cmake("--build", tmp_path)
    command = [tmp_path / "trainer", "--device", "cuda", "--model", "x", "--data", "x", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and NO_GPU in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--device", "gpu"), "expected cpu or cuda, got gpu"),
        (("--rank", "x"), "--rank: expected a whole number from 1 to 65536, got x"),
        (("--rank", "1.5"), "--rank: expected a whole number"),
        (("--steps", "1e300"), "--steps: expected a whole number"),
        (("--lr", "nan"), "--lr: expected a number from 0"),
        (("--rnak", "8"), "unknown option --rnak"),
        (("--dropout", "1.5"), "--dropout: expected a number from 0 to 0.999, got 1.5"),
        (("--model", "/nowhere"), "/nowhere"),
        (("--data", os.devnull), "is empty, or no file that can be mapped"),
        (("--data", ROOT / ".clang-format"), "too short"),
    ],
)
def test_bad_option_is_named_in_the_error(trainer, base, tmp_path, change, message):
    options = {"--model": base, "--data": TEXT, "--out": tmp_path / "out", "--steps": "1", **dict([change])}
    done = subprocess.run(
        [trainer, *(str(part) for pair in options.items() for part in pair)], capture_output=True, text=True
    )
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "out").exists()
