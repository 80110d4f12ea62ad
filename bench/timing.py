"""Time several contestants alternately, with cold caches.

How a figure comes about:

- **In rounds.** Contestants alternate call by call in one process, in rotating order, so that other programs on the
  machine affect all alike.
- **Cold.** Before every timed call a buffer of 64 MB is read through the caches, and every call gets the next of
  several copies of its weight. Inside a model, too, the other layers have evicted a layer's weight since its last use.
  (The 4-bit weight of 4096x4096 is 8 MB and would stay in a 32 MB cache.) The read is timed, so each case has the
  bandwidth of the moment in which it ran.
- **Warm code.** Before a short call an untimed one runs on another copy. In a model the layer before has run the same
  code, while the 64 MB read has evicted even Python's own (without this, M=1 takes 0.2 ms longer).
- **Awake.** The read also runs on torch's threads, so they are awake when the call begins, as between two layers.
  Before it there is a pause in which the threads of a second OpenMP runtime (bitsandbytes has its own) stop spinning;
  otherwise they would slow the next contestant down.
- **Medians** are over as many calls as a budget of seconds allows. Freeing a result is not timed.

On a GPU (class Gpu) rounds and medians are the same. A sample is the time of a replay of a graph of CALLS calls,
between two events, divided by CALLS. It does not include launching, and each call gets the next copy of the weight.
Before each replay the level-two cache is flushed, and the stream is held until the host has submitted everything.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

MIN_CALLS = 5
MAX_CALLS = 60
# An idle libgomp worker spins for a few milliseconds before it sleeps.
PAUSE_S = 0.003
# For a longer call it does not matter whether its code was cached.
WARM_BELOW_S = 0.02


@dataclass(frozen=True)
class Times:
    """The seconds of a contestant's calls."""

    median: float
    best: float
    calls: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        """The median, the minimum and the number of samples."""
        return Times(statistics.median(samples), min(samples), len(samples))


IN_OWN_PROCESS = """import importlib, json, sys
folder, module, function, args, kwargs = json.loads(sys.argv[1])
sys.path.insert(0, folder)
print(json.dumps(getattr(importlib.import_module(module), function)(*args, **kwargs)))"""


def in_own_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of bench/ in a process of its own. Arguments and result travel as JSON.

    Raises:
        subprocess.CalledProcessError: it failed, after printing why.
    """
    path = Path(function.__code__.co_filename)
    call = json.dumps([str(path.parent), path.stem, function.__name__, args, kwargs])
    command = [sys.executable, "-c", IN_OWN_PROCESS, call]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


Contestants = Mapping[str, Callable[[int], object]]


def calls_within(budget_s: float, seconds: Mapping[str, float]) -> dict[str, int]:
    """{name: calls}, from an equal share of the budget for each, within MIN_CALLS and MAX_CALLS."""
    share = budget_s / len(seconds)
    return {name: int(min(max(share / each, MIN_CALLS), MAX_CALLS)) for name, each in seconds.items()}


def schedule(calls: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield (name, number of its call, from 1) in rotating order. The calls of each are spread over all rounds."""
    names, rounds = list(calls), max(calls.values())
    made = dict.fromkeys(names, 0)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            call = (i + 1) * calls[name] // rounds
            if call > made[name]:
                made[name] = call
                yield name, call


class Cpu:
    """The clock of the CPU."""

    def seconds(self, function: Callable[..., object], *args: object) -> float:
        """The seconds of one call, without freeing its result."""
        started = time.perf_counter_ns()
        result = function(*args)
        elapsed = time.perf_counter_ns() - started
        del result
        return elapsed * 1e-9

    def alternate(
        self,
        contestants: Contestants,
        probe: Callable[[], object],
        budget_s: float,
        pause_s: float = PAUSE_S,
        copies: bool = True,
    ) -> tuple[dict[str, Times], Times]:
        """Time the contestants alternately.

        Args:
            contestants: functions of the number of the call, by which they choose a copy of the weight. All have run
                before, when their results were checked.
            probe: the timed read before every call, described above.
            budget_s: the seconds for all together. Slow contestants are called less often.
            pause_s: the seconds to sleep before each probe.
            copies: whether the contestants take another copy of their data by the next number. A short call then has
                an untimed one before it, over another copy, so that its code is warm and its data are cold. Without
                copies the untimed call would fetch the data of the timed one.

        Returns:
            (the times by name, the probe's times).
        """
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        probes: list[float] = []
        needed, warm = {}, {}
        for name, call in contestants.items():
            seconds = self.seconds(call, 0)
            warm[name] = copies and seconds < WARM_BELOW_S
            needed[name] = seconds + pause_s + self.seconds(probe) + warm[name] * seconds
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name, number in schedule(calls_within(budget_s, needed)):
                time.sleep(pause_s)
                probes.append(self.seconds(probe))
                if warm[name]:
                    contestants[name](2 * number)  # another copy, so that the timed one stays cold
                    number = 2 * number + 1
                samples[name].append(self.seconds(contestants[name], number))
        finally:
            if collecting:
                gc.enable()
        return {name: Times.of(times) for name, times in samples.items()}, Times.of(probes)


class Gpu:
    """The clock of a GPU, for work that is submitted to torch's current stream."""

    CALLS = 8  # calls in a graph
    HOLD_CYCLES = 4_000_000  # two milliseconds, several times as long as submitting a graph takes

    def __init__(self, flush: Callable[[], object], cuda: Any) -> None:
        """`flush` empties the level-two cache; `cuda` is torch.cuda."""
        self._flush, self._cuda = flush, cuda

    def seconds(self, function: Callable[..., object], *args: object) -> float:
        """The seconds from the first to the last operation that one call submits."""
        began, ended = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._flush()
        self._cuda._sleep(self.HOLD_CYCLES)
        began.record()
        result = function(*args)
        ended.record()
        ended.synchronize()
        del result
        return began.elapsed_time(ended) * 1e-3

    def graph(self, call: Callable[[int], object]) -> Any:
        """Capture CALLS calls as a graph."""
        call(0)  # the first call may allocate memory or choose a kernel, which is not allowed in a capture
        self._cuda.synchronize()
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            for i in range(self.CALLS):
                call(i)
        return graph

    def alternate(
        self, contestants: Contestants, probe: Callable[[], object], budget_s: float, captured: bool = True
    ) -> tuple[dict[str, Times], Times]:
        """Time the contestants as Cpu.alternate does.

        Without `captured` a sample is one call, because a call that synchronizes cannot be in a graph. Time of the host
        beyond the hold, or after the call has waited for the GPU, is then part of the sample.
        """
        named = {**contestants, "probe": lambda _: probe()}
        runs = {name: self.graph(call).replay if captured else partial(call, 0) for name, call in named.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for name, _ in schedule(calls_within(budget_s, {name: self.seconds(run) for name, run in runs.items()})):
            samples[name].append(self.seconds(runs[name]) / (self.CALLS if captured else 1))
        times = {name: Times.of(seconds) for name, seconds in samples.items()}
        return times, times.pop("probe")


def set_allocator(mode: str) -> bool:
    """Set what the C allocator does with freed memory, so that the figures do not depend on what ran before.

    glibc takes blocks above a threshold from the system and returns them when they are freed; it keeps smaller ones.
    The page faults of 32 MB take 10 ms, several times as long as dequantizing a 4096x4096 weight. The threshold begins
    at 128 KB and grows with use to 32 MB, and a freed heap of the right size is used for any block. So there are three
    modes:

    - "setup": blocks of at least 1 MB come from the system. Used for the weights, so that they leave no heap behind.
    - "default": blocks of at least 32 MB come from the system, which is glibc's largest threshold.
    - "kept": no blocks come from the system, and none are returned, as with other allocators.

    Returns:
        Whether this C library offers it.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # from <malloc.h>
    options = {
        "setup": {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 1 << 20, M_TRIM_THRESHOLD: 64 << 20},
        "default": {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20},
        "kept": {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1},
    }[mode]
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([mallopt(option, value) for option, value in options.items()])
