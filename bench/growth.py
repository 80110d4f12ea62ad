"""How cost grows: with the rows of x, with the threads, and with other programs on the same cores.

    python bench/growth.py [--shape 4096 4096] [--dtype bfloat16] [--output]

It writes two tables. The first has products of M = 1 ... 4096 rows on one thread, on all threads, and on all beside a
busy process that multiplies on as many threads. Contestants are ours, torch's dense product, and decode-then-dense (W
is decoded whole and multiplied by torch), whose time a product may exceed by at most 5 % (product/config.h). The
second has a training step of SmolLM2 (step.py), ours and LoRA over bf16 weights: alone, beside the busy process, and
beside two more processes that train the same way on the same cores.

Contestants take turns in one process (timing.py); medians. --output writes bench/results/<machine>/growth.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import machine
import report
import step
import timing
from cases import OURS
from peers import ours

MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
OPERATIONS = ("forward", "dx")
DENSE, DECODED = "torch dense", "decode, then dense"
BESIDE = "beside a busy process"
BUDGET_S = 0.8  # seconds for all contestants of a cell
COPIES = 6  # of the weight, so that no call finds its weight in a cache
PROCESSES = 3  # processes that train at once
ALONE, SHARED = "alone", f"{PROCESSES} that train"
STEPS = 3


def products(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[str, int], dict[str, Callable[[int], object]]]:
    """A function that returns the contestants of an operation with M rows."""
    N, K = shape
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    held = [ours.quantize(weight)]
    held += [ours.copy(held[0]) for _ in range(COPIES - 1)]
    dense = [weight.to(dtype) for _ in range(COPIES)]

    def contestants(operation: str, M: int) -> dict[str, Callable[[int], object]]:
        x = torch.randn(M, K if operation == "forward" else N).to(dtype)
        if operation == "forward":
            own, multiply = ours.forward_op, lambda w: torch.nn.functional.linear(x, w)
        else:
            own, multiply = ours.backward_input, lambda w: x @ w
        return {
            OURS: lambda i: own(held[i % COPIES], x),
            DENSE: lambda i: multiply(dense[i % COPIES]),
            DECODED: lambda i: multiply(ours.dequantize(held[i % COPIES], dtype)),
        }

    return contestants


def busy() -> None:
    """Multiply dense matrices on all threads until the process is ended."""
    a = torch.randn(1024, 1024)
    while True:
        a @ a


@contextmanager
def beside(command: str, count: int = 1) -> Iterator[None]:
    """Run other processes of this script meanwhile."""
    others = [subprocess.Popen([sys.executable, __file__, command], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for other in others:
            other.stdout.readline()  # wait until it has begun
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@torch.inference_mode()
def measure_products(shape: tuple[int, int], dtype: torch.dtype) -> list[dict[str, object]]:
    """The rows of the first table, one for each operation, M and condition: seconds by contestant."""
    contestants, rows = products(shape, dtype), []
    buffer = torch.ones(machine.PROBE_BYTES["cpu"] // 4)
    threads = torch.get_num_threads()

    def measure(condition: str) -> None:
        for operation in OPERATIONS:
            for M in MS:
                found, _ = timing.Cpu().alternate(contestants(operation, M), buffer.sum, BUDGET_S)
                row = {"operation": operation, "M": M, "condition": condition}
                rows.append(row | {"seconds": {name: times.median for name, times in found.items()}})

    if threads > 1:
        torch.set_num_threads(1)
        measure("1 thread")
        torch.set_num_threads(threads)
    measure(f"{threads} threads")
    with beside("--busy"):
        measure(BESIDE)
    return rows


def train(stack: str, steps: int) -> list[float]:
    """Train, and return the seconds of each step. Prints a line when the first begins."""
    make = step.step_of_ours if stack == OURS else step.step_of_dense
    with torch.enable_grad():
        run, tokens = make(step.load(), 0.0), step.some_tokens()
        run(tokens)
        print("began", flush=True)
        seconds = []
        while len(seconds) < steps:
            started = time.perf_counter()
            run(tokens)
            seconds.append(time.perf_counter() - started)
    return seconds


def measure_training() -> list[dict[str, object]]:
    """The rows of the second table, one for each stack: median seconds of a step by condition."""

    def median(stack: str) -> float:
        command = [sys.executable, __file__, "--train", stack]
        shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return statistics.median(json.loads(shown.splitlines()[-1]))

    rows = []
    for stack in (OURS, "bf16 + PEFT"):
        seconds = {ALONE: median(stack)}
        with beside("--busy"):
            seconds[BESIDE] = median(stack)
        with beside(f"--train-on={stack}", PROCESSES - 1):
            seconds[SHARED] = median(stack)
        rows.append({"stack": stack, "seconds": seconds})
    return rows


def lines(found: dict) -> str:
    """The report in Markdown."""
    description = found["machine"]
    head = f"{machine.cpu_name(description)}, {description['isa']}, torch {description['versions']['torch']}"
    N, K = found["shape"]
    text = [f"# How cost grows\n\n{head}; W [{N}, {K}], NF4 with double quantization, {found['dtype']}, medians.\n"]
    text += ['"Dense" and "decoded": how many times as fast ours is. Beside the busy process times go in steps of\n']
    text += ["the scheduler's slice, 4 to 8 ms, for a product ends when the last of its threads has had a core.\n"]
    conditions = list(dict.fromkeys(row["condition"] for row in found["products"]))
    for operation, name in (("forward", "Y = X·Wᵀ"), ("dx", "dX = dY·W")):
        text += [f"\n## {name}\n", "| M |" + "".join(f" {c}, ms | dense | decoded |" for c in conditions)]
        text += ["|" + "---|" * (1 + 3 * len(conditions))]
        for M in MS:
            cells = []
            for condition in conditions:
                (row,) = (
                    r
                    for r in found["products"]
                    if (r["operation"], r["M"], r["condition"]) == (operation, M, condition)
                )
                own, dense, decoded = (row["seconds"][name] for name in (OURS, DENSE, DECODED))
                cells += [f"{1e3 * own:.3g}", f"{dense / own:.2f} ×", f"{decoded / own:.2f} ×"]
            text.append(f"| {M} | " + " | ".join(cells) + " |")
    text += ["\n## A training step of SmolLM2\n"]
    text += [
        f"| | {ALONE}, s |" + "".join(f" {c}, s | slower by |" for c in (BESIDE, SHARED)),
        "|---|---|---|---|---|---|",
    ]
    for row in found["training"]:
        alone, *others = (row["seconds"][condition] for condition in (ALONE, BESIDE, SHARED))
        cells = [f"{alone:.2f}", *(f"{seconds:.2f} | {seconds / alone:.2f} ×" for seconds in others)]
        text.append(f"| {row['stack']} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", action="store_true", help="write the report below bench/results/")
    for hidden in ("--train", "--train-on"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--busy", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.busy:
        print("began", flush=True)
        return busy()
    if args.train:
        return print(json.dumps(train(args.train, STEPS)))
    if args.train_on:
        train(args.train_on, sys.maxsize)
    found = {
        "machine": machine.describe(),
        "shape": list(args.shape),
        "dtype": args.dtype,
        "products": measure_products(tuple(args.shape), getattr(torch, args.dtype)),
        "training": measure_training(),
    }
    if args.output:
        report.write_results("growth", found, lines(found))
    print(lines(found))


if __name__ == "__main__":
    main()
