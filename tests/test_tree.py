"""Guards the tree of CONTRIBUTING.md: which folder may include which, where torch and CUDA appear, and that what is
written once for all instruction sets is free of the intrinsics and the assembly of any of them.
"""

import ast
import functools
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU = "cpp/src/cpu"
CORE = ("cpp/include", "cpp/src", "cpp/src/common")
VECTORS, LOW = f"{CPU}/isa", (*CORE, f"{CPU}/runtime", f"{CPU}/isa", f"{CPU}/isa/scalar")
ROOMS = tuple(
    f"{CPU}/{room}" for room in ("quantize", "product", "attention", "calibrate", "loss", "elementwise", "optimizer")
)
ISAS = tuple(f"{VECTORS}/{folder}" for folder in ("amx", "avx2", "avx512", "neon", "portable"))
# {layer: the layers whose files it may include, beside its own}. A file belongs to the longest name
# that its path begins with.
MAY_INCLUDE = {
    "examples": ("cpp/include",),
    "python/bindings": ("cpp/include", "cpp/src/common"),
    "cpp/program": ("cpp/include", f"{CPU}/runtime"),
    # An operation includes no other one.
    **{f"cuda/{room}": (*CORE, "cuda/device", "cuda/runtime") for room in ("quantize", "loss", "elementwise")},
    **{f"cuda/{room}": (*CORE, "cpp/src/paged", "cuda/device", "cuda/runtime") for room in ("optimizer", "product")},
    "cuda/runtime": (*CORE, "cpp/src/paged", "cuda/device", "cuda/emulator"),
    "cuda/device": ("cpp/include", "cpp/src/common", "cuda/emulator"),
    "cuda/emulator": ("cpp/include", "cpp/src/common", "cpp/src/paged"),
    f"{CPU}/backend": (*LOW, *ISAS, *ROOMS),
    **{f"{CPU}/{room}": (*LOW, f"{CPU}/quantize", f"{CPU}/product") for room in ("attention", "calibrate")},
    f"{CPU}/product": (*LOW, f"{CPU}/quantize"),
    **{f"{CPU}/{room}": LOW for room in ("quantize", "loss", "elementwise", "optimizer")},
    f"{VECTORS}/portable": (*CORE, VECTORS, f"{VECTORS}/amx"),
    **{isa: (*CORE, VECTORS) for isa in ISAS[:-1]},
    f"{VECTORS}/scalar": CORE,
    VECTORS: CORE,
    f"{CPU}/runtime": CORE,
    "cpp/src/paged": CORE,
    "cpp/src": ("cpp/include", "cpp/src/common"),  # never a backend: it calls through backend.h
    "cpp/src/common": ("cpp/include",),
    "cpp/include": (),
}
# Where the compiler looks for a name in quotes, after the folder of the file itself.
INCLUDE_FOLDERS = ("cpp/include", "cpp/src", "cuda", "python/bindings")
SUFFIXES = {".h", ".hpp", ".cpp", ".cu", ".cuh", ".c"}

TORCH = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11|Python\.h)')
CUDA = re.compile(r"#\s*include\s*<(cuda|nv)")
INTRINSICS_HEADER = re.compile(r"#\s*include\s*<(\w*intrin|arm_\w+)\.h>")
INTRINSIC = re.compile(
    r"\basm\b|\b_mm\d*_\w+|\b__m(64|128|256|512)\w*|\b__mmask\d+|\b_tile_\w+\s*\(|\b__tile\w*|\b__builtin_(ia32|neon|aarch64)_"
    r"|\bv[a-z0-9]+_(lane_|laneq_|n_|high_|low_)?(bf16|[usfp](8|16|32|64))(_\w+)?\s*\("
    r"|\b(u?int|float|poly|bfloat)\d+x\d+(x\d)?_t\b"
)


def sources(folder):
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def numbered_lines(path):
    return enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


def layer_of(path):
    """The layer that a file belongs to, or None."""
    name = path.relative_to(ROOT).as_posix()
    return max((layer for layer in MAY_INCLUDE if name.startswith(f"{layer}/")), key=len, default=None)


def included(path):
    """(line, file of this repository) of each `#include "..."` that leads to one."""
    for number, line in numbered_lines(path):
        if match := re.match(r'\s*#\s*include\s*"([^"]+)"', line):
            folders = (path.parent, *(ROOT / folder for folder in INCLUDE_FOLDERS))
            if found := [file for folder in folders if (file := folder / match[1]).is_file()]:
                yield number, found[0].resolve()


@pytest.mark.parametrize("layer", MAY_INCLUDE)
def test_layer_includes_only_what_it_may(layer):
    files = [path for path in sources(layer) if layer_of(path) == layer]
    assert files, f"{layer} has no sources: it has moved"
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {file.relative_to(ROOT)}"
        for path in files
        for number, file in included(path)
        if layer_of(file) not in (layer, *MAY_INCLUDE[layer])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_layer_includes_one_above_it():
    assert set(graphlib.TopologicalSorter(MAY_INCLUDE).static_order()) <= MAY_INCLUDE.keys()  # a circle: CycleError


def test_every_source_file_belongs_to_a_layer():
    files = [path for folder in ("cpp", "cuda", "python", "examples") for path in sources(folder)]
    assert not [path for path in files if layer_of(path) is None]
    assert sum(1 for path in files for _ in included(path)) > 200, "the includes are not found"


def found_in(folders, pattern):
    """The files below `folders` with a line that the pattern matches."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in sources(folder)
        if any(pattern.match(line.strip()) for _, line in numbered_lines(path))
    }


def test_torch_is_included_by_the_bindings_alone():
    found = found_in(("cpp", "cuda", "python", "examples", "tests", "bench", "tools"), TORCH)
    assert found
    assert all(name.startswith(("python/bindings/", "examples/libtorch/")) for name in found), found


def test_cuda_is_included_by_its_backend_alone():
    found = found_in(("cpp", "cuda", "python", "examples"), CUDA)
    assert found
    assert all(name.startswith("cuda/") for name in found), found


def test_intrinsics_stand_in_the_folders_compiled_for_them():
    folders = {Path(name).parent.name for name in found_in(("cpp", "cuda"), INTRINSICS_HEADER)}
    assert folders and folders <= {"avx2", "avx512", "neon", "amx"}


def test_algorithms_of_all_instruction_sets_are_free_of_intrinsics_and_assembly():
    files = [path for path in sources(CPU) if path.name.endswith("-inl.h")]
    assert len(files) > 10
    found = [
        f"{path.name}:{number}: {match[0]}"
        for path in files
        for number, line in numbered_lines(path)
        if (match := INTRINSIC.search(line))
    ]
    assert not found, "\n".join(found)


# {room of the Python package, or module in no room: the rooms and modules that it may import, beside its own}. Imports
# inside functions and those for a type checker alone count as all others do.
PACKAGE = ROOT / "python/qlora_native"
LAYERS = ("_core", "_files", "functional", "_layers")
MAY_IMPORT = {
    "_core": (),
    "_files": ("_core",),
    "functional": ("_core", "_files"),
    "_layers": ("_core", "functional"),
    "_calibrate": ("_core", "_layers"),
    "_optim": ("_core",),
    "nn": ("_layers",),
    "optim": ("_optim",),
    "testing": (),
    "_check": ("_core", "optim", "testing"),
    "integrations.accelerate": LAYERS,
    "integrations.fuse": (*LAYERS, "nn"),
    "integrations.peft": (*LAYERS, "nn"),
    "integrations.transformers": (*LAYERS, "_files", "nn", "integrations.peft"),
    "integrations.bitsandbytes": (*LAYERS, "nn", "integrations.peft", "integrations.transformers"),
    "convert": (*LAYERS, "_calibrate", "integrations.transformers"),
    "integrations": (
        *LAYERS,
        "_calibrate",
        "convert",
        "integrations.peft",
        "integrations.bitsandbytes",
    ),
    "_loader": ("_layers", "integrations.accelerate", "integrations.peft", "integrations.transformers"),
    "__init__": ("_core", "_calibrate", "functional", "nn", "optim", "_loader", "integrations.fuse"),
    "__main__": ("_core", "__init__", "_check", "convert"),
}


@functools.cache
def modules():
    """{module of the package: its file}."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(module, path):
    """(line, name) of everything that a file imports. A name of this package begins with a dot."""
    package = module.split(".") if path.stem == "__init__" and module != "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level]
            base = [*above, *(node.module.split(".") if node.module else ())]
            for alias in node.names:
                names = ".".join([*base, alias.name]), ".".join(base) or "__init__"
                yield node.lineno, "." + next((name for name in names if name == "_C" or name in modules()), names[0])


def room_of(module):
    """The room of a module, or None."""
    return max((room for room in MAY_IMPORT if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def test_python_modules_import_only_rooms_that_they_may():
    wrong, found = [], 0
    for module, path in modules().items():
        for line, name in imports(module, path):
            found += name[0] == "."
            allowed = (room_of(module), *MAY_IMPORT[room_of(module)])
            if name[0] == "." and name != "._C" and room_of(name[1:]) not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert found > 200, "the imports are not found"
    assert not wrong, "\n".join(wrong)


def test_python_modules_import_one_another_without_a_cycle():
    for graph in (
        {module: {name[1:] for _, name in imports(module, path)} - {"_C"} for module, path in modules().items()},
        MAY_IMPORT,
    ):
        graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the modules of a cycle


def test_modules_outside_the_integrations_import_torch_alone():
    """What a function imports is a library that the user of this function has: transformers, tqdm."""
    wrong = []
    for module, path in modules().items():
        if room_of(module).startswith(("integrations", "convert")):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            allowed = {*sys.stdlib_module_names, "torch"}
            wrong += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.partition(".")[0] not in allowed]
    assert not wrong, "\n".join(wrong)
