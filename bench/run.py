"""Measure speed against torch's dense product, bitsandbytes and the machine's limits, all in the same process.

    python bench/run.py                              the whole table, in about twelve minutes on two cores
    python bench/run.py --quick                      some cases, in seconds
    python bench/run.py --output                     also a page with plots, and figures.json, below bench/results/
    python bench/run.py --operations forward dx --shapes 4096x14336 --m 1 512 --dtypes bfloat16
    python bench/run.py --isa avx2 --dtypes float32  both sides held to AVX2
    python bench/run.py --operations forward dx --peers torch_dense decoded
                                                     whether a product is ever slower than decoding W for torch's
    python bench/run.py --busy                       beside a process that multiplies on as many threads
    python bench/run.py --operations step optimizer  a training step of SmolLM2 (step.py), and a step of AdamW alone
    python bench/run.py --device cuda --output       a GPU, in its own table

A row has the microseconds; GB/s if memory is the limit, else GFLOP/s; the share of the limit, which is the longer of
bytes / bandwidth and operations / matrix rate (for bf16 at least that of fp32); and how many times as long each
peer takes. timing.py describes how a figure is measured, and cases.py what is compared. Do not use the machine while
it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
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
    add("--shapes", nargs="+", type=shape_of, metavar="NxK")
    add("--m", nargs="+", type=int, help="rows of activations to keep (default: all)")
    add("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    add("--peers", nargs="*", metavar="PEER", help="names in peers.PEERS (default: all that the device has)")
    add("--quick", action="store_true", help="4096x4096, few cases, short")
    add("--budget", type=float, metavar="SECONDS", help="a case, shared by its contestants (default: 1; quick: 0.3)")
    add("--isa", help="hold qlora_native to this instruction set (QLN_FORCE_ISA), and torch too if it is avx2")
    add("--threads", type=int, help="OMP_NUM_THREADS")
    add("--output", action="store_true", help="write the report below bench/results/")
    add("--busy", action="store_true", help="beside a process that multiplies dense matrices on all threads")
    args = parser.parse_args(argv)
    if args.output and (args.m or args.quick or args.busy):
        parser.error("--output: expected the whole table of a quiet machine, got --m, --quick or --busy")
    args.operations = args.operations or list(OPERATIONS[args.device])
    if missing := set(args.operations) - set(OPERATIONS[args.device]):
        parser.error(
            f"--operations: expected of {', '.join(OPERATIONS[args.device])}, got {', '.join(sorted(missing))}"
        )
    args.shapes = [data.SQUARE] if args.quick else args.shapes or list(data.SHAPES[args.device])
    args.budget = args.budget or (0.3 if args.quick else 1.0)
    return args


def shape_of(text: str) -> tuple[int, int]:
    """The shape of a weight, (N, K), from the text NxK."""
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


def measure_table(args: argparse.Namespace, peers: Sequence, probes: Any, clock: Any, result: dict) -> None:
    """Measure every selected case, printing rows as they come, into result["rows"] and result["wrong"]."""
    import torch

    from checks import WrongResult
    from contest import Weights, contestants
    from report import line
    from timing import set_allocator

    threads = torch.get_num_threads()
    before = None
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
                    found = contestants(case, weights, peers)
                except WrongResult as error:
                    result["wrong"].append(f"{case.name} M={case.M} {case.dtype} {shape[0]}x{shape[1]}: {error}")
                    print(f"WRONG RESULT: {result['wrong'][-1]}", flush=True)
                    continue
                # On a GPU the limit is always that of a copy, because sum() does not read at full speed.
                copying = case.operation in ("quantize", "dequantize") or args.device == "cuda"
                set_allocator(timed)
                times, probe = clock.alternate(found, probes.copy if copying else probes.read, args.budget)
                set_allocator(setup)
                us = {name: 1e6 * each.median for name, each in times.items()}
                gb_per_s = probes.nbytes * (2 if copying else 1) / probe.median / 1e9
                result["rows"].append(data.Row(**dataclasses.asdict(case), us=us, gb_per_s=gb_per_s))
                print(line(result["rows"][-1], result["limits"], before), flush=True)
                before = result["rows"][-1]
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
    from report import training_steps

    for name, arguments in data.STEPS.items():
        measure_alone(result, name, partial(step.measure_alone, **arguments), lambda found: training_steps([found]))


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that multiplies dense matrices on all threads meanwhile."""
    code = "import torch; a = torch.randn(1024, 1024); print('begins', flush=True)\nwhile True: a @ a"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if a result was wrong or the device is missing, else 0."""
    args = arguments(argv)
    set_environment(args)
    import machine
    import plots
    import report

    if args.device == "cuda" and (reason := machine.gpu_missing()):
        print(f"--device cuda: {reason}", file=sys.stderr)
        return 1
    result = measured(args)
    wrong = result.pop("wrong")
    if args.output:
        folder = report.folder_of(result["machine"])
        report.write_figures(folder, "products", result)
        plots.draw(result, folder / "products")
        report.write_products(folder)
        print(f"\nwrote {folder}/products.md")
    return 1 if wrong else 0


def rows(*argv: str) -> list[dict[str, Any]]:
    """Measure as this command line says, for another program (timing.in_own_process). Returns the rows as dicts.

    Raises:
        RuntimeError: a result was wrong.
    """
    args = arguments(argv)
    set_environment(args)
    result = measured(args)
    if result["wrong"]:
        raise RuntimeError("; ".join(result["wrong"]))
    return [dataclasses.asdict(row) for row in result["rows"]]


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line selects, and print it. Returns the figures, and what was wrong."""
    import torch

    import machine
    import report
    from peers import DEFAULT, load
    from timing import Cpu, Gpu, set_allocator

    if args.device == "cuda":
        torch.set_default_device("cuda")
    torch.set_grad_enabled(False)
    peers, missing = load(DEFAULT[args.device] if args.peers is None else args.peers)
    result: dict = {"machine": machine.describe(), "missing_peers": missing, "rows": [], "memory": [], "wrong": []}
    set_allocator("setup")
    others = machine.Others()
    probes = machine.Probes()
    clock = Gpu(probes.flush, torch.cuda) if args.device == "cuda" else Cpu()
    result["limits"] = machine.limits(probes, args.dtypes, clock)
    print(report.heading(result), flush=True)
    with busy_process() if args.busy else nullcontext():
        measure_all(args, peers, probes, clock, result)
    result["load"] = others.shares()
    print("\n" + report.load_line(result["load"]))
    return result


def measure_all(args: argparse.Namespace, peers: Sequence, probes: Any, clock: Any, result: dict) -> None:
    """Measure and print all that the command line selects, into `result`."""
    import machine
    import memory
    import optimizer
    import report
    from timing import in_own_process

    measure_table(args, peers, probes, clock, result)
    # The speed of the machine changes while the table is measured: the limit is the better of two measurements.
    before, after = result["limits"], machine.limits(probes, args.dtypes, clock)
    result["limits"] = {name: max(before[name], after[name]) for name in before}
    print("\n" + report.limits(after, "limits at the end"))
    if args.quick:
        return
    if "memory" in args.operations:
        for row in memory.measure():
            result["memory"].append(row)
            print(report.memory_line(row), flush=True)
    if "optimizer" in args.operations:
        measure_alone(result, "optimizer", partial(in_own_process, optimizer.measure_on, args.device), report.optimizer)
    if "step" in args.operations:
        measure_steps(result)


if __name__ == "__main__":
    sys.exit(main())
