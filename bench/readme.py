"""Write the figures of README.md and docs/numbers.md from the reports below results/.

    python bench/readme.py            prints them
    python bench/readme.py --write    writes them into the pages
    python bench/readme.py --write --finetune out/finetune/figures.json "AMD EPYC (Zen 5)"
                                      first makes the figures of this run of `make finetune` the committed ones

A column of a table is a machine, or an instruction set that it was held to. A cell is the range over the shapes
4096×4096 and 4096×14336 and over the rows of X that its line names, with the worst figure first. A line that is in no
report is left out. README.md has some of the lines, each against the fastest peer, and begins with the column that has
the worst figure.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import machine
from cases import ADAMW_ADAPTER, DOWN, LORA_RANK, OURS, SQUARE
from goals import GOALS, LARGE, LEFT_OUT, Goal, _against, _format, _values

ROOT = Path(__file__).parent.parent
FINETUNE = ROOT / "bench/results/finetune.json"
# {column: folder of its report}, in the order of the columns.
COLUMNS = {
    "Intel Xeon (Cascade Lake)": "intel-xeon-cascade-lake-2-threads-avx512",
    "AMD EPYC (Zen 4), held to AVX2": "amd-epyc-zen-4-2-threads-avx2",
    "AMD EPYC (Zen 4)": "amd-epyc-zen-4-2-threads-avx512_bf16",
}


def line(label: str, figure: str, operation: str, *Ms: int, **fields: object) -> Goal:
    """A line of a table, which is a goal without an aim."""
    return Goal(label=label, figure=figure, must=None, operation=operation, Ms=Ms or (0,), **fields)


LINES = [
    line("Y = X·Wᵀ, 1 row", "bitsandbytes_packed", "forward", 1),
    *(line(f"Y, {M} row{'s' * (M > 1)}", "torch_dense", "forward", M) for M in (1, 4, 16, 64)),
    line("Y, 256 … 2048 rows", "torch_dense", "forward", *LARGE),
    *(line(f"dX = dY·W, {M} rows", "torch_dense", "dx", M) for M in (16, 64)),
    line("dX, 256 … 2048 rows", "torch_dense", "dx", *LARGE),
    line("Y in fp32, 1 row", "torch_dense", "forward", 1, dtype="float32"),
    line("Y in fp32, 256 … 2048 rows", "torch_dense", "forward", *LARGE, dtype="float32"),
    line("dX in fp32, 256 … 2048 rows", "torch_dense", "dx", *LARGE, dtype="float32"),
    line("LoRA r=16 inside Y", "lora", "forward", 1, 16, 64, *LARGE, rank=LORA_RANK),
    line("LoRA r=16 inside dX", "lora", "dx", 16, 64, *LARGE, rank=LORA_RANK),
    line("a training step of SmolLM2, LoRA r=16", "step_dense", "step_dense"),
    line("a training step of SmolLM2, LoRA r=16", "step", "step_kept", memory="kept"),
    line("a training step of SmolLM2, LoRA r=16", "step", "step"),
    line("a step of AdamW8bit, 4.9 M in 360 tensors", "torch_fused", ADAMW_ADAPTER),
    line("quantize from bf16", "bitsandbytes", "quantize"),
    line("dequantize to bf16", "limit", "dequantize", memory="kept"),
]


# The lines of README.md. One without a figure is against the fastest peer of each case.
SHORT = [
    ("Y = X·Wᵀ, 1 row", line("", "", "forward", 1)),
    ("Y, 16 rows", line("", "", "forward", 16)),
    ("Y, 256 … 2048 rows", line("", "", "forward", *LARGE)),
    ("dX = dY·W, 16 rows", line("", "", "dx", 16)),
    ("dX, 256 … 2048 rows", line("", "", "dx", *LARGE)),
    ("Y in fp32, 256 … 2048 rows", line("", "", "forward", *LARGE, dtype="float32")),
    ("a training step of SmolLM2-135M, LoRA r=16", line("", "step", "step_kept", memory="kept")),
    ("a step of 8-bit AdamW, 4.9 M parameters", line("", "torch_fused", ADAMW_ADAPTER)),
]
SHORT_COLUMNS = ("Intel Xeon (Cascade Lake)", "AMD EPYC (Zen 4)")


def report(column: str) -> dict:
    """The report behind a column."""
    return json.loads((ROOT / "bench/results" / COLUMNS[column] / "products.json").read_text())


def against_fastest(goal: Goal, result: dict) -> list[float]:
    """How many times as fast as the fastest peer ours is: a ratio for each case of a line, ascending."""
    if goal.figure:
        return sorted(_values(goal, result, SQUARE, SQUARE))
    ratios = []
    for row in result["rows"]:
        plain = row["via"] == "function" and not row["dropout"] and not row["threads"] and not row["rank"]
        plain = plain and row["memory"] == goal.memory and row.get("format", "nf4") == "nf4"
        wanted = row["operation"] == goal.operation and row["dtype"] == goal.dtype and row["M"] in goal.Ms
        if plain and wanted and tuple(row["shape"]) in (SQUARE, DOWN):
            peers = [found["us"] for name, found in row["times"].items() if name != OURS]
            ratios.append(min(peers) / row["times"][OURS]["us"])
    return sorted(ratios)


def short_table() -> str:
    """The table of README.md in Markdown."""
    columns = {name: [against_fastest(goal, report(name)) for _, goal in SHORT] for name in SHORT_COLUMNS}
    worst_first = sorted(columns, key=lambda name: min(values[0] for values in columns[name] if values))
    rows = [["times as fast as the fastest peer", *worst_first], ["---"] * (1 + len(worst_first))]
    for number, (label, goal) in enumerate(SHORT):
        values = [columns[name][number] for name in worst_first]
        rows.append([label, *(_range([_format(goal, value) for value in each]) for each in values)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _range(shown: list[str]) -> str:
    """The range of sorted figures."""
    return " … ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else LEFT_OUT


def cells(goal: Goal) -> Iterator[str]:
    """The cells of a line, one for each report."""
    special = {other.isa for other in GOALS if other.isa}
    for result in map(report, COLUMNS):
        isa = result["machine"]["isa"]
        wanted = replace(goal, isa=isa if isa in special else None)
        values = sorted(v for shape in (SQUARE, DOWN) for v in _values(wanted, result, shape, SQUARE))
        if goal.figure == "lora":
            values.reverse()
        shown = [_format(goal, value) for value in values]
        yield _range(shown)


def table() -> str:
    """The table of docs/numbers.md in Markdown."""
    rows = [["", "against", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    lines = [[goal.label, _against(goal), *cells(goal)] for goal in LINES]
    rows += [cells for cells in lines if set(cells[2:]) != {LEFT_OUT}]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def accounts() -> Iterator[tuple[str, str, dict, dict]]:
    """(machine, model, our step, the step of bitsandbytes + PEFT) of each report of account.py."""
    for path in sorted(ROOT.glob("bench/results/*/account.json")):
        found = json.loads(path.read_text())
        steps = {(step["model"], step["contestant"]): step for step in found["measured"]}
        for (model, contestant), step in steps.items():
            if contestant == OURS:
                yield machine.cpu_name(found["machine"]), model, step, steps[model, "bitsandbytes + PEFT"]


def memory_of_step() -> str:
    """The memory of a training step as a sentence of README.md."""
    of_smollm2 = [(ours, peer) for _, model, ours, peer in accounts() if model == "SmolLM2-135M"]
    ours, peers = ([step["peak_bytes"] / 1e6 for step in steps] for steps in zip(*of_smollm2, strict=True))
    text = (
        f"Beside the model, a training step of SmolLM2-135M over {of_smollm2[0][0]['tokens']} tokens takes up to "
        f"{max(ours):.0f} MB of memory, where bitsandbytes + PEFT takes {min(peers):,.0f} MB."
    )
    return textwrap.fill(text, 120) + "\n"


def account_table() -> str:
    """The table of training steps of docs/numbers.md in Markdown."""
    rows = [["", "machine", "s, bitsandbytes + PEFT", "s, ours", "memory, bitsandbytes + PEFT", "memory, ours"]]
    rows.append(["---"] * len(rows[0]))
    for name, model, ours, peer in accounts():
        cells = [f"{step['seconds']:.2f}" for step in (peer, ours)]
        cells[1] += f" ({peer['seconds'] / ours['seconds']:.2f} ×)"
        megabytes = [f"{step['peak_bytes'] / 1e6:,.0f} MB" for step in (peer, ours)]
        megabytes[1] += f" ({ours['peak_bytes'] / peer['peak_bytes']:.2f} of it)"
        rows.append([f"{model}, {ours['tokens']} tokens", name, *cells, *megabytes])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def finetune_run() -> str:
    """The committed run of `make finetune` as a sentence of docs/numbers.md."""
    run = json.loads(FINETUNE.read_text())
    loss, arguments, (before, after) = run["held_out_loss"], run["arguments"], run["base_weight_bytes"].values()
    minutes, seconds = divmod(round(run["seconds"]), 60)
    text = (
        f"Once all was installed, `make finetune` took {minutes} min {seconds} s on an {run['machine']}: "
        f"{arguments['steps']} steps of {arguments['batch_size']} pairs at {run['tokens_per_second']:.0f} tokens/s. "
        f"The held-out loss fell from {loss['before']:.3f} to {loss['after']:.3f}, and was {loss['reloaded']:.3f} "
        f"after the adapter was reloaded. The base weights shrank from {before / 1e6:.0f} MB to {after / 1e6:.0f} MB "
        "([its figures](../bench/results/finetune.json))."
    )
    return textwrap.fill(text, 120) + "\n"


# {page: {the name in the marks around a part: the function that makes it}}.
PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"": short_table, " memory": memory_of_step},
    ROOT / "docs/numbers.md": {"": table, " account": account_table, " finetune": finetune_run},
}


def written(path: Path) -> str:
    """The text of a page with its parts made anew."""
    page = path.read_text()
    for name, make in PARTS[path].items():
        begin, end = f"<!-- bench/readme.py{name} begins -->\n", f"<!-- bench/readme.py{name} ends -->\n"
        before, rest = page.split(begin)
        page = before + begin + make() + end + rest.split(end)[1]
    return page


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md and docs/numbers.md")
    parser.add_argument("--finetune", nargs=2, metavar=("FIGURES", "MACHINE"), help="figures.json of a new run")
    args = parser.parse_args()
    if args.finetune:
        figures, name = args.finetune
        run = {**json.loads(Path(figures).read_text()), "machine": name}
        run["arguments"]["model"] = Path(run["arguments"]["model"]).name  # not where it lay on that machine
        FINETUNE.write_text(json.dumps(run, indent=2) + "\n")
    for path, parts in PARTS.items():
        if args.write:
            path.write_text(written(path))
        else:
            print("\n".join(make() for make in parts.values()))


if __name__ == "__main__":
    main()
