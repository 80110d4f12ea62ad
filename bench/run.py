"""Measure speed against torch's dense product, bitsandbytes and the machine's limits, all in the same process.

    python bench/run.py                              the whole table, in about twelve minutes on two cores
    python bench/run.py --quick                      a few rows, in seconds
    python bench/run.py --output                     also a report: JSON, Markdown and plots, below bench/results/
    python bench/run.py --targets                    also the goals, as text
    python bench/run.py --operations forward dx --shapes 4096x14336 --m 1 512 --dtypes bfloat16
    python bench/run.py --isa avx2 --dtypes float32  both sides held to AVX2
    python bench/run.py --operations step            a training step of SmolLM2 (step.py)
    python bench/run.py --operations optimizer       a step of AdamW alone (optimizer.py)
    python bench/run.py --device cuda --output       a GPU, in its own table

A row has the microseconds; GB/s if memory is the limit, else GFLOP/s; the share of the limit, which is the longer of
bytes / bandwidth and operations / matrix rate; and how many times as long each peer takes. timing.py describes how a
figure is measured, cases.py what is compared, and goals.py the goals. Do not use the machine while it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cases as data

OPERATIONS = {
    "cpu": ("quantize", "dequantize", "forward", "dx", "lora_gradients", "growth", "memory", "optimizer", "step"),
    "cuda": ("dequantize", "forward", "dx", "lora_gradients", "optimizer"),
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=OPERATIONS, default="cpu")
    add("--operations", nargs="+", choices=OPERATIONS["cpu"], help="default: all that the device has")
    add("--shapes", nargs="+", type=_shape, metavar="NxK")
    add("--m", nargs="+", type=int, help="rows of activations to keep (default: all)")
    add("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    add("--peers", nargs="*", help="files of bench/peers (default: all)")
    add("--quick", action="store_true", help="4096x4096, few cases, short")
    add("--budget", type=float, metavar="SECONDS", help="a case, shared by its contestants (default: 1; quick: 0.3)")
    add("--isa", help="hold qlora_native to this instruction set (QLN_FORCE_ISA), and torch too if it is avx2")
    add("--threads", type=int, help="OMP_NUM_THREADS")
    add("--targets", action="store_true", help="also a Markdown table of the goals and what was measured")
    add("--output", nargs="?", const="", metavar="FILE.json",
        help="write a report: this, FILE.md and plots (default: results/MACHINE/products.json)")  # fmt: skip
    args = parser.parse_args(argv)
    args.operations = args.operations or list(OPERATIONS[args.device])
    if missing := set(args.operations) - set(OPERATIONS[args.device]):
        parser.error(
            f"--operations: expected of {', '.join(OPERATIONS[args.device])}, got {', '.join(sorted(missing))}"
        )
    args.shapes = [data.SQUARE] if args.quick else args.shapes or list(data.SHAPES[args.device])
    args.budget = args.budget or (0.3 if args.quick else 1.0)
    return args


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or int(match[2]) % data.BLOCKSIZE:
        raise argparse.ArgumentTypeError(f"expected NxK with K a multiple of {data.BLOCKSIZE}, got {text!r}")
    return int(match[1]), int(match[2])


def set_environment(args: argparse.Namespace) -> None:
    """Set the variables that libraries read when they are loaded; call this before torch is imported."""
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.isa:
        os.environ["QLN_FORCE_ISA"] = args.isa
    if args.isa == "avx2":
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"


def selected(args: argparse.Namespace, shape: tuple[int, int], threads: int) -> list[data.Case]:
    """The cases of a shape that the command line asks for. `threads` is the machine's number."""
    table = (data.quick if args.quick else data.cases)(shape, args.device) if shape in args.shapes else []
    found = [case for case in table if case.operation in args.operations]
    if "growth" in args.operations and not args.quick and shape[0] in data.WIDTHS and shape[0] == shape[1]:
        found += [case for case in data.growth(shape, threads) if case not in table]
    return [case for case in found if case.dtype in args.dtypes and (not args.m or case.M in (0, *args.m))]


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """All shapes that have cases; those of the command line come first."""
    widths = [(width, width) for width in data.WIDTHS] if "growth" in args.operations and not args.quick else []
    return args.shapes + [shape for shape in widths if shape not in args.shapes]


def row_of(case: data.Case, times: dict, bandwidth: float, errors: dict, limits: dict[str, float]) -> dict:
    """A row of the report. `bandwidth`, in bytes/s, was measured while the case ran."""
    row = {
        **dataclasses.asdict(case),
        "name": case.name,
        "bytes": case.bytes,
        "flops": case.flops,
        "bandwidth": bandwidth,
        "times": {
            name: {"us": 1e6 * t.median, "best_us": 1e6 * t.best, "calls": t.calls, "error": errors.get(name)}
            for name, t in times.items()
        },
    }
    set_limit(row, limits)
    return row


def set_limit(row: dict, limits: dict[str, float]) -> None:
    """Set `limit_us`, and `bound`, which says whether memory or arithmetic is the limit."""
    memory_s, arithmetic_s = row["bytes"] / row["bandwidth"], row["flops"] / limits[row["dtype"]]
    row["bound"] = "memory" if memory_s >= arithmetic_s else "arithmetic"
    row["limit_us"] = 1e6 * max(memory_s, arithmetic_s)


def measure_table(args: argparse.Namespace, adapters: dict, probes: Any, clock: Any, result: dict) -> None:
    """Measure every selected case, printing rows as they come, into result["rows"] and result["wrong"]."""
    import torch

    from checks import WrongResult
    from contest import Weights, contestants
    from report import Table
    from timing import set_allocator

    threads = torch.get_num_threads()
    table = Table()
    # Kept memory comes last, because later calls would reuse the heap that it leaves.
    for kept in (False, True):
        setup, timed = ("kept", "kept") if kept else ("setup", "default")
        for shape in shapes(args):
            chosen = [case for case in selected(args, shape, threads) if (case.memory == "kept") == kept]
            if not chosen or (not set_allocator(setup) and kept):
                continue
            weights = Weights(shape)
            for case in chosen:
                torch.set_num_threads(case.threads or threads)
                try:
                    found, errors = contestants(case, weights, adapters)
                except WrongResult as error:
                    result["wrong"].append(f"{case.name} M={case.M} {case.dtype} {shape[0]}x{shape[1]}: {error}")
                    print(f"WRONG RESULT: {result['wrong'][-1]}", flush=True)
                    continue
                # On a GPU the limit is always that of a copy, because sum() does not read at full speed.
                copying = case.operation in ("quantize", "dequantize") or args.device == "cuda"
                set_allocator(timed)
                times, probe = clock.alternate(found, probes.copy if copying else probes.read, args.budget)
                set_allocator(setup)
                bandwidth = probes.nbytes * (2 if copying else 1) / probe.median
                result["rows"].append(row_of(case, times, bandwidth, errors, result["limits"]))
                print(table.line(result["rows"][-1]), flush=True)
    torch.set_num_threads(threads)


def measure_alone(result: dict, name: str, measure: Callable[[], Any], lines: Callable[[Any], str]) -> None:
    """Measure in another process, store the result by name, and print it. A failure goes into result["wrong"]."""
    try:
        result[name] = measure()
    except subprocess.CalledProcessError as error:  # it has printed why; keep what was measured before
        result["wrong"].append(f"{name}: its process ended with {error.returncode}")
        print(f"WRONG RESULT: {result['wrong'][-1]}", flush=True)
    else:
        print(lines(result[name]), flush=True)


def measure_steps(result: dict) -> None:
    """Measure the training steps."""
    import step
    from report import step_lines

    for name, how in data.STEPS.items():
        measure_alone(result, name, partial(step.measure_alone, **how), step_lines)


def measure_optimizer(result: dict, device: str) -> None:
    """Measure the optimizers' steps."""
    import optimizer
    from report import optimizer_lines

    def lines(rows: list[dict]) -> str:
        return "\n".join(map(optimizer_lines, rows))

    measure_alone(result, "optimizer", partial(optimizer.measure_alone, device), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the number of wrong results, or 1 where the device is missing."""
    args = arguments(argv)
    set_environment(args)
    import torch

    import machine
    import memory
    import report
    from peers import DEFAULT, load
    from timing import Cpu, Gpu, set_allocator

    if args.device == "cuda":
        if reason := machine.gpu_missing():
            print(f"--device cuda: {reason}", file=sys.stderr)
            return 1
        torch.set_default_device("cuda")
    torch.set_grad_enabled(False)
    adapters, missing = load(DEFAULT[args.device] if args.peers is None else args.peers)
    result: dict = {"machine": machine.describe(), "missing_peers": missing, "rows": [], "memory": [], "wrong": []}
    set_allocator("setup")
    others = machine.Others()
    probes = machine.Probes()
    clock = Gpu(probes.flush, torch.cuda) if args.device == "cuda" else Cpu()
    result["limits"] = machine.limits(probes, args.dtypes, clock)
    print(report.heading(result), flush=True)
    measure_table(args, adapters, probes, clock, result)

    # The speed of the machine changes while the table is measured: the limit is the better of two measurements.
    before, after = result["limits"], machine.limits(probes, args.dtypes, clock)
    result |= {"limits_before": before, "limits_after": after, "limits": {k: max(before[k], after[k]) for k in before}}
    for row in result["rows"]:
        set_limit(row, result["limits"])
    print("\n" + report.limits(after, "limits at the end"))

    if "memory" in args.operations and not args.quick:
        for row in memory.measure():
            result["memory"].append(row)
            print(report.memory_line(row), flush=True)
    if "optimizer" in args.operations and not args.quick:
        measure_optimizer(result, args.device)
    if "step" in args.operations and not args.quick:
        measure_steps(result)
    result["load"] = others.shares()
    print("\n" + report.load_line(result["load"]))
    if args.targets:
        print("\n" + report.targets(result))
    if args.output is not None:
        path = Path(args.output) if args.output else report.path_of("products", result["machine"])
        report.write(path, json.dumps(result, indent=1))
        print(f"\nwrote {path}, {report.write_report(result, path)}")
    return len(result["wrong"])


if __name__ == "__main__":
    sys.exit(main())
