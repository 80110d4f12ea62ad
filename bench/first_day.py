"""The first day on a GPU: check it, measure which kernel is the fastest, and compare with the peers, in this order.

    python bench/first_day.py                       starts, and goes on where an interrupted or failed run ended
    python bench/first_day.py --steps tune step     these steps, even if they are done
    QLN_BACKEND=cuda_emulated python bench/first_day.py
                                                    the same steps over the emulator, with two tiny shapes

A step is a command with a time limit below ten minutes, so that the day may be cut into short rents of a GPU. Its
output goes into FOLDER/<step>.log, and how it ended into FOLDER/steps.json (by default FOLDER is
build/first_day/<device>). A step that fails does not keep the next ones from running, and runs again at the next start;
so does one whose program is missing. `tune` also writes the rows of cuda/product/measured.inc, and `products` the
report of bench/run.py: build the package again after the first, and repeat the second with --steps to see what the rows
are worth.

    check        python -m qlora_native check
    memcheck, synccheck
                 the tests of the GPU under compute-sanitizer, if it is there
    clusters     how many clusters of 2, 4 and 8 blocks the GPU holds at once (nvcc compiles clusters.cu)
    tune         tune_cuda.py, in pieces of eight minutes
    products     run.py against torch's dense product, bitsandbytes and torchao
    step         step.py, a training step
    paged        paged.py, the paged AdamW while memory is nearly full
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import machine
from tune_cuda import INCOMPLETE

ROOT = Path(__file__).parent.parent
DONE, MISSING = "done", "missing"  # how a step ended; otherwise the text says why it failed


@dataclass(frozen=True)
class Step:
    """A command of the day.

    name      of the step, and of its log
    command   the program and its arguments, in the root of the repository
    limit_s   the seconds after which it is ended
    missing   the reason why it cannot run here, or an empty text
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    missing: str = ""


def steps(kind: str, folder: Path) -> list[Step]:
    """The steps in their order, for the device of machine.gpu_or_emulator."""
    python, on_gpu = sys.executable, kind == "cuda"
    check = (python, "-m", "qlora_native", "check")
    has_check = subprocess.run((*check, "--help"), capture_output=True, check=False).returncode == 0
    missing_check = "" if has_check else "this version has no self-check, python -m qlora_native check"
    sanitizer = _missing("compute-sanitizer") if on_gpu else "it needs a GPU"
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py")
    sanitize = ("compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9", "--tool")
    includes, program = ("-Icuda", "-Icpp/src", "-Icpp/include"), str(folder / "clusters")
    compile_clusters = ("nvcc", "-std=c++20", "-arch=native", *includes, "-o", program, "bench/clusters.cu")
    shapes = ("--shapes", "128x128", "64x192", "--m", "16", "--dtypes", "bfloat16")
    tune = ("--folder", str(folder), *(("--output",) if on_gpu else (*shapes, "--ranks", "0")))
    products = ("--device", kind, "--peers", "torch_dense", "bitsandbytes", "torchao")
    if on_gpu:
        products += ("--output",)
    else:
        products += (*shapes, "--operations", "forward", "dx", "--budget", "0.05")
    return [
        Step("check", check, 570, missing_check),
        *(
            Step(tool, (*sanitize, tool, *tests), 570, sanitizer)
            for tool in ("memcheck", "synccheck")
        ),
        Step("clusters", ("bash", "-c", f"{' '.join(compile_clusters)} && {program}"), 120,
             _missing("nvcc") if on_gpu else "it needs a GPU"),
        Step("tune", (python, "bench/tune_cuda.py", *tune), 570),
        Step("products", (python, "bench/run.py", *products), 570),
        Step("step", (python, "bench/step.py", "--device", kind, *(() if on_gpu else ("--tiny",))), 570),
        Step("paged", (python, "bench/paged.py", *(() if on_gpu else ("--tensors", "2", "--elements", "5000"))), 300),
    ]  # fmt: skip


def _missing(program: str) -> str:
    return "" if shutil.which(program) else f"{program} is not on PATH"


def run(step: Step, log: Path) -> str:
    """Run a step until it is complete, fails, or is at its limit; return how it ended."""
    if step.missing:
        return f"{MISSING}: {step.missing}"
    status = INCOMPLETE
    with log.open("ab") as output:
        while status == INCOMPLETE:
            output.write(f"$ {' '.join(step.command)}\n".encode())
            output.flush()
            with subprocess.Popen(step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT) as process:
                try:
                    status = process.wait(step.limit_s)
                except subprocess.TimeoutExpired:
                    for each in (*psutil.Process(process.pid).children(recursive=True), process):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            each.kill()
                    return f"failed: it took more than {step.limit_s:g} s"
    return DONE if status == 0 else f"failed: its exit status is {status}"


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of logs and results (default: build/first_day/<device>)")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these, even if they are done")
    args = parser.parse_args(argv)
    kind = machine.gpu_or_emulator()
    folder = (args.folder or machine.first_day_folder(kind)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    every = steps(kind, folder)
    names = [step.name for step in every]
    if unknown := set(args.steps or ()) - set(names):
        parser.error(f"--steps: expected of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    path = folder / "steps.json"
    ended = json.loads(path.read_text()) if path.exists() else {}
    for step in every:
        if step.name not in args.steps if args.steps else ended.get(step.name, {}).get("end") == DONE:
            continue
        print(f"{step.name} ...", end=" ", flush=True)
        began = time.monotonic()
        end = run(step, folder / f"{step.name}.log")
        ended[step.name] = {
            "end": end, "seconds": round(time.monotonic() - began, 1), "command": " ".join(step.command),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        written = path.with_suffix(".new")
        written.write_text(json.dumps(ended, indent=1) + "\n")
        os.replace(written, path)
        print(f"{end}, {ended[step.name]['seconds']:g} s", flush=True)
    width = max(map(len, names))
    print(*(f"{name:{width}}  {ended[name]['end']}" for name in names if name in ended), sep="\n")
    print(f"logs and results: {folder}")
    return int(any(each["end"].startswith("failed") for each in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
