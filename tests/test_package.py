"""Guards the C++ package, used from another project (installed, moved, and from the wheel), and the wheel."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def cmake(*arguments):
    """cmake of this environment, or of the system, with ninja beside it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("cmake", path=path)
    if program is None:
        pytest.skip("cmake is not installed")
    return run(program, *arguments, env={**os.environ, "PATH": path})


def build_outside(folder, package):
    """Build tests/cpp/outside against a package's folder of CMake files, run it, and return what it says."""
    cmake("-S", ROOT / "tests/cpp/outside", "-B", folder, "-G", "Ninja", f"-Dqlora_native_DIR={package}")
    cmake("--build", folder)
    return run(folder / "outside", env={**os.environ, "OMP_NUM_THREADS": "3"})


# The shared one leaves OpenMP to the program, as that of `make wheels` does, and the kernels of x86 and Arm out, as on
# other processors: it compiles in seconds.
@pytest.mark.parametrize(("shared", "scalar"), [pytest.param("OFF", False, marks=pytest.mark.thorough), ("ON", True)])
def test_installed_tree_is_relocatable(tmp_path, shared, scalar):
    cmake(
        *("-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'first'}"),
        *("-DQLN_CUDA=OFF", f"-DBUILD_SHARED_LIBS={shared}", f"-DQLN_OPENMP_IN_PROGRAM={shared}"),
        *(("-DQLN_X86=OFF", "-DQLN_ARM=OFF") if scalar else ()),
    )
    cmake("--build", tmp_path / "build")
    cmake("--install", tmp_path / "build")
    shutil.rmtree(tmp_path / "build")
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    (package,) = moved.glob("lib*/cmake/qlora_native")
    libraries = sorted(path.name for path in package.parent.parent.iterdir() if path.is_file())
    assert any(name.endswith(".so") for name in libraries) == (shared == "ON"), libraries
    said = build_outside(tmp_path / "outside", package)
    assert "3 threads" in said
    assert said.startswith("qlora_native 0.") and ("on scalar" in said) == scalar, said


def test_missing_nvcc_is_an_error_where_cuda_is_asked_for_and_none_beside_a_driver(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDACXX", "/missing")
    configure = ("-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja")
    assert "No CUDA backend: expected nvcc 12.4 or later, got none" in cmake(*configure)
    with pytest.raises(AssertionError, match="QLN_CUDA: expected nvcc 12.4 or later, got none"):
        cmake(*configure, "-DQLN_CUDA=ON")


def test_wheel_holds_the_package(tmp_path):
    package = run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()
    said = build_outside(tmp_path / "outside", package)
    version = run(sys.executable, "-c", "import qlora_native; print(qlora_native.__version__)").strip()
    assert said.startswith(f"qlora_native {version} on ")


def test_program_of_the_page_on_cpp_compiles_as_it_stands(tmp_path):
    package = run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()
    page = (ROOT / "docs/cpp.md").read_text()
    for language, file in (("cpp", "main.cpp"), ("cmake", "CMakeLists.txt")):
        (text,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        (tmp_path / file).write_text(text)
    cmake("-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", f"-Dqlora_native_DIR={package}")
    cmake("--build", tmp_path / "build")
    assert float(run(tmp_path / "build/trainer")) == pytest.approx(264.192, rel=1e-5)


def test_request_for_another_version_finds_nothing(tmp_path):
    """find_package(qlora_native 9.9) must not find this one."""
    package = run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(other LANGUAGES CXX)\n"
        "find_package(qlora_native 9.9 CONFIG)\nif(qlora_native_FOUND)\n  message(FATAL_ERROR found)\nendif()\n"
    )
    cmake("-S", tmp_path, "-B", tmp_path / "build", f"-Dqlora_native_DIR={package}")


def test_torch_ops_load_without_python(tmp_path):
    """examples/libtorch: the op library in a program without Python."""
    package = run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()
    torch_cmake = run(sys.executable, "-c", "import torch; print(torch.utils.cmake_prefix_path)").strip()
    cmake(
        *("-S", ROOT / "examples/libtorch", "-B", tmp_path, "-G", "Ninja"),
        *(f"-Dqlora_native_DIR={package}", f"-DCMAKE_PREFIX_PATH={torch_cmake}"),
    )
    cmake("--build", tmp_path)
    assert run(tmp_path / "libtorch_example").count("relative error") == 2


def test_wheel_has_types_licence_and_headers():
    files = [str(file) for file in importlib.metadata.files("qlora_native")]
    for name in ("qlora_native/py.typed", "licenses/LICENSE", "qlora_native/include/qlora_native/qlora_native.h"):
        assert any(file.endswith(name) for file in files), name
    # Neither sources nor tests: `..` is the command of the entry point.
    assert {file.split("/")[0].split("-")[0] for file in files} <= {"qlora_native", ".."}
    assert {Path(file).suffix for file in files if file.startswith("qlora_native/")} <= {
        *(".py", ".pyc", ".typed", ".so", ".a", ".h", ".cpp", ".cmake")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="readelf's tables")
def test_wheel_needs_torchs_library_and_the_systems():
    """And no OpenMP runtime: inside Python the threads are torch's. auditwheel would put its own copy beside them."""
    package = Path(run(sys.executable, "-m", "qlora_native", "--cmake-dir").strip()).parents[2]
    libraries = [*package.glob("*.so"), *package.glob("lib/*.so")]
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", run("readelf", "-d", *libraries)))
    ours, torchs = {"libqlora_native", "libqlora_native_torch"}, {"libtorch_cpu"}
    system = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert torchs <= needed <= ours | torchs | system | loader, needed
