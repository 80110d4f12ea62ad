"""Guards the messages about libraries: one that is missing or too old is named, with the line that installs it."""

import re
from pathlib import Path

import process
import pytest

from qlora_native._core import versions

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def last_line(code):
    done = process.run("-c", code)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


PATCHED = """
import importlib.metadata as m
original = m.version
m.version = lambda name: {got!r} if name == {package!r} else original(name)
import qlora_native.{module}
"""


@pytest.mark.parametrize(
    ("module", "package", "got"),
    [
        ("integrations.transformers", "transformers", "4.57.6"),
        ("convert.merge", "transformers", "5.22.2"),
        ("integrations.peft", "peft", "0.20.0"),
        ("integrations.bitsandbytes", "bitsandbytes", "0.49.0"),
        ("convert.gguf", "gguf", "0.16.3"),
    ],
)
def test_old_library_is_one_sentence(module, package, got):
    pytest.importorskip(package)
    shown = last_line(PATCHED.format(module=module, package=package, got=got))
    min_version = versions.MIN_VERSIONS[package]
    assert shown == (
        f"ImportError: qlora_native: this needs {package} {min_version} or later, got {got}: "
        f'pip install "{package}>={min_version}"'
    )


def test_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(versions.MIN_VERSIONS, "no-such-library", "1.0")
    with pytest.raises(ImportError, match='needs no-such-library, which is not installed: pip install "no-such-lib'):
        versions.require("no-such-library")


def test_transformers_without_the_function_that_is_extended_is_one_sentence():
    version = pytest.importorskip("transformers").__version__
    shown = last_line(
        "from transformers import PreTrainedModel; del PreTrainedModel._finalize_model_loading; "
        "import qlora_native.integrations.transformers"
    )
    name = "PreTrainedModel._finalize_model_loading"
    assert shown.startswith(f"ImportError: qlora_native: expected a transformers with {name}, got {version}")


def test_layer_is_made_beside_an_accelerate_without_fsdp2():
    pytest.importorskip("accelerate")
    process.succeed(
        "-c",
        "from accelerate.utils import fsdp_utils; del fsdp_utils.fsdp2_load_full_state_dict; "
        "import qlora_native.nn, sys; qlora_native.nn.Linear4bit(64, 8); "
        "assert 'qlora_native.integrations.accelerate' in sys.modules; "
        "assert not hasattr(fsdp_utils, 'fsdp2_load_full_state_dict')",
    )


@pytest.mark.parametrize("version", ["5.23", "5.23.0.dev0", "5.100.1", "6.0.0rc1"])
def test_new_enough_library_passes(monkeypatch, version):
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: version)
    versions.require("transformers")


def test_old_torch_is_one_sentence():
    shown = last_line("import torch; torch.__version__ = '2.9.1+cpu'; import qlora_native")
    assert shown == 'ImportError: qlora_native needs torch 2.10 or later, got 2.9.1+cpu: pip install "torch>=2.10"'


def test_bounds_are_those_of_the_extras():
    extras = PROJECT["optional-dependencies"]
    named = extras["transformers"] + extras["bitsandbytes"] + extras["export"]
    bounds = dict(re.findall(r"(\w+)>=([0-9.]+)", " ".join(named)))
    assert {name: bounds[name] for name in versions.MIN_VERSIONS} == versions.MIN_VERSIONS


def test_command_says_its_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", process.succeed("-m", "qlora_native", "--version").stdout.strip())
