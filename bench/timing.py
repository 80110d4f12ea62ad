"""Timing of several contestants that take turns, with cold caches.

How a figure comes about:

- **Turns.** In one process, call by call, in rotating order: what the neighbours on the machine do hits all alike.
- **Cold.** Before every timed call a 64 MB buffer is read through the caches, and every call gets the next of several
  copies of its weight: inside a model, a layer's weight has been evicted by the other layers' since its last use. (The
  4-bit weight of 4096x4096 is 8 MB and would stay in a 32 MB cache.) That read is itself timed, so each case has the
  bandwidth of the very moment it ran in.
- **Warm code.** A short call is preceded by an untimed one on another copy: before a layer runs, the one before it ran
  the same code, while the 64 MB read has evicted even Python's own (without this, M=1 takes 0.2 ms longer).
- **Awake.** That read also runs on torch's threads, so they are awake when the call begins, as between two layers. It
  follows a pause in which the threads of a second OpenMP runtime (bitsandbytes brings its own) stop spinning:
  otherwise the next contestant pays for them.
- **Medians**, over as many calls as a budget of seconds allows. Freeing a result is not timed.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_CALLS = 5
MAX_CALLS = 60
# An idle libgomp worker spins for a few milliseconds before it sleeps.
PAUSE_S = 0.003
# A longer call does not feel whether its code was cached.
WARM_BELOW_S = 0.02


@dataclass(frozen=True)
class Times:
    """Seconds of one contestant's calls."""

    median: float
    best: float
    calls: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        """Their median, minimum and number."""
        return Times(statistics.median(samples), min(samples), len(samples))


def alternate(
    contestants: Mapping[str, Callable[[int], object]],
    probe: Callable[[], object],
    budget_s: float,
    pause_s: float = PAUSE_S,
) -> tuple[dict[str, Times], Times]:
    """Time the contestants in turn.

    Args:
        contestants: each is called with the number of the call, from which it picks its copy of the weight. All have
            run before, when their results were checked.
        probe: runs (timed) before every call: see above.
        budget_s: seconds for all together. Each gets an equal share of it but at least MIN_CALLS calls, so a slow one
            is called less often than a fast one; its calls are spread over the whole time.
        pause_s: sleep before each probe.

    Returns:
        (the times by name, the probe's times).
    """

    def timed(function: Callable[..., object], *args: object) -> float:
        started = time.perf_counter_ns()
        result = function(*args)
        elapsed = time.perf_counter_ns() - started
        del result
        return elapsed * 1e-9

    samples: dict[str, list[float]] = {name: [] for name in contestants}
    probes: list[float] = []
    calls, warm = {}, {}
    for name, call in contestants.items():
        seconds = timed(call, 0)
        warm[name] = seconds < WARM_BELOW_S
        seconds += pause_s + timed(probe) + warm[name] * seconds
        calls[name] = int(min(max(budget_s / len(contestants) / seconds, MIN_CALLS), MAX_CALLS))
    rounds = max(calls.values())
    names = list(contestants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                turn = (i + 1) * calls[name] // rounds
                if turn > len(samples[name]):
                    time.sleep(pause_s)
                    probes.append(timed(probe))
                    if warm[name]:
                        contestants[name](2 * turn)  # another copy: the timed one stays cold
                        turn = 2 * turn + 1
                    samples[name].append(timed(contestants[name], turn))
    finally:
        if collecting:
            gc.enable()
    return {name: Times.of(times) for name, times in samples.items()}, Times.of(probes)


def set_allocator(mode: str) -> bool:
    """Tell the C allocator what to do with freed memory, so that the figures do not depend on what ran before.

    Blocks from some size on glibc takes from the system and gives back when they are freed; smaller ones it keeps.
    The page faults of 32 MB cost 10 ms, several times what dequantizing a 4096x4096 weight takes. That size begins at
    128 KB and grows with use to 32 MB; and a freed heap of the right size is used for any block. Hence:

    - "setup": blocks of 1 MB and more come from the system. For the weights, so that they leave no heap behind.
    - "default": blocks of 32 MB and more do, which is where glibc's own growth ends.
    - "kept": none do and nothing is given back, as with other allocators.

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
