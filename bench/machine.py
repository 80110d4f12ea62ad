"""Describe the machine, and measure its limits with torch."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

import timing

# Environment variables that change which kernels run. A report names those that are set.
VARIABLES = (
    "QLN_FORCE_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE",
)  # fmt: skip
PACKAGES = ("qlora_native", "torch", "bitsandbytes", "peft", "transformers", "gptqmodel")
# The bytes of one read of a probe.
PROBE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# Blocks that are to be cold when they are used again are together this many times as large as the last-level cache.
CACHE_MULTIPLE = 2
SQUARES = {"cpu": 4096, "cuda": 8192}
SHORT_PRODUCT_S = 0.1  # one of twice the size takes about eight times as long

# (vendor, family, models, steppings, microarchitecture), because several have a name such as "AMD EPYC". AMD's are told
# apart as in Linux' arch/x86/kernel/cpu/amd.c, Intel's as in its intel-family.h and perf's mapfile.csv.
AMD, INTEL, ANY = "AuthenticAMD", "GenuineIntel", range(16)
MICROARCHITECTURES = (
    (AMD, 25, (*range(0x10), *range(0x20, 0x60)), ANY, "Zen 3"),
    (AMD, 25, (*range(0x10, 0x20), *range(0x60, 0xB0)), ANY, "Zen 4"),
    (AMD, 26, (*range(0x50), *range(0x60, 0x80)), ANY, "Zen 5"),
    (INTEL, 6, (85,), range(5), "Skylake-X"),
    (INTEL, 6, (85,), range(5, 10), "Cascade Lake"),
    (INTEL, 6, (85,), range(10, 16), "Cooper Lake"),
    (INTEL, 6, (106, 108), ANY, "Ice Lake"),
    (INTEL, 6, (143,), ANY, "Sapphire Rapids"),
    (INTEL, 6, (207,), ANY, "Emerald Rapids"),
    (INTEL, 6, (173, 174), ANY, "Granite Rapids"),
)
# A virtual machine may be told another processor's model. One of 167, Rocket Lake, which has no AMX, had AMX, AVX10 and
# PREFETCHI, 64 KB of cache for instructions and 480 MB of the third level: all of that has only Granite Rapids.
DISGUISED = (INTEL, 6, 167, "amx_tile", "Granite Rapids")


def device() -> str:
    """The kind of the device that is measured, which is torch's default device."""
    return torch.get_default_device().type


def gpu_missing() -> str:
    """The reason why no GPU can be measured, or an empty text."""
    import qlora_native._C as native

    return native.cuda_unavailable_reason() or ("" if torch.cuda.is_available() else "torch sees no GPU")


def gpu_or_emulator() -> str:
    """The kind of the device that runs the CUDA kernels: "cuda", or "cpu" over the emulator (QLN_BACKEND).

    Raises:
        SystemExit: there is neither.
    """
    if os.environ.get("QLN_BACKEND") == "cuda_emulated":
        return "cpu"
    if reason := gpu_missing():
        raise SystemExit(f"no GPU can be measured: {reason}")
    return "cuda"


def first_day_folder(kind: str) -> Path:
    """Where first_day.py and tune_cuda.py keep what they know of the device of `gpu_or_emulator`."""
    name = folder_name({"gpu": torch.cuda.get_device_name()}) if kind == "cuda" else "emulated"
    return Path(__file__).parent.parent / "build/first_day" / name


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
        **processor(),
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


def processor(cpuinfo: str | None = None) -> dict[str, object]:
    """The CPU's name, and where /proc/cpuinfo tells them its family, model, stepping and microarchitecture.

    Args:
        cpuinfo: the text of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*:[ \t]*(.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    found: dict[str, object] = {"cpu": fields.get("model name") or platform.processor() or platform.machine()}
    numbers = [fields.get(name, "") for name in ("cpu family", "model", "stepping")]
    if all(number.isdecimal() for number in numbers):
        family, model, stepping = map(int, numbers)
        found |= {"family": family, "model": model, "stepping": stepping}
        for vendor, of_family, models, steppings, name in MICROARCHITECTURES:
            if (vendor, of_family) == (fields.get("vendor_id"), family) and model in models and stepping in steppings:
                found["microarchitecture"] = name
        *known, flag, name = DISGUISED
        if known == [fields.get("vendor_id"), family, model] and flag in fields.get("flags", "").split():
            found["microarchitecture"] = name
    return found


def cpu_name(description: dict[str, object]) -> str:
    """The CPU as a report names it: `AMD EPYC (Zen 4)`."""
    name = str(description["cpu"])
    return f"{name} ({description['microarchitecture']})" if "microarchitecture" in description else name


def folder_name(description: dict[str, object]) -> str:
    """The folder of a machine's reports: `amd-epyc-zen-4-2-threads-avx512_bf16`, `nvidia-h100-80gb-hbm3`."""
    on_gpu = "gpu" in description
    parts = [description["gpu"]] if on_gpu else [description["cpu"], description.get("microarchitecture", "")]
    # A CPU's name may end with its clock rate, and has trademarks in parentheses.
    name = re.sub(r"\(.*?\)|@ [\d.]+ghz|\b(cpu|processor)\b", "", " ".join(map(str, parts)).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if on_gpu else f"{name}-{description['threads']}-threads-{description['isa']}"


def cache_bytes() -> int:
    """The bytes of the last cache before memory."""
    return l3_bytes() if device() == "cpu" else torch.cuda.get_device_properties().L2_cache_size


def beyond_caches(nbytes: int) -> int:
    """The number of blocks of `nbytes` bytes that fill the last-level cache CACHE_MULTIPLE times."""
    return -(-CACHE_MULTIPLE * cache_bytes() // nbytes)


def l3_bytes() -> int:
    """The bytes of the CPU's last-level cache; 32 MB if the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes]
    return max(found, default=32 << 20)


class Others:
    """Measures how much other programs ran on the processors, which makes a run less certain."""

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
        cpu = psutil.cpu_times()
        busy = sum(getattr(cpu, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))
        return time.perf_counter(), busy, getattr(cpu, "steal", 0.0), sum(os.times()[:4])


class Probes:
    """Bandwidth probes over memory that no cache holds. Each call reads `nbytes`; `copy` also writes as many."""

    def __init__(self) -> None:
        """Allocate the memory, which all caches together do not hold, and write to it."""
        self.nbytes = PROBE_BYTES[device()]
        # At least three alternate, because a part of the last one would still be in the cache.
        sources = [torch.ones(self.nbytes // 8, dtype=torch.int64) for _ in range(max(3, beyond_caches(self.nbytes)))]
        self._target = torch.ones(self.nbytes // 8, dtype=torch.int64)
        self._buffers = itertools.cycle(sources)

    def read(self) -> torch.Tensor:
        """Sum 64-bit integers, torch's reduction with the least work for each byte."""
        return next(self._buffers).sum()

    def copy(self) -> torch.Tensor:
        """Copy with torch."""
        return self._target.copy_(next(self._buffers))

    def flush(self) -> torch.Tensor:
        """Overwrite the cache, then read, so that no later call pays for writing modified lines back to memory."""
        self._target.zero_()
        return self.read()


def limits(probes: Probes, dtypes: list[str], clock: timing.Cpu | timing.Gpu, rounds: int = 3) -> dict[str, float]:
    """Measure `read` and `copy` (read + written) in bytes/s, and the matrix rate of each dtype in flop/s.

    Each is the best of a few. The matrix rate is that of a layer, X·Wᵀ, on squares, which grow up to SQUARES as long as
    a product is short: without instructions for bf16 torch may take minutes for one.
    """

    def best(function: Callable[[], object], count: int) -> float:
        return min(clock.seconds(function) for _ in range(count))

    found = {
        "read": probes.nbytes / best(probes.read, 4 * rounds),
        "copy": 2 * probes.nbytes / best(probes.copy, 4 * rounds),
    }
    for dtype in dtypes:
        size, seconds = min(256, SQUARES[device()]) // 2, 0.0
        while size < SQUARES[device()] and seconds < SHORT_PRODUCT_S:
            size *= 2
            x, w = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
            seconds = best(lambda x=x, w=w: torch.nn.functional.linear(x, w), rounds)
        found[dtype] = 2 * size**3 / seconds
    return found
