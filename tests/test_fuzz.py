"""Guards every entry of the library: tests/fuzz for a few seconds, and all former findings. See `make fuzz`."""

import json
import os
import subprocess
from pathlib import Path

import process
import pytest
from test_package import ROOT, cmake

pytest.importorskip("transformers")
pytest.importorskip("peft")

FUZZ = Path(__file__).parent / "fuzz"
SECONDS = "3"  # for each target
TARGETS = (
    "entries",
    "layer",
    "optimizer",
    "config",
    "folder",
    "export",
    "dtypes",
    "json",
    "files",
    "gguf",
    "functions",
    "ops",
)


def test_any_input_ends_in_a_promised_error_or_none():
    done = process.succeed(FUZZ / "fuzz_python.py", "--seconds", SECONDS, "--seed", "1")
    counts = {line["target"]: line["inputs"] for line in map(json.loads, done.stdout.splitlines())}
    assert counts.keys() == set(TARGETS) and all(counts.values())


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The C++ target with the plain C++ kernels, which compile in seconds; `make fuzz` has all of them."""
    build = tmp_path_factory.mktemp("fuzz")
    options = ("QLN_BUILD_FUZZERS=ON", "QLN_SANITIZE=address,undefined", "QLN_BUILD_PYTHON=OFF", "QLN_OPENMP=OFF")
    without = ("QLN_CUDA=OFF", "QLN_X86=OFF", "QLN_ARM=OFF", "QLN_WERROR=OFF")
    cmake("-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{option}" for option in options + without))
    cmake("--build", build, "--target", "fuzz_api")
    return build / "tests/fuzz/fuzz_api"


@pytest.mark.thorough
def test_any_input_leaves_memory_alone(sanitized, tmp_path):
    command = [sanitized, f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/", "-seed=1", FUZZ / "corpus/api"]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
