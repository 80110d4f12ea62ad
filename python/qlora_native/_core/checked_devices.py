"""What `python -m qlora_native check` found on a GPU: kept in the user's cache folder, heeded at the GPU's first use.

A kernel of products that was found wrong is switched off for the device, and others compute what it would have.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .. import _C

logger = logging.getLogger("qlora_native")
COMMAND = "python -m qlora_native check"
# The kernels that products can do without (disable_cuda_kernels in runtime.h). The general one computes every product.
OPTIONAL_KERNELS = ("gemv", "gemm", "wgmma", "panels")
EMULATED = os.environ.get("QLN_BACKEND") == "cuda_emulated"  # tensors of the CPU are then those of a GPU

_used: set[int] = set()  # indices of the GPUs that have had their first use in this process
_lock = threading.Lock()


@dataclass(frozen=True)
class Device:
    """What a result of a check is for: another driver or version of the package is another device."""

    name: str
    driver: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}, driver {self.driver}"


def device_of(index: int) -> Device:
    """The GPU that torch calls cuda:`index`, or the emulated one."""
    if EMULATED:
        return Device("the emulated GPU", "none", _C.version())
    return Device(torch.cuda.get_device_name(index), driver_version(), _C.version())


def driver_version() -> str:
    """The version of the NVIDIA driver, such as "580.65.06"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:  # under Windows' Subsystem for Linux
        program = shutil.which("nvidia-smi")
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=False).stdout if program else ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def results_file() -> Path:
    """The file of results: `qlora_native/checks.json` below XDG_CACHE_HOME, or below ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "qlora_native" / "checks.json"


def read_results() -> dict[Device, list[str]]:
    """{device: what was found wrong there}. A file that is damaged, or not of this form, is ignored with a warning."""
    path = results_file()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        results = {}
        for entry in entries:
            device = Device(**{field.name: entry[field.name] for field in fields(Device)})
            wrong = entry["wrong"]
            if not all(isinstance(text, str) for text in (*asdict(device).values(), *wrong)) or isinstance(wrong, str):
                raise TypeError
            results[device] = list(wrong)
        return results
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s is damaged, or no file of this package, and is ignored. Write it anew: %s", path, COMMAND)
        return {}


def write_result(device: Device, wrong: list[str]) -> None:
    """Store what a check found wrong on a device, in place of what an earlier one found there.

    Raises:
        OSError: the file cannot be written.
    """
    path = results_file()
    results = read_results() | {device: wrong}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    entries = [{**asdict(each), "wrong": found} for each, found in results.items()]
    partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def note_use(tensor: torch.Tensor) -> None:
    """At the first use of the tensor's GPU in this process: switch off what was found wrong there, and log it.

    With QLN_CHECKS=0, as in the processes of the check itself and in tests, it does nothing.
    """
    if not (tensor.is_cuda or EMULATED):
        return
    index = max(tensor.get_device(), 0)
    if index in _used or not (EMULATED or torch.cuda.is_available()):  # a fake tensor may be on a GPU that is not there
        return
    with _lock:  # another thread waits until what was found wrong is switched off
        if index not in _used:
            _heed_results(index)
            _used.add(index)


def _heed_results(index: int) -> None:
    """Do what `note_use` promises for the GPU cuda:`index`."""
    if os.environ.get("QLN_CHECKS") == "0":
        return
    device = device_of(index)
    wrong = read_results().get(device)
    if wrong is None:
        logger.warning("%s: nobody has checked the kernels on this GPU. Check them: %s", device, COMMAND)
        return
    off = [name for name in OPTIONAL_KERNELS if name in wrong]
    _C.disable_cuda_kernels(index, off)
    if off:
        logger.warning("%s: switched off, as the check found wrong results: %s", device, ", ".join(off))
    if others := [name for name in wrong if name not in off]:
        logger.warning("%s: nothing replaces what the check found wrong: %s", device, ", ".join(others))
