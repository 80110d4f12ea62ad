"""Starts the processes of the check, one for each instruction set and each kernel of a GPU, and reads their results.

A process of its own is what QLN_FORCE_ISA and QLN_FORCE_KERNEL need, which are read once, and what ends alone if a
kernel hangs or ends it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _C
from .._core import checked_devices
from .._core.checked_devices import EMULATED, OPTIONAL_KERNELS

CASES = "qlora_native._check.cases"
TIMEOUT = 60  # seconds without a result after which a kernel hangs; a result takes a fraction of one
SANITIZER_SECONDS = 45
CUDA_KERNELS = ("general", *OPTIONAL_KERNELS)
NOTHING = "before the first result"
SANITIZER = "compute-sanitizer"
_ENVIRONMENT = ("QLN_BACKEND", "QLN_FORCE_ISA", "QLN_FORCE_KERNEL")  # what a process gets only if it is to have it


@dataclass
class Line:
    """What is known of one kernel, or of an operation."""

    results: int = 0
    worst: float = 0.0  # the largest error, as a part of what is allowed
    errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.errors:
            return f"WRONG  {len(self.errors)} of {self.results} results: {self.errors[0]}"
        exactness = f"the largest error is {self.worst:.2f} of what is allowed" if self.worst else "bit for bit"
        return f"right  {self.results} results, {exactness}"


@dataclass
class Found:
    """The results of one process: lines by name, and hashes of bits by (line, what they are of).

    What ends `process` before it has begun anything, such as a GPU without free memory, is no error of a kernel.
    """

    process: str
    lines: dict[str, Line] = field(default_factory=lambda: defaultdict(Line))
    digests: dict[tuple[str, str], str] = field(default_factory=dict)
    unfinished: str = ""  # the reason why the process did not end as it should
    begun: dict[str, Any] = field(init=False)  # what was printed last of what the process begins

    def __post_init__(self) -> None:
        self.begun = {"line": self.process, "begin": NOTHING}

    def add(self, printed: str) -> None:
        """Read a line that the process has printed."""
        if re.match(r"========= (Invalid|Misaligned|Out-of-range|Barrier|Uninitialized)", printed):
            self._fail(self.begun["line"], f"{self.begun['begin']}: {printed.removeprefix('========= ').rstrip()}")
        elif printed.startswith("{") and printed.endswith("}\n"):  # the process may have ended within a line
            result = json.loads(printed)
            if "begin" in result or "end" in result:
                self.begun = result
            self._add(result)

    def end(self, reason: str, is_error: bool) -> None:
        """Keep the reason why the process has ended before its end, if it has, and count it if it is an error."""
        if "end" not in self.begun:
            self.unfinished = f"{self.begun['begin']}: {reason}"
            if is_error and self.begun["begin"] != NOTHING:
                self._fail(self.begun["line"], self.unfinished)

    def _add(self, result: dict[str, Any]) -> None:
        if "digest" in result:
            self.digests[result["line"], result["what"]] = result["digest"]
        elif "ratio" in result:
            line = self.lines[result["line"]]
            line.results += 1
            line.worst = max(line.worst, result["ratio"])
        elif "error" in result:
            self._fail(result["line"], result["error"])

    def _fail(self, name: str, error: str) -> None:
        self.lines[name].results += 1
        self.lines[name].errors.append(error)

    def compare_digests(self, expected: dict[tuple[str, str], str]) -> None:
        """Compare bits with those of scalar, as far as it has any; where it has none, an error of its own says so."""
        for (line, what), digest in self.digests.items():
            if (line, what) in expected:
                if digest == expected[line, what]:
                    self._add({"line": line, "ratio": 0.0})
                else:
                    self._fail(line, f"{what}: other bits than those of scalar")


def run_cases(
    device: str, what: str, process: str, prefix: Sequence[str] = (), seconds: float = math.inf, **environment: str
) -> Found:
    """Run a process of the check to its end, or until it has printed nothing for `TIMEOUT` seconds.

    Args:
        device, what: as in `cases`.
        process: as in `Found`.
        prefix: a program that runs the process, with its options. What ends it is then no error of a kernel.
        seconds: the time after which it ends in any case.
        environment: variables of the process, beside those of this one.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _ENVIRONMENT}
    command = [*prefix, sys.executable, "-m", CASES, device, what]
    environment = {**inherited, "QLN_PRINT_CONFIG": "1", "QLN_CHECKS": "0", **environment}
    found, deadline = Found(process), time.monotonic() + seconds
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        running = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what `prefix` starts ends with it
        )
        reader = threading.Thread(target=lambda: [*map(lines.put, running.stdout or ()), lines.put(None)], daemon=True)
        reader.start()
        try:
            while (line := lines.get(timeout=max(0.0, min(TIMEOUT, deadline - time.monotonic())))) is not None:
                found.add(line)
            code = running.wait()
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no message"])[-1]
            reason = f"the process ended with {code}: {last}"
        except queue.Empty:
            late = time.monotonic() >= deadline
            reason = f"the check ends it after {seconds:.0f} s" if late else f"no result for {TIMEOUT} s"
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
    found.end(reason, is_error=not prefix)
    return found


# ---- the CPU ---------------------------------------------------------------------------------------------------------


def scalar() -> Found:
    """The results of plain C++, whose bits the others must have."""
    return run_cases("cpu", "all", "products", QLN_FORCE_ISA="scalar")


def check_cpu(oracle: Found) -> Iterator[tuple[str, Found]]:
    """(instruction set, its results) for each that runs on this machine. `oracle` is what `scalar` returned."""
    for isa in _C.available_isas():
        found = oracle if isa == "scalar" else run_cases("cpu", "all", "products", QLN_FORCE_ISA=isa)
        found.compare_digests(oracle.digests)
        yield isa, found


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def gpus() -> list[int]:
    """The indices of the GPUs that the kernels run on."""
    if EMULATED:
        return [0]
    if _C.cuda_unavailable_reason() or not torch.cuda.is_available():
        return []
    return [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i)[0] >= 8]


def check_gpu(index: int, oracle: Found) -> tuple[dict[str, Line], list[str]]:
    """The lines of a GPU: each kernel of products, forced, and the other operations; and what could not be checked.

    A kernel that does not support the GPU, as wgmma before compute capability 9.0, has no line.
    """
    device = "cpu" if EMULATED else f"cuda:{index}"
    backend = {"QLN_BACKEND": "cuda_emulated"} if EMULATED else {}
    lines: dict[str, Line] = {}
    unchecked = []
    for kernel in (*CUDA_KERNELS, ""):
        what, process = ("products", kernel) if kernel else ("rest", "other operations")
        found = run_cases(device, what, process, QLN_FORCE_KERNEL=kernel, **backend)
        found.compare_digests(oracle.digests)
        for name, line in found.lines.items():
            _merge(lines.setdefault(name, Line()), line)
        if found.unfinished.startswith(NOTHING):
            unchecked.append(f"{process}: {found.unfinished}")
    return lines, unchecked


def _merge(line: Line, other: Line) -> None:
    line.results += other.results
    line.worst = max(line.worst, other.worst)
    line.errors += other.errors


def check_gpus(indices: list[int], oracle: Found) -> Iterator[tuple[dict[str, Line], list[str]]]:
    """What `check_gpu` returns for each GPU; they are checked side by side."""
    with ThreadPoolExecutor(max_workers=max(1, len(indices))) as pool:
        yield from pool.map(lambda index: check_gpu(index, oracle), indices)


def sanitizer() -> str | None:
    """The path of NVIDIA's compute-sanitizer, or None."""
    folders = [os.path.join(os.environ.get(name, "/usr/local/cuda"), "bin") for name in ("CUDA_HOME", "CUDA_PATH")]
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(folders))


def check_accesses(program: str, index: int) -> Found:
    """A few results under compute-sanitizer, which finds accesses out of bounds, as far as it comes in its time."""
    prefix = (program, "--tool", "memcheck", "--report-api-errors", "no", "--print-limit", "20")
    device = "cpu" if EMULATED else f"cuda:{index}"
    backend = {"QLN_BACKEND": "cuda_emulated"} if EMULATED else {}
    return run_cases(device, "sanitizer", SANITIZER, prefix, SANITIZER_SECONDS, **backend)


# ---- all of it -------------------------------------------------------------------------------------------------------


def text_of(heading: str, lines: dict[str, Line]) -> str:
    """A heading, and a line for each kernel and operation."""
    width = max(map(len, lines), default=0) + 2
    return "\n".join([heading, *(f"  {name:{width}}{line}" for name, line in lines.items())])


def wrong_of(lines: dict[str, Line]) -> list[str]:
    """The names of what is wrong."""
    return [name for name, line in lines.items() if line.errors]


def check(only: str | None = None) -> Iterator[tuple[str, bool]]:
    """Check this machine.

    Args:
        only: "cpu" or "gpu"; None is both.

    Yields:
        (a part of the report, whether all in it is right), as soon as it is known.
    """
    oracle = scalar()
    if only != "gpu":
        for isa, found in check_cpu(oracle):
            yield _part_of_cpu(isa, found), bool(found.lines) and not wrong_of(found.lines)
    elif oracle.unfinished:
        yield _part_of_cpu("scalar", oracle), False
    if only != "cpu":
        yield from _check_gpus(oracle)


def _part_of_cpu(isa: str, found: Found) -> str:
    """The part of the report on an instruction set."""
    if not found.lines:
        return f"CPU, {isa}\n  not checked: {found.unfinished}"
    return text_of(f"CPU, {isa}", found.lines)


def _check_gpus(oracle: Found) -> Iterator[tuple[str, bool]]:
    indices, program = gpus(), sanitizer()
    if not indices:
        yield "GPU\n  none that the kernels run on", True
    wrong: dict[checked_devices.Device, list[str]] = {}
    for index, (lines, unchecked) in zip(indices, check_gpus(indices, oracle), strict=True):
        device = checked_devices.device_of(index)
        yield text_of(f"GPU {index}, {device}", lines), not wrong_of(lines)
        if unchecked:
            yield "\n".join(["  not checked, so nothing is stored", *(f"  {each}" for each in unchecked)]), False
            continue
        found = wrong_of(lines)
        if program is None:
            yield f"  {SANITIZER} is not installed, so accesses out of bounds were not looked for", True
        elif not EMULATED:
            accesses = check_accesses(program, index)
            text = text_of(f"GPU {index}, under {SANITIZER}", accesses.lines)
            text += f"\n  unfinished: {accesses.unfinished}" if accesses.unfinished else ""
            yield text, not wrong_of(accesses.lines)
            found += wrong_of(accesses.lines)
        wrong[device] = list(dict.fromkeys([*wrong.get(device, []), *found]))
    for device, found in wrong.items():
        try:
            checked_devices.write_result(device, found)
            stored = f"stored in {checked_devices.results_file()}"
        except OSError as error:
            stored = f"not stored: {error}"
        off = [name for name in found if name in OPTIONAL_KERNELS]
        others = [name for name in found if name not in OPTIONAL_KERNELS]
        text = f"{device}\n  switched off from now on: {', '.join(off) or 'nothing'} ({stored})"
        if others:
            text += f"\n  wrong, and nothing replaces it: {', '.join(others)}"
        yield text, not found
