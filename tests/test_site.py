"""Guards the site of `make docs`: it is built without a warning, and its reference describes every argument."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "docs/site/mkdocs.yml"
MODULES = re.findall(r"- api/(.+)\.md", CONFIG.read_text())


def test_site_is_built_without_a_warning(tmp_path):
    """A warning is a broken link, a page without a place in the navigation, or a docstring with an unknown argument."""
    pytest.importorskip("mkdocs")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", CONFIG, "--site-dir", tmp_path)
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for name in ("index.html", "docs/index.html", "docs/numbers.html"):
        assert (tmp_path / name).is_file(), name
    assert 'id="qlora_native.functional.linear_grouped"' in (tmp_path / "api/qlora_native.functional.html").read_text()


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_describe_every_argument(module):
    if module.startswith("qlora_native.integrations."):
        pytest.importorskip("peft")
        pytest.importorskip("bitsandbytes")
    assert [each for call in public_calls(importlib.import_module(module)) for each in undescribed(*call)] == []


def public_calls(module):
    """(name, function, docstring) of the public functions, methods and constructors of a module.

    A method that overrides one of another library is described there.
    """
    for name in getattr(module, "__all__", ()):
        member = getattr(module, name)
        if inspect.isfunction(member):
            yield name, member, inspect.getdoc(member)
        for attribute, value in vars(member).items() if inspect.isclass(member) else ():
            function = getattr(value, "__func__", value)  # of a class method
            foreign = (base for base in member.__mro__[1:] if not base.__module__.startswith("qlora_native"))
            is_public = not attribute.startswith("_") and not any(hasattr(base, attribute) for base in foreign)
            if inspect.isfunction(function) and attribute == "__init__":
                yield name, function, f"{inspect.getdoc(member)}\n\n{inspect.getdoc(function)}"
            elif inspect.isfunction(function) and is_public:
                yield f"{name}.{attribute}", function, inspect.getdoc(function)


def undescribed(name, function, docstring):
    """The arguments of a function that are not in its docstring; a constructor's may also be attributes."""
    sections = re.findall(r"^(?:Args|Attributes):\n(.*?)(?=\n\n|\Z)", docstring or "", re.MULTILINE | re.DOTALL)
    listed = re.findall(r"^ {4}(\w[\w, ]*):", "\n".join(sections), re.MULTILINE)
    described = {each for names in listed for each in names.split(", ")} | {"self", "cls"}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in described and parameter.kind not in variadic:
            yield f"{name}: {parameter.name}"
