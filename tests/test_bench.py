"""That the scripts of bench/ whose figures are committed still run, and that what they count is what is there."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """A module of bench/, by its name; what it put into sys.path and sys.modules is taken out again."""
    for path in (*BENCH.glob("*.py"), *(BENCH / "quality").glob("*.py")):  # tests/ has a module `cases`, too
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        folder, _, module = name.rpartition("/")
        monkeypatch.setattr(sys, "path", [str(BENCH / folder), str(BENCH), *sys.path])
        return importlib.import_module(module)

    yield load
    for name in set(sys.modules) - before:
        origin = getattr(sys.modules[name], "__file__", None) or ""
        if origin.startswith(str(BENCH)):
            del sys.modules[name]


def test_large_model_takes_two_steps(script):
    found = script("large").measure(layers=2, width=256, tokens=16, rank=4)
    assert found["losses"][0] > found["losses"][1] > found["losses"][2]
    assert found["base_bytes"] < found["bytes_in_16_bits"]
    assert found["trainable"] == 2 * 4 * (4 * 2 * 256 + 3 * (256 + 688))  # of four square and three other linears


@pytest.mark.parametrize("method", ["16 bits", "LoRA", "QLoRA"])
def test_footprint_is_what_is_allocated(script, method):
    footprint = script("quality/footprint")
    size = (128, 344, 2, 2)
    parts, allocated = footprint.parts_of(size, method), footprint.allocated(size, method)
    kept = sum(parts.values()) - parts["activations"]
    assert allocated["kept"] == pytest.approx(kept, rel=footprint.KEPT_TOLERANCE)
    during = parts["gradients"] + parts["activations"]
    assert allocated["peak"] == pytest.approx(during, rel=footprint.PEAK_TOLERANCE)
