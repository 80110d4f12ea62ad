"""Guards the log files of those who run this without a terminal: a few lines and no bars."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
import torch

from qlora_native import _progress
from qlora_native._progress import Progress
from qlora_native.nn import quantize_model

QUANTIZE = """
import torch
import qlora_native as qn
qn.nn.quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)))
"""


def layers():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))


def test_log_file_has_one_line_and_the_table(capfd):
    quantize_model(layers())
    first, *table = capfd.readouterr().err.splitlines()
    assert first == "quantize: 2 of 2 layers, 0 s"
    assert table[0].split() == ["bytes", "share", "tensors"]


def test_nothing_is_shown_unless_it_is_wanted(capfd):
    quantize_model(layers(), progress=False)
    assert capfd.readouterr().err == ""


def test_terminal_has_a_bar():
    pytest.importorskip("tqdm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new one has no width
    subprocess.run([sys.executable, "-c", QUANTIZE], stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert b"\r" in shown and b"2/2" in shown and b" of 2 layers" not in shown


def test_long_loop_has_a_line_every_half_minute(monkeypatch):
    clock, log = [0.0], io.StringIO()
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", log)
    progress = Progress(100, True, "convert", "tensor")
    for _ in progress.over(range(60)):
        clock[0] += 1.0
    for _ in progress.over(range(40)):
        clock[0] += 1.0
    assert log.getvalue().splitlines() == [
        "convert: 30 of 100 tensors, 30 s",
        "convert: 60 of 100 tensors, 60 s",
        "convert: 90 of 100 tensors, 90 s",
        "convert: 100 of 100 tensors, 100 s",
    ]
