"""The extra memory of one call: the growth of the resident set beyond the result.

Each measurement runs in a process of its own, because a thread keeps its scratch memory, so only the first call shows
it.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cases import LORA_RANK, SQUARE
from peers import ours
from timing import in_own_process

FIXED_BOUND, THREAD_BOUND = 8 << 20, 1 << 20  # bytes, and bytes a thread

# operation, M, rank
CALLS = (
    ("quantize", 0, 0),
    ("dequantize", 0, 0),
    ("forward", 1, 0),
    ("forward", 2048, LORA_RANK),
    ("dx", 2048, LORA_RANK),
)


def measure(shape: tuple[int, int] = SQUARE) -> Iterator[dict[str, object]]:
    """Measure each of CALLS on a weight [N, K]: rows with operation, M, rank, extra bytes and bound. Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return
    for operation, M, rank in CALLS:
        extra, threads = in_own_process(extra_bytes, operation, *shape, M, rank)
        bound = FIXED_BOUND + threads * THREAD_BOUND
        yield {"operation": operation, "shape": shape, "M": M, "rank": rank, "bytes": extra, "bound": bound}


def peak(call: Callable[[], object]) -> int:
    """The bytes by which this process grows at most during a call, after a first call has made what is made once."""
    call()
    return grown(call)[0]


def grown(call: Callable[[], object]) -> tuple[int, object]:
    """The bytes by which this process grows at most during a call, and its result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the call could reuse freed memory, unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_bytes(operation: str, N: int, K: int, M: int, rank: int) -> tuple[int, int]:
    """The extra bytes of the first call in this process, and its threads."""

    def prepared(N: int, K: int, M: int) -> Callable[[], Any]:
        """Make the inputs, and return a function that runs the operation on them."""
        weight = torch.randn(N, K).bfloat16()
        if operation == "quantize":
            return lambda: ours.quantize(weight)
        held = ours.quantize(weight)
        if operation == "dequantize":
            return lambda: ours.dequantize(held, torch.bfloat16)
        lora = {"lora_a": torch.randn(rank, K), "lora_b": torch.randn(N, rank)} if rank else {}
        left = torch.randn(M, K if operation == "forward" else N).bfloat16()
        function = ours.forward if operation == "forward" else ours.backward_input
        return lambda: function(held, left, **lora)

    with torch.no_grad():
        prepared(64, 64, 4)()  # loads code and starts the threads
        nbytes, result = grown(prepared(N, K, M))
    return nbytes - result.nbytes, torch.get_num_threads()
