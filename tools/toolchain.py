"""What wheels.py builds with: a compiler over Debian 12's libraries, and for 64-bit Arm its compiler and its Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build/wheels"
RELEASE = "bookworm"  # glibc 2.36, and GCC 12's libstdc++
CROSS = "aarch64-linux-gnu"


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


def tree(name: str, packages: tuple[str, ...], architecture: str) -> Path:
    """A folder with the files of packages and of what they need. Nothing in it has run, so any architecture will do."""
    folder = WORK / name
    if not folder.exists():
        if not shutil.which("mmdebstrap"):
            raise SystemExit("make wheels: expected mmdebstrap, which is a Debian package: apt-get install mmdebstrap")
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        options = (f"--architectures={architecture}", f"--include={','.join(packages)}")
        run("mmdebstrap", "--variant=extract", *options, RELEASE, unfinished)
        unfinished.rename(folder)
    return folder


def program(name: str, text: str) -> Path:
    """A shell script below WORK. It is written only if it changes, for ccache knows a compiler by its time."""
    path = WORK / "bin" / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        path.chmod(0o755)
    return path


def compiler() -> Path:
    """A g++ that uses the headers and libraries of RELEASE instead of this system's."""
    root = tree(RELEASE, ("libc6-dev", "libstdc++-12-dev"), "amd64")
    # --sysroot moves the C library; where C++'s is, GCC has built in.
    headers = ("c++/12", "x86_64-linux-gnu/c++/12", "c++/12/backward")
    return program(
        "g++",
        "#!/bin/sh\n"
        f"exec {shutil.which(os.environ.get('CXX', 'g++'))} --sysroot={root} -nostdinc++ "
        f"{' '.join(f'-isystem {root}/usr/include/{folder}' for folder in headers)} "
        f'-L{root}/usr/lib/gcc/x86_64-linux-gnu/12 "$@"\n',
    )


def version_and_tag(*python: str) -> tuple[str, str]:
    """The version and the tag of a Python: 3.11.2 and cp311."""
    query = "import sys; v = sys.version_info; print('%d.%d.%d cp%d%d' % (*v[:3], *v[:2]))"
    version, tag = run(*python, "-c", query).split()
    return version, tag


def python_headers(*python: str, root: Path = Path("/")) -> Path:
    """A folder with the part of the headers of a Debian Python that a compiler does not find in its own tree."""
    query = "import sys, sysconfig as s; print(s.get_config_var('MULTIARCH'), 'python%d.%d' % sys.version_info[:2])"
    part = Path(*run(*python, "-c", query).split())
    link = WORK / "include" / part
    link.parent.mkdir(parents=True, exist_ok=True)
    if (root / "usr/include" / part).exists() and not link.exists():
        link.symlink_to(root / "usr/include" / part)
    return WORK / "include"


# ---- 64-bit Arm ------------------------------------------------------------------------------------------------------


def cross_compiler() -> Path:
    """RELEASE's own g++ for 64-bit Arm: a newer one does not compile its libstdc++."""
    root = tree(f"{RELEASE}-cross", (f"g++-12-{CROSS}",), "amd64")
    libraries = f"LD_LIBRARY_PATH={root}/usr/lib/x86_64-linux-gnu"
    program(f"{CROSS}-strip", f'#!/bin/sh\n{libraries} exec {root}/usr/bin/{CROSS}-strip "$@"\n')  # found by CMake
    return program(f"{CROSS}-g++", f'#!/bin/sh\n{libraries} exec {root}/usr/bin/{CROSS}-g++-12 --sysroot={root} "$@"\n')


def arm_tree() -> Path:
    """RELEASE's Python for 64-bit Arm, its headers, and the libraries that it and a wheel need."""
    return tree(f"{RELEASE}-arm64", ("base-files", "libpython3-dev", "libstdc++6", "python3"), "arm64")


def arm_python() -> tuple[str, ...]:
    """That Python under QEMU."""
    if not shutil.which("qemu-aarch64"):
        raise SystemExit("make wheels: expected qemu-aarch64, which is in a Debian package: apt-get install qemu-user")
    return "qemu-aarch64", "-L", str(arm_tree()), f"{arm_tree()}/usr/bin/python3"


def arm_site(tag: str, *requirements: object) -> Path:
    """The folder of the packages for that Python, to which this adds some, or does what else pip's words say."""
    folder = WORK / f"site-aarch64-{tag}"
    options = (f"--target={folder}", "--upgrade", "--no-compile", "--only-binary=:all:")
    target = (f"--python-version={tag[2:]}", *(f"--platform=manylinux_2_{minor}_aarch64" for minor in (34, 28, 17)))
    run(sys.executable, "-m", "pip", "install", "-q", *options, *target, *requirements)
    return folder


def cross_build(tag: str, torch: list[str]) -> tuple[dict[str, object], dict[str, object]]:
    """CMake's options, and the variables, with which a Python of that tag here builds for 64-bit Arm."""
    python = arm_python()
    version, arm_tag = version_and_tag(*python)
    if arm_tag != tag:
        raise SystemExit(f"make wheels: {RELEASE} has Python {version} for aarch64: expected {arm_tag}, got {tag}")
    query = "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'))"
    include, suffix = run(*python, "-c", query).split()
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "PYBIND11_USE_CROSSCOMPILING": "ON",  # or the module is named after the Python here
        "Python_INCLUDE_DIR": include,
        "QLN_TORCH": arm_site(tag, "--no-deps", *torch) / "torch",
    }
    variables = {
        "CPLUS_INCLUDE_PATH": python_headers(*python, root=arm_tree()),
        "CXX": cross_compiler(),
        "SETUPTOOLS_EXT_SUFFIX": suffix,
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }
    return options, variables
