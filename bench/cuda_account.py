"""The account of a product on an H100 and an H200: the time of each way by cuda_model.py, and the way of config.cpp.

`make sass ARGS=--output` writes results/product-choices.txt, which tests/cpp/test_product_choices.cpp prints and
guards, and results/cuda-account.md. `make sass ARGS=--check` and tests/test_sass.py fail where that page is not what
the choices and results/sass.json give.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cuda_model
import sm100
from cuda_model import H100, H200, Model, Panels, Product, Runs
from cycles import markdown

RESULTS = Path(__file__).parent / "results"
CHOICES, PAGE = RESULTS / "product-choices.txt", RESULTS / "cuda-account.md"
ROWS = tuple(16 << i for i in range(10))
WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # [N, K]
DIRECTIONS = ("forward", "dX")
DEVICES = (H100, H200)
RANK = 16
WGMMA_ROWS = (16, 32, 64, 128, 256)
# By how much another way must win to be marked, and to be listed: the model is no better.
SOME, CLEAR = 0.05, 0.10


class Choice(NamedTuple):
    """What config.cpp answers: the way, and the numbers of its config."""

    way: str
    numbers: dict[str, int]

    def runs(self) -> Runs:
        """Of a way whose blocks have runs."""
        return Runs(self.way, **self.numbers)


Choices = Mapping[tuple[Product, str], Choice]


def read_choices(text: str) -> Choices:
    """{(product without rank, what was asked): the answer}, from results/product-choices.txt."""
    found = {}
    for line in text.splitlines():
        direction, rows, cols, inner, asked, way, *numbers = line.split()
        pairs = (pair.split("=") for pair in numbers)
        product = Product(direction, int(rows), int(cols), int(inner))
        found[product, asked] = Choice(way, {name: int(number) for name, number in pairs})
    return found


def products(weight: tuple[int, int]) -> Iterator[Product]:
    """The products with one weight, without and with an adapter."""
    n, k = weight
    for direction in DIRECTIONS:
        cols, inner = (k, n) if direction == "dX" else (n, k)
        for rank in (0, RANK):
            for rows in ROWS:
                yield Product(direction, rows, cols, inner, rank)


class Times(NamedTuple):
    """The seconds of a product, with its U or V, by way. Panels have those at best and at worst, or None."""

    before: float  # by mma.sync
    wgmma: dict[int, float]  # by rows of a tile
    panels: tuple[float, float] | None
    chosen: str  # mma.sync, wgmma ROWS or panels

    def by_way(self, worst: bool) -> dict[str, float]:
        """{way: seconds}, with panels at worst or at best."""
        ways = {"mma.sync": self.before, **{f"wgmma {rows}": time for rows, time in self.wgmma.items()}}
        return ways if self.panels is None else {**ways, "panels": self.panels[worst]}

    def better(self) -> tuple[str, float]:
        """The fastest way, and by which part it beats the chosen one at the chosen one's best and its own worst."""
        chosen, others = self.by_way(worst=False)[self.chosen], self.by_way(worst=True)
        way = min((way for way in others if way != self.chosen), key=others.__getitem__)
        return way, chosen / others[way] - 1


def times_of(model: Model, choices: Choices, product: Product) -> Times:
    """What each way takes."""
    alone = dataclasses.replace(product, rank=0)

    def with_low_rank(seconds: float, runs: Runs | None) -> float:
        if product.rank == 0:
            return seconds
        return seconds + model.low_rank(product, runs, **choices[alone, "low-rank"].numbers)

    chosen = choices[alone, "chosen-with-adapter" if product.rank else "chosen"]
    wgmma = {rows: choices[alone, f"wgmma-{rows}"].runs() for rows in WGMMA_ROWS}
    dense = choices[alone, "dense-with-adapter" if product.rank else "dense"]
    if chosen.way == "wgmma":
        name = f"wgmma {chosen.numbers['tile_rows']}"
    else:
        name = "panels" if chosen.way == "panels" else "mma.sync"
    by_panels = model.panels(product, Panels(**dense.numbers)) if dense.way == "panels" else None
    before = choices[alone, "mma.sync"].runs()
    return Times(
        with_low_rank(model.fused(product, before), before),
        {rows: with_low_rank(model.fused(product, runs), runs) for rows, runs in wgmma.items()},
        (with_low_rank(by_panels[0], None), with_low_rank(by_panels[1], None)) if by_panels else None,
        name,
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 100e-6 else f"{seconds * 1e6:.0f}"


def name_of(product: Product) -> str:
    return product.direction + (f", r={product.rank}" if product.rank else "")


def sharing_of(runs: Runs) -> str:
    """How blocks share tiles, in words."""
    blocks = "runs" if runs.cluster == 0 else f"clusters of {runs.cluster}" if runs.cluster > 1 else "whole tiles"
    return blocks + (", pairs" if runs.pairs else "")


def steps(models: Sequence[Model], choices: Choices) -> Iterator[Sequence[str]]:
    """The lines of the table of steps: the kernels by mma.sync and by wgmma, for one weight."""
    of_h100, of_h200 = models
    resources = ("shared memory", "issue", "ALU", "tensor", "L2", "DRAM")
    for product in products(WEIGHTS[0]):
        if product.rank:
            continue
        for asked in ("mma.sync", "wgmma"):
            runs = choices[product, asked].runs()
            cycles = of_h100.step(product, runs)
            bound = max(resources, key=cycles.__getitem__)
            used = min(product.rows, runs.tile_rows) * runs.tile_cols / 128
            dram = f"{cycles['DRAM']:.0f} … {of_h200.step(product, runs)['DRAM']:.0f}"
            yield (
                str(product.rows),
                product.direction,
                f"{runs.kernel} {runs.tile_rows} × {runs.tile_cols}",
                *(f"{cycles[resource]:.0f}" for resource in resources[:-1]),
                dram,
                bound,
                f"{cycles[bound] / used:.1f}",
                f"{runs.tiles} × {runs.steps * (2 if runs.kernel == 'thin' else 1)} over {runs.blocks}",
                sharing_of(runs),
            )


def parts(model: Model, choices: Choices) -> Iterator[Sequence[str]]:
    """The lines of the table of what takes the time, for one weight and with an adapter."""
    for product in products(WEIGHTS[0]):
        alone = dataclasses.replace(product, rank=0)
        chosen = choices[alone, "chosen-with-adapter"]
        if not product.rank:
            continue
        if chosen.way == "panels":
            chosen = choices[alone, "wgmma"]
        runs = chosen.runs()
        spent = model.parts(product, runs)
        spent["U or V"] = model.low_rank(product, runs, **choices[alone, "low-rank"].numbers)
        total = sum(spent.values())
        del spent["launches"]  # none, beside those of U or V
        tile = f"{runs.kernel} {runs.tile_rows} × {runs.tile_cols}, {sharing_of(runs)}"
        yield product.direction, str(product.rows), tile, *map(micro, spent.values()), micro(total)


def seconds(model: Model, choices: Choices, weight: tuple[int, int]) -> Iterator[Sequence[str]]:
    """The lines of the table of times for one device and weight."""
    for product in products(weight):
        times, limit = times_of(model, choices, product), product.limit(model.device)
        way, gain = times.better()
        best, worst = (times.by_way(worst)[times.chosen] for worst in (False, True))
        share = f"{limit / best:.0%}" if best == worst else f"{limit / worst:.0%} … {limit / best:.0%}"
        panels = "–" if times.panels is None else " … ".join(map(micro, times.panels))
        yield (
            name_of(product),
            str(product.rows),
            micro(limit),
            micro(times.before),
            *map(micro, times.wgmma.values()),
            panels,
            times.chosen,
            share,
            f"{way}: {gain:.0%}" if gain > SOME else "",
        )


class Loss(NamedTuple):
    """A product for which another way than the chosen one clearly wins."""

    device: str
    weight: tuple[int, int]
    product: Product
    chosen: str
    faster: str
    gain: float


def losses(models: Sequence[Model], choices: Choices) -> list[Loss]:
    """All of them."""
    found = []
    for model in models:
        for weight in WEIGHTS:
            for product in products(weight):
                times = times_of(model, choices, product)
                way, gain = times.better()
                if gain > CLEAR:
                    found.append(Loss(model.device.name, weight, product, times.chosen, way, gain))
    return found


def verdict(found: Sequence[Loss]) -> str:
    """For how many rows a rule that knows rows and direction alone should choose another way."""
    wins = collections.Counter((loss.product.direction, loss.product.rows, loss.faster) for loss in found)
    if not found:
        return "No other way wins so."
    everywhere = len(DEVICES) * len(WEIGHTS) * 2  # without and with an adapter
    always = [f"{way} for {direction} of {rows} rows" for (direction, rows, way), n in wins.items() if n == everywhere]
    if always:
        return f"For every weight and both devices, with and without an adapter: {', '.join(always)}."
    return "No way wins so for every weight, on both devices, with and without an adapter."


def page(figures: Mapping[str, Any], choices: Choices) -> str:
    """The text of results/cuda-account.md. `figures` are the kernels of results/sass.json."""
    models = [Model(figures, device) for device in DEVICES]
    text = [PREFACE]
    header = ("M", "product", "tile", "shared memory", "issue", "ALU", "tensor", "L2", "DRAM, H100 … H200", "bound by")
    text += ["## Cycles of a step, by mma.sync and by wgmma", STEPS]
    text += [markdown((*header, "cycles a row", "tiles × steps over blocks", "shared by"), steps(models, choices))]
    text += ["## What takes the time", PARTS]
    header = ("product", "M", "tile", "begin", "steps", "exchange, adapter, results", "U or V", "all")
    text += [markdown(header, parts(models[0], choices))]
    found = losses(models, choices)
    text += ["## Where another way than the chosen one wins clearly", LOSSES.format(CLEAR), verdict(found)]
    header = ("on", "W", "product", "M", "chosen", "faster", "by")
    lines = (
        (
            loss.device,
            f"{loss.weight[0]} × {loss.weight[1]}",
            name_of(loss.product),
            str(loss.product.rows),
            loss.chosen,
            loss.faster,
            f"{loss.gain:.0%}",
        )
        for loss in found
    )
    text += [markdown(header, lines)] if found else []
    text += ["## Microseconds of a product", TIMES.format(SOME)]
    header = ("product", "M", "limit", "mma.sync", *(f"wgmma {rows}" for rows in WGMMA_ROWS), "panels")
    for model in models:
        for n, k in WEIGHTS:
            text += [f"### {model.device.name}, W of {n} × {k}"]
            table = seconds(model, choices, (n, k))
            text += [markdown((*header, "chosen", "of the limit", f"faster by > {SOME:.0%}"), table)]
    return "\n\n".join([*text, sm100.section(figures)]) + "\n"


def committed_page(figures: Mapping[str, Any]) -> str:
    """The page for the committed choices."""
    return page(figures, read_choices(CHOICES.read_text()))


PREFACE = f"""# What a product takes on an H100 and an H200, by a model

**No GPU has run any of this.** `bench/cuda_model.py` computes these times from the machine code of the kernels
([sass.md](sass.md)) and from published rates, and `make sass ARGS=--output` writes the page. What the model leaves out
(bank conflicts, waits at barriers, a clock that falls, X that does not stay in L2) makes the kernels slower than this.
The dense product of panels has the rate at which cuBLAS was measured. The model cannot tell ways apart that are within
{CLEAR:.0%} of each other, least of all where M is small: what it then counts most, launches, latencies and the
exchange of sums, it knows worst, and it does not know that two blocks of a multiprocessor hide each other's waits.

W is NF4 with double quantization, and X is bf16. Both devices have 132 multiprocessors at 1.755 GHz and, for the
model, the same L2; memory has 3.35 TB/s on the H100 and 4.8 on the H200. The limit of a product is the larger of its
bytes over that bandwidth and of its operations over the tensor cores' peak, without an adapter. A kernel or memset
costs {cuda_model.LAUNCH * 1e6:.0f} µs to launch."""
STEPS = """Of one tile and 64 of the inner dimension, W of 4096 × 4096. "thin" and "gemm" multiply by mma.sync; wgmma
is as QLN_FORCE_HOPPER=1 has it. Two blocks of a multiprocessor take twice these cycles. DRAM is the whole card's,
spread over the steps of the longest run. "Cycles a row" are those of the resource that bounds, for a row of X and 128
columns of the result. With "runs" the blocks share the steps of all tiles evenly; with "clusters" the blocks of each
cluster share those of one tile, and exchange their sums through distributed shared memory. With "pairs" two blocks load
rows of X once for two tiles."""
PARTS = """Microseconds on the H100, W of 4096 × 4096, r = 16, by the kernel that config.cpp chooses where there is no
dense product. "Begin" is from a block's start to its first product. U or V takes a kernel that clears its tickets, or a
memset where the product takes tickets too, and a kernel that is launched beside the first. The kernel of the product is
launched while that one runs, and the model lets it begin when U or V is there."""
LOSSES = """All products of this page for which the best other way beats the chosen one by more than {:.0%}, if panels
take as long as they may where they are the other way, and as little where they are chosen."""
TIMES = """With U or V where r is 16. "mma.sync" is what a product took before there was wgmma; the numbers beside
"wgmma" are rows of a tile. Panels are given at best and at worst (all decoding shows); – where config.cpp does not
consider them, for up to 768 rows, and where no panel is wide enough. The last column has the best other way if it beats
the chosen one by more than {:.0%}, as above. GEMV is for up to 8 rows, and so in no line."""
