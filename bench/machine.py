"""Describe the machine, and measure its limits with torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

import timing

# Environment variables that change which kernels run. A report names those that are set.
VARIABLES = (
    "QLN_FORCE_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE",
)  # fmt: skip
PACKAGES = ("qlora_native", "torch", "bitsandbytes", "peft", "transformers")
# Twice the largest last-level cache: of a core complex of a CPU, and of a GPU.
PROBE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
SQUARES = {"cpu": 4096, "cuda": 8192}


def device() -> str:
    """The kind of the device that is measured, which is torch's default device."""
    return torch.get_default_device().type


def gpu_missing() -> str:
    """The reason why no GPU can be measured, or an empty text."""
    import qlora_native._C as native

    return native.cuda_unavailable_reason() or ("" if torch.cuda.is_available() else "torch sees no GPU")


def describe() -> dict[str, object]:
    """What a reader needs to judge the figures: processor, threads, instruction sets, versions, variables, date."""
    import qlora_native._C as native

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = {}
    if device() == "cuda":
        card = torch.cuda.get_device_properties()
        gpu = {"gpu": card.name, "processors": card.multi_processor_count, "memory_bytes": card.total_memory,
               "l2_bytes": card.L2_cache_size, "cuda": torch.version.cuda}  # fmt: skip
    return {
        **gpu,
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.current_isa(),
        "isas": native.available_isas(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "l3_bytes": l3_bytes(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": versions,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def file_name(description: dict[str, object]) -> str:
    """The file name of a report: `amd-epyc-2-threads-avx512_bf16.json`, `nvidia-h100-80gb-hbm3.json`."""
    name = str(description.get("gpu", description["cpu"])).lower()
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", name)).strip("-")
    return (
        f"{name}.json" if "gpu" in description else f"{name}-{description['threads']}-threads-{description['isa']}.json"
    )


def cache_bytes() -> int:
    """The bytes of the last cache before memory."""
    return l3_bytes() if device() == "cpu" else torch.cuda.get_device_properties().L2_cache_size


def l3_bytes() -> int:
    """The bytes of the CPU's last-level cache; 32 MB if the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes]
    return max(found, default=32 << 20)


def _cpu_model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


class Others:
    """Measures how much other programs ran on the processors, which makes a run less certain. Zeros without Linux."""

    def __init__(self) -> None:
        """Start to count."""
        self._began = self._now()

    def shares(self) -> dict[str, float]:
        """Shares of all processor time: `others`, of other programs; `stolen`, of other guests of the host."""
        elapsed, busy, stolen, own = (now - began for now, began in zip(self._now(), self._began, strict=True))
        available = elapsed * (os.cpu_count() or 1)
        return {"others": max(0.0, busy - own) / available, "stolen": stolen / available}

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Seconds of the clock, of work on all processors, stolen, and of this process with its children."""
        own = sum(os.times()[:4])
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return time.perf_counter(), own, 0.0, own
        user, nice, system, _idle, _iowait, irq, softirq, steal = (
            int(f) / os.sysconf("SC_CLK_TCK") for f in fields[:8]
        )
        return time.perf_counter(), user + nice + system + irq + softirq, steal, own


class Probes:
    """Bandwidth probes over memory that no cache holds. Each call reads `nbytes`; `copy` also writes as many."""

    def __init__(self) -> None:
        """Allocate the memory and write to it."""
        self.nbytes = PROBE_BYTES[device()]
        # Several buffers take turns, because a part of the last one would still be in the cache.
        self._sources = [torch.ones(self.nbytes // 8, dtype=torch.int64) for _ in range(3)]
        self._target = torch.ones(self.nbytes // 8, dtype=torch.int64)
        self._turn = 0

    def _next(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._sources)
        return self._sources[self._turn]

    def read(self) -> torch.Tensor:
        """Sum 64-bit integers, torch's reduction with the least work for each byte."""
        return self._next().sum()

    def copy(self) -> torch.Tensor:
        """Copy with torch."""
        return self._target.copy_(self._next())

    def flush(self) -> torch.Tensor:
        """Overwrite the cache, then read, so that no later call pays for writing modified lines back to memory."""
        self._target.zero_()
        return self.read()


def limits(probes: Probes, dtypes: list[str], clock: timing.Cpu | timing.Gpu, rounds: int = 3) -> dict[str, float]:
    """Measure `read` and `copy` (read + written) in bytes/s, and the matrix rate of each dtype in flop/s.

    Each is the best of a few. The matrix rate is that of torch.matmul on squares of SQUARES.
    """

    def best(function: Callable[[], object], count: int) -> float:
        return min(clock.seconds(function) for _ in range(count))

    found = {
        "read": probes.nbytes / best(probes.read, 4 * rounds),
        "copy": 2 * probes.nbytes / best(probes.copy, 4 * rounds),
    }
    size = SQUARES[device()]
    for dtype in dtypes:
        left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        found[dtype] = 2 * size**3 / best(lambda left=left, right=right: left @ right, rounds)
    return found
