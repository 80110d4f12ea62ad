"""Measure which kernel of the CUDA backend takes the least time for a product, for the chooser to read.

    python bench/tune_cuda.py            for eight minutes at most; start it again until all of the grid is measured
    python bench/tune_cuda.py --output   the same, and then write the rows of this device into cuda/product/measured.inc
    QLN_BACKEND=cuda_emulated python bench/tune_cuda.py --shapes 128x128 --m 4 16 --ranks 0 --dtypes bfloat16
                                         the same over the emulator, whose times say nothing

A product of the grid is computed by every kernel that supports it (QLN_FORCE_KERNEL). Each result is checked, and then
the kernels are timed alternately (timing.py). A line of JSON for each product goes into a file as soon as it is known,
so that an interrupted run loses one product. A kernel during which the process ended twice is left out from then on.

The exit status is 0 if all of the grid is measured, 75 if the time was up before, and 1 if a kernel was wrong or ended
the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import machine
from cases import DOWN, LARGE_SQUARE, OURS, SQUARE, UP, Case
from checks import WrongResult
from contest import Weights, contestants
from run import shape_of
from timing import Cpu, Gpu

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "cuda/product/measured.inc"
# A row decides for shapes of up to twice and half its sizes (cuda/product/measured.h).
SHAPES = (SQUARE, UP, DOWN, (1024, 4096), (2048, 2048), LARGE_SQUARE)
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RANKS = (0, 16)
DTYPES = {"bfloat16": "bf16", "float32": "f32"}  # float16 has the kernels of bfloat16
DIRECTIONS = ("forward", "dx")
WGMMA = [f"wgmma:{rows},{pairs}" for rows in (16, 32, 64, 128, 256) for pairs in ("alone", "pairs")]
KERNELS = ("general", "gemv", "gemm", "panels", *WGMMA)
TIMING = "timing of all kernels"  # in place of a kernel that is being checked
BUDGET_S = 0.05  # of each kernel of a product
HANGS_S = 240  # no product takes so long, so one that does will not end
MAX_ENDS = 2
INCOMPLETE = 75  # EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True)
class Product:
    """A point of the grid: Y (forward) or dX (dx) of x with M rows and a weight [N, K]."""

    direction: str
    dtype: str
    rank: int
    M: int
    N: int
    K: int

    def case(self) -> Case:
        """The same as a case of the benchmarks."""
        return Case(operation=self.direction, shape=(self.N, self.K), M=self.M, dtype=self.dtype, rank=self.rank)


def grid(args: argparse.Namespace) -> list[Product]:
    """All products that the command line asks for; those of a weight follow each other."""
    points = itertools.product(args.shapes, args.dtypes, args.ranks, DIRECTIONS, args.m)
    return [Product(direction, dtype, rank, M, N, K) for (N, K), dtype, rank, direction, M in points]


class Progress:
    """The file of what is known so far, with a line of JSON for each event.

    Events are the start of a run, the beginning of a kernel's check, and the times of a product.

    Attributes:
        measured: {product: {"us": {kernel: microseconds}, "wrong": {kernel: the reason}}}.
    """

    def __init__(self, path: Path) -> None:
        """Read what earlier runs have written, and begin one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.measured: dict[Product, dict[str, dict[str, Any]]] = {}
        self._ends: Counter[tuple[Product, str]] = Counter()
        written = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        begun = None
        for event in (*written, {"run": "this one"}):
            if "run" in event:
                self._ends[begun] += 1  # the run before ended while this was going on
                begun = None
                continue
            product = Product(**event["product"])
            begun = (product, event["kernel"]) if "kernel" in event else None
            if "us" in event:
                self.measured[product] = {"us": event["us"], "wrong": event["wrong"]}
        self._file = path.open("a")
        self._write({"run": time.strftime("%Y-%m-%d %H:%M:%S")})

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def begin(self, product: Product, kernel: str) -> None:
        """A kernel begins; if the process ends now, it was the kernel's fault."""
        self._write({"product": asdict(product), "kernel": kernel})

    def ends_the_process(self, product: Product, kernel: str) -> bool:
        """Whether so many runs have ended in this kernel that it is not tried again."""
        return self._ends[product, kernel] >= MAX_ENDS

    def finish(self, product: Product, us: dict[str, float], wrong: dict[str, str]) -> None:
        """A product is measured."""
        self.measured[product] = {"us": us, "wrong": wrong}
        self._write({"product": asdict(product), "us": us, "wrong": wrong})


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables of the environment, which the library reads at each product."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def chosen_kernel(call: Callable[[int], object]) -> str:
    """The name of the kernel that computes a product: the library falls back to another where it must."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as printed, environment(QLN_PRINT_CONFIG="1"):
        os.dup2(printed.fileno(), 2)
        try:
            call(0)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        printed.seek(0)
        return re.search(r" SMs: (\w+)", printed.read().decode())[1]


def measure(product: Product, weights: Weights, clock: Cpu | Gpu, probe: Callable, progress: Progress) -> None:
    """Check and time every kernel that supports a product."""
    calls: dict[str, Callable[[int], object]] = {}
    wrong = {}

    def forced(kernel: str, call: Callable[[int], object]) -> Callable[[int], object]:
        def function(i: int) -> object:
            with environment(QLN_FORCE_KERNEL=kernel):
                return call(i)

        return function

    for kernel in KERNELS:
        if progress.ends_the_process(product, kernel):
            wrong[kernel] = f"the process ended {MAX_ENDS} times"
            continue
        progress.begin(product, kernel)
        try:
            with environment(QLN_FORCE_KERNEL=kernel):
                torch.manual_seed(0)
                call = contestants(product.case(), weights, ())[OURS]
                if chosen_kernel(call) == kernel.partition(":")[0]:
                    calls[kernel] = forced(kernel, call)
        except WrongResult as error:
            wrong[kernel] = str(error)
    us: dict[str, float] = {}
    if progress.ends_the_process(product, TIMING):
        wrong[TIMING] = f"the process ended {MAX_ENDS} times"
    else:
        progress.begin(product, TIMING)
        times, _ = clock.alternate(calls, probe, BUDGET_S * len(calls))
        us = {kernel: round(1e6 * each.median, 3) for kernel, each in times.items()}
    progress.finish(product, us, wrong)


def line(product: Product, us: dict[str, float], wrong: dict[str, str]) -> str:
    """A product for people, the fastest kernel first."""
    what = f"{product.direction} {product.dtype} M={product.M} {product.N}x{product.K} r={product.rank}"
    kernels = [f"{kernel} {us[kernel]:.1f}" for kernel in sorted(us, key=us.__getitem__)]
    faults = [f"WRONG {kernel}: {reason}" for kernel, reason in wrong.items()]
    return f"{what}: {', '.join(kernels + faults)}"


def rows(capability: int, measured: dict[Product, dict[str, dict[str, Any]]]) -> list[str]:
    """The rows of measured.inc: the fastest kernel of each product."""
    found = []
    for product, result in measured.items():
        if us := result["us"]:
            best = min(us, key=us.__getitem__)
            shape = f"{product.rank}, {product.M}, {product.N}, {product.K}"
            kind = f"{product.direction}, {DTYPES[product.dtype]}"
            found.append(f'{{{capability}, {kind}, {shape}, "{best}", {us[best]:.2f}}},')
    return found


def with_rows(table: str, capability: int, about: str, new: Sequence[str]) -> str:
    """The text of measured.inc with the rows of a compute capability replaced; those of others stay."""
    head, parts = [], {}
    for text in table.splitlines():
        if match := re.match(r"(?:// |\{)(\d+)[:,]", text):
            parts.setdefault(int(match[1]), []).append(text)
        else:
            head.append(text)
    parts[capability] = [f"// {capability}: {about}", *new]
    return "\n".join(head + [text for _, part in sorted(parts.items()) for text in part]) + "\n"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="begin no product after so many (default: 8)")
    add("--folder", type=Path, help="of the file of what is known so far (default: build/first_day/<device>)")
    add("--shapes", nargs="+", type=shape_of, metavar="NxK", default=SHAPES)
    add("--m", nargs="+", type=int, default=MS)
    add("--ranks", nargs="+", type=int, default=RANKS)
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--output", action="store_true", help="write the rows of this device into cuda/product/measured.inc")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    args = arguments(argv)
    ends = time.monotonic() + 60 * args.minutes
    os.environ["QLN_CHECKS"] = "0"  # or else another kernel would be measured in place of one that is switched off
    kind = machine.gpu_or_emulator()
    if args.output and kind != "cuda":
        raise SystemExit("--output: expected a GPU, got the emulator, whose times say nothing")
    folder = args.folder or machine.first_day_folder(kind)
    torch.set_default_device(kind)
    torch.set_grad_enabled(False)
    progress = Progress(folder / "tune.jsonl")
    probes = machine.Probes()
    clock = Gpu(probes.flush, torch.cuda) if kind == "cuda" else Cpu()
    weights = None
    products = grid(args)
    left = [product for product in products if product not in progress.measured]
    for done, product in enumerate(left):
        if time.monotonic() > ends:
            print(f"the time is up; {len(left) - done} of {len(products)} products are left")
            return INCOMPLETE
        if weights is None or weights.shape != (product.N, product.K):
            weights = Weights((product.N, product.K))
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        measure(product, weights, clock, probes.copy, progress)
        faulthandler.cancel_dump_traceback_later()
        print(line(product, **progress.measured[product]), flush=True)
    measured = {product: progress.measured[product] for product in products}
    wrong = [line(product, {}, result["wrong"]) for product, result in measured.items() if result["wrong"]]
    print(f"{len(products)} products are measured, {len(wrong)} with faults", *wrong, sep="\n")
    if args.output:
        card = torch.cuda.get_device_properties()
        about = f"{card.name}, CUDA {torch.version.cuda}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        capability = 10 * card.major + card.minor
        TABLE.write_text(with_rows(TABLE.read_text(), capability, about, rows(capability, progress.measured)))
        print(f"wrote {TABLE.relative_to(ROOT)}; build again, and the chooser reads it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
