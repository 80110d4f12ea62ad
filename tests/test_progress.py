"""Guards log files: without a terminal our loops print a line at times, and other libraries' bars are hidden."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import process
import pytest
import torch

from qlora_native._core import progress as _progress
from qlora_native._core.progress import Progress
from qlora_native.nn import quantize_model

QUANTIZE = """
import torch
import qlora_native as qn
qn.nn.quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)))
"""


# Loads a GGUF file as examples/finetune.py does, after its import of examples/quiet.py.
LOAD_GGUF = """
import sys
sys.path.insert(0, sys.argv[1])
import quiet
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[2], gguf_file="m.gguf")
"""


def layers():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))


def test_log_file_has_one_line_and_the_table_if_any(capfd):
    quantize_model(layers())
    first, *table = capfd.readouterr().err.splitlines()
    assert first == "quantize: 2 of 2 layers, 0 s"
    assert table[0].split() == ["bytes", "share", "tensors"]
    quantize_model(layers(), progress=False)
    assert capfd.readouterr().err == ""


def on_a_terminal(*command):
    """What a program writes to stderr if that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new one has no width
    subprocess.run([sys.executable, "-c", *command], stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    return shown


def test_terminal_has_a_bar():
    pytest.importorskip("tqdm")
    shown = on_a_terminal(QUANTIZE)
    assert b"\r" in shown and b"2/2" in shown and b" of 2 layers" not in shown


def test_bar_over_a_gguf_file_is_shown_on_a_terminal_alone(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    from gguf_files import make

    from qlora_native.convert.gguf import export_model

    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    examples = Path(__file__).parent.parent / "examples"
    command = (LOAD_GGUF, str(examples), str(tmp_path))
    logged = process.succeed("-c", *command).stderr
    assert "it/s" not in logged and "GGUF tensors" not in logged
    assert b"GGUF tensors" in on_a_terminal(*command)


def test_long_loop_has_a_line_with_the_time_left_every_half_minute(monkeypatch):
    clock, log = [0.0], io.StringIO()
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", log)
    progress = Progress(100, True, "convert", "tensor")
    for count, seconds in ((60, 1.0), (40, 2.5)):
        for _ in progress.over(range(count)):
            clock[0] += seconds
    assert log.getvalue().splitlines() == [
        "convert: 30 of 100 tensors, 30 s, about 70 s left",
        "convert: 60 of 100 tensors, 60 s, about 40 s left",
        "convert: 72 of 100 tensors, 90 s, about 35 s left",
        "convert: 84 of 100 tensors, 120 s, about 23 s left",
        "convert: 96 of 100 tensors, 150 s, about 6 s left",
        "convert: 100 of 100 tensors, 160 s",
    ]
