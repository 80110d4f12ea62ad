"""A layer includes only what stands below it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("*.h", "*.hpp", "*.cpp", "*.cu", "*.cuh", "*.c")
TORCH = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11|Python\.h)')
CUDA = re.compile(r'#\s*include\s*[<"]cuda')
FORBIDDEN = {
    # folder: what its files may not include
    "cpp": [TORCH, CUDA, re.compile(r'#\s*include\s*[<"](\.\./)*(python|bindings)/')],
    "cpp/include": [re.compile(r'#\s*include\s*"(?!qlora_native/)')],
    "cuda": [TORCH],
    "tests": [TORCH],
    "examples/cpp_trainer": [TORCH],  # examples/libtorch is for it
    "bench": [TORCH],
}


def sources(folder):
    return [path for pattern in SOURCES for path in (ROOT / folder).rglob(pattern)]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_file_includes_what_stands_above_it(folder):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources(folder)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(pattern.match(line.strip()) for pattern in FORBIDDEN[folder])
    ]
    assert not found, "\n".join(found)


def test_pattern_matches_nothing():
    lines = [line for path in sources("python/bindings") for line in path.read_text(encoding="utf-8").splitlines()]
    assert any(TORCH.match(line.strip()) for line in lines)
    assert sources("cpp/include") and sources("cpp/src"), "the folders have moved"


def test_file_for_one_instruction_set_leaks_a_template():
    """Intrinsics stand in the folders that are compiled for them."""
    pattern = re.compile(r"#\s*include\s*<(immintrin|x86intrin|arm_neon)\.h>")
    for path in sources("cpp"):
        if pattern.search(path.read_text(encoding="utf-8")):
            assert path.parent.name in ("avx2", "avx512", "neon", "generic"), path.relative_to(ROOT)
