"""Write the figures of README.md, docs/numbers.md and docs/quality.md from bench/results/.

    python bench/readme.py            prints them
    python bench/readme.py --write    writes them into the pages
    python bench/readme.py --write --finetune out/finetune/figures.json "AMD EPYC (Zen 4)"
                                      first makes the figures of this run of `make finetune` the machine's

A column of a table is a machine; summary.py has the lines. README.md has some of them, each against the fastest peer,
and begins with the column that has the worst figure.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import file_pages
import generate_pages
import machine
import report
from cases import OURS
from summary import SHORT, cell, summary, values
from tables import table, with_part

ROOT = Path(__file__).parent.parent
FINETUNE = "finetune.json"  # in the folder of the machine
FINETUNE_FIELDS = ("arguments", "held_out_loss", "base_weight_bytes", "tokens_per_second", "seconds")
# {column: folder of its report}, in the order of the columns.
COLUMNS = {
    "Intel Xeon (Emerald Rapids)": "intel-xeon-emerald-rapids-2-threads-amx_bf16",
    "Intel Xeon (Ice Lake)": "intel-xeon-ice-lake-2-threads-avx512",
    "Intel Xeon (Cascade Lake)": "intel-xeon-cascade-lake-2-threads-avx512",
    "AMD EPYC (Zen 4), AVX2 alone": "amd-epyc-zen-4-2-threads-avx2",
    "AMD EPYC (Zen 4)": "amd-epyc-zen-4-2-threads-avx512_bf16",
    "AMD EPYC (Zen 5)": "amd-epyc-zen-5-2-threads-avx512_bf16",
}


def columns(*names: str) -> dict[str, dict]:
    """{column: report}."""
    return {name: report.figures(report.RESULTS / COLUMNS[name])["products"] for name in names}


def short_table() -> str:
    """The table of README.md in Markdown, over the columns whose reports have bf16."""
    reports = {name: found for name, found in columns(*COLUMNS).items() if "bfloat16" in found["limits"]}
    worst_first = sorted(reports, key=lambda name: min(min(values(line, reports[name]), default=99) for line in SHORT))
    rows = [(line.label, *(cell(line, reports[name]) for name in worst_first)) for line in SHORT]
    return table(("times as fast as the fastest peer", *worst_first), rows)


def accounts() -> Iterator[tuple[str, str, dict, dict]]:
    """(machine, model, our step, the step of bitsandbytes + PEFT) of each report of account.py."""
    for path in sorted(report.RESULTS.glob("*/figures.json")):
        if not (found := report.figures(path.parent).get("account")):
            continue
        steps = {(step["model"], step["contestant"]): step for step in found["measured"]}
        for (model, contestant), step in steps.items():
            if contestant == OURS:
                yield machine.cpu_name(found["machine"]), model, step, steps[model, "bitsandbytes + PEFT"]


def memory_of_step() -> str:
    """The memory of a training step as a sentence of README.md."""
    of_smollm2 = [(name, ours, peer) for name, model, ours, peer in accounts() if model == "SmolLM2-135M"]
    names, steps, of_peers = zip(*of_smollm2, strict=True)
    ours, peers = ([step["peak_bytes"] / 1e6 for step in each] for each in (steps, of_peers))
    text = (
        f"Beside the model, a training step of SmolLM2-135M over {steps[0]['tokens']} tokens takes up to "
        f"{max(ours):.0f} MB of memory on {', '.join(names[:-1])} and {names[-1]}, where bitsandbytes + PEFT takes "
        f"at least {min(peers):,.0f} MB."
    )
    return textwrap.fill(text, 120) + "\n"


def account_table() -> str:
    """The table of training steps of docs/numbers.md in Markdown."""
    header = ("", "machine", "s, bitsandbytes + PEFT", "s, ours", "memory, bitsandbytes + PEFT", "memory, ours")
    rows = []
    for name, model, ours, peer in accounts():
        cells = [f"{step['seconds']:.2f}" for step in (peer, ours)]
        cells[1] += f" ({peer['seconds'] / ours['seconds']:.2f} ×)"
        megabytes = [f"{step['peak_bytes'] / 1e6:,.0f} MB" for step in (peer, ours)]
        megabytes[1] += f" ({ours['peak_bytes'] / peer['peak_bytes']:.2f} of it)"
        rows.append([f"{model}, {ours['tokens']} tokens", name, *cells, *megabytes])
    return table(header, rows)


def of_each_machine(program: str, numbers: Callable[[dict], str]) -> str:
    """The figures of a program of each machine, for docs/numbers.md."""
    found = [report.figures(path.parent).get(program) for path in sorted(report.RESULTS.glob("*/figures.json"))]
    return "\n".join(numbers(each) for each in found if each) or "No machine's report has these figures yet.\n"


def finetune_runs() -> str:
    """The committed runs of `make finetune` as a table of docs/numbers.md, with the slowest first."""
    paths = [(name, report.RESULTS / folder / FINETUNE) for name, folder in COLUMNS.items()]
    runs = [(name, json.loads(path.read_text())) for name, path in paths if path.exists()]
    rows = []
    for name, run in sorted(runs, key=lambda each: -each[1]["seconds"]):
        arguments, (before, after) = run["arguments"], (size / 1e6 for size in run["base_weight_bytes"].values())
        minutes, seconds = divmod(round(run["seconds"]), 60)
        rows.append((
            name, f"{arguments['steps']} of {arguments['batch_size']} pairs", f"{minutes} min {seconds} s",
            f"{run['tokens_per_second']:.0f}", *(f"{loss:.3f}" for loss in run["held_out_loss"].values()),
            f"{before:.0f} MB → {after:.0f} MB",
        ))  # fmt: skip
    loss = ("held-out loss before", "after", "after the adapter is reloaded")
    return table(("", "steps", "in all", "tokens/s in training", *loss, "base weights"), rows)


def calibration_report() -> str:
    """The report of quality/calibration.py, for docs/quality.md."""
    return (report.RESULTS / "quality-calibration.md").read_text().replace("](", "](../bench/results/")


def fidelity() -> str:
    """What calibration gives back, as a sentence of README.md: the farthest kind of text stands first."""
    first_table = calibration_report().split("\n\n")[1]
    rows = {line.split("|")[1].strip(): line for line in first_table.split("\n")}
    left = re.findall(r"\((\d+%)\)", rows["nf4, calibrated"])
    kinds = re.findall(r"before: ([\w ]+?) (?:\(|\|)", rows["linears in"])
    parts = [f"{part} on text of {kind}" for part, kind in zip(left, kinds, strict=False)]
    text = (
        "[Calibration](docs/quality.md) chooses codes and scales by a model's own text, in the same bytes. A model "
        "in NF4 has a higher loss than in 16 bits; of the difference, calibrated SmolLM2-135M keeps "
        f"{', '.join(parts[:-1])} and {parts[-1]} before training, and {left[-1]} after it."
    )
    return textwrap.fill(text, 120) + "\n"


# {page: {the name in the marks around a part: the function that makes it}}.
PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"": short_table, " memory": memory_of_step, " fidelity": fidelity},
    ROOT / "docs/quality.md": {" calibration": calibration_report},
    ROOT / "docs/numbers.md": {
        "": lambda: summary(columns(*COLUMNS)),
        " account": account_table,
        " files": lambda: of_each_machine("files", file_pages.numbers),
        " generate": lambda: of_each_machine("generate", generate_pages.numbers),
        " finetune": finetune_runs,
    },
}


def written(path: Path) -> str:
    """The text of a page with its parts made anew."""
    page = path.read_text()
    for name, make in PARTS[path].items():
        page = with_part(page, f"bench/readme.py{name}", make())
    return page


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md and the pages of docs/")
    parser.add_argument("--finetune", nargs=2, metavar=("FIGURES", "MACHINE"), help="figures.json of a new run")
    args = parser.parse_args()
    if args.finetune:
        figures, name = args.finetune
        if name not in COLUMNS:
            parser.error(f"--finetune: expected a machine of {', '.join(COLUMNS)}, got {name}")
        run = json.loads(Path(figures).read_text())
        run = {field: run[field] for field in FINETUNE_FIELDS}
        run["arguments"]["model"] = Path(run["arguments"]["model"]).name  # not where it lay on that machine
        text = "{" + ",\n ".join(f"{json.dumps(field)}: {json.dumps(each)}" for field, each in run.items()) + "}"
        report.write(report.RESULTS / COLUMNS[name] / FINETUNE, text)
    for path, parts in PARTS.items():
        if args.write:
            path.write_text(written(path))
        else:
            print("\n".join(make() for make in parts.values()))


if __name__ == "__main__":
    main()
