"""`python -m qlora_native`: what a bug report needs to say about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import _C, __version__


def report() -> dict[str, str]:
    """Names and values, in the order in which they are shown."""
    try:
        used = _C.current_isa()
    except RuntimeError as error:  # QLN_FORCE_ISA names one that cannot run here: say so, this is where one looks
        used = f"none: {error}"
    forced = os.environ.get("QLN_FORCE_ISA")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "qlora_native": __version__,
        "instruction sets found": ", ".join(_C.available_isas()),
        "instruction set used": used + (f" (QLN_FORCE_ISA={forced})" if forced else ""),
        "threads": f"{_C.num_threads()} of {os.cpu_count()} processors",
        "CUDA backend": _C.cuda_unavailable_reason() or "built",
        "CUDA devices": ", ".join(devices) or "none that torch sees",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built'}, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        **{name: _version_of(name) for name in ("bitsandbytes", "peft", "transformers")},
        "Python": sys.version.split()[0],
        "platform": f"{platform.platform()}, {_processor()}",
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def main() -> None:
    """Print the report."""
    values = report()
    width = max(len(name) for name in values) + 2
    for name, value in values.items():
        print(f"{name:{width}}{value}")


if __name__ == "__main__":
    main()
