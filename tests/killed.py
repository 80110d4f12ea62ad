"""Kill conversions at random moments, run them again, and check the files. A program of its own, because it forks.

    python tests/killed.py FOLDER COUNT

Each run is process 1 of a new PID namespace, as in a container, where every run has the same process ID. FOLDER has a
model, `base`, and an adapter of it, `adapter`. The program prints how many of the COUNT runs of each command were
killed before they had ended. It ends with an error if an incomplete folder looks complete, if a run fails after another
was killed, or if the leftovers of a killed run stay.
"""

import ctypes
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from qlora_native.__main__ import main
from qlora_native.convert import merge  # noqa: F401  (so that each run does not import it anew)

CLONE_NEWPID = 0x20000000
COMMANDS = {"quantize": ["quantize", "--model", "base"], "merge": ["merge", "--base", "base", "--adapter", "adapter"]}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run(arguments, seconds=None):
    """Run a command as process 1 of a new namespace, and kill it after so many seconds. Returns how it ended."""
    child = os.fork()
    if child == 0:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID) != 0:
            os._exit(77)
        run = os.fork()
        if run == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            assert os.getpid() == 1
            main(arguments)
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(run, signal.SIGKILL)
        os._exit(0 if os.waitpid(run, 0)[1] == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(command, count):
    """Kill and run again. Returns how many were killed before their end."""
    out = Path("out")
    arguments = [*COMMANDS[command], "--out", str(out)]
    start = time.monotonic()
    ended = run(arguments)
    if ended == 77:
        print("no PID namespace may be made here")
        sys.exit(77)
    whole = time.monotonic() - start
    assert ended == 0
    expected, names = contents(out), set(os.listdir())
    shutil.rmtree(out)
    killed = 0
    for _ in range(count):
        early = run(arguments, random.uniform(0, whole)) != 0
        killed += early
        if out.exists():
            assert contents(out) == expected, "a folder looks finished and is not"
            shutil.rmtree(out)
        assert run(arguments) == 0, "the run after a killed one failed"
        assert contents(out) == expected
        assert set(os.listdir()) == names, f"leftovers: {set(os.listdir()) - names}"
        shutil.rmtree(out)
    return killed


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads of this process would be missing in those that it forks
    os.chdir(sys.argv[1])
    random.seed(0)
    for name in COMMANDS:
        print(f"{name}: {check(name, int(sys.argv[2]))} of {sys.argv[2]} were killed before their end", flush=True)
