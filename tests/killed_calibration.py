"""Kill `quantize --calibrate` at given moments, run it again, and check the files. A program, because it forks.

    python tests/killed_calibration.py FOLDER

FOLDER has a model of three layers, `model`, and `text.txt`. The program ends with an error if the run after a killed
one repeats a layer that was finished, if its bytes are others than those of a run that nobody killed, or if something
stays beside the result.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch

from qlora_native.__main__ import main
from qlora_native._calibrate import model, quantizer
from qlora_native.convert import _calibration, _staging, merge

OUT = Path("out")
COMMAND = ["quantize", "--model", "model", "--out", str(OUT), "--calibrate", "text.txt", "--blocksize", "32"]
# {moment: (the owner and the name of a function, the number of the call at which the process is killed, the layers that
# are then finished)}.
MOMENTS = {
    "in the first layer": (quantizer, "calibrated", 3, 0),
    "while the first layer is written": (_calibration, "save_file", 1, 0),
    "after the first layer's weights": (_calibration, "save_file", 2, 0),
    "between the first two layers": (model.Calibration, "run", 2, 1),
    "in the last layer": (quantizer, "calibrated", 15, 2),
    "while tensors are converted": (merge._Conversion, "tensors", 20, 3),
    "before the result gets its name": (_staging, "_sync", 1, 3),
}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def count(owner, name, at=None):
    """Count the calls of a function, and die at one of them."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)
    return calls


def run(owner=None, name="", at=None):
    """Run the command in a child. Returns how many layers it calibrated, or less than 0 if it was killed."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        if owner is not None:
            count(owner, name, at)
        layers = count(model.Calibration, "run")
        try:
            main(COMMAND)
        except BaseException:
            os._exit(99)
        os._exit(len(layers))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def removed(folder):
    """Remove a complete result. Returns what its contents were."""
    found = contents(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads of this process would be missing in those that it forks
    os.chdir(sys.argv[1])
    names = set(os.listdir())
    assert run() == 3
    expected = removed(OUT)
    assert set(os.listdir()) == names
    for moment, (owner, name, at, finished) in MOMENTS.items():
        assert run(owner, name, at) == -signal.SIGKILL, moment
        assert not OUT.exists(), moment
        assert run() == 3 - finished, moment
        assert removed(OUT) == expected, moment
        assert set(os.listdir()) == names, f"{moment}: {set(os.listdir()) - names}"
        print(f"{moment}: {finished} layers were not repeated", flush=True)
