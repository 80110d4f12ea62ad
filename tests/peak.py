"""The memory of pieces of Python: their peak, measured in a process of its own, and what autograd saves for backward.

Only the process's own memory counts (RssAnon), because the system can take back pages of mapped files.
"""

import os

import process
import pytest
import torch

# Freed memory returns to the system at once, so that the next call does not live on what this one has freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
PROGRAM = """
import ctypes, gc, threading, time, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page that is touched is mapped alone

def anonymous():
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def bytes_of(result):
    tensors = [*result.parameters(), *result.buffers()] if isinstance(result, torch.nn.Module) else []
    return sum(tensor.nbytes for tensor in tensors)

def measure(function):
    gc.collect()
    peak, before, done = 0, anonymous(), False
    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    result = function()
    done = True
    thread.join()
    return peak - before - bytes_of(result)

"""


def peaks(prepare, *expressions):
    """Bytes that each of the expressions took beside the tensors of its result, after the statements `prepare`."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer keeps what is freed")
    program = PROGRAM + prepare + "".join(f"\nprint(measure(lambda: {text}))" for text in expressions)
    return [int(line) for line in process.succeed("-c", program, **ENVIRONMENT).stdout.split()[-len(expressions) :]]


def megabytes(numbers):
    """For a message."""
    return ", ".join(f"{number / 2**20:.1f} MB" for number in numbers)


def saved_bytes(function, *known):
    """(the result of `function`, the bytes that autograd saves for its backward beside the storages of `known`)."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return result, sum(storages.values())
