"""Show the figures of the benchmarks as text, and write them as reports.

    python bench/report.py      writes the report of each machine's products again, from results/<machine>/figures.json

A program's report is a page of Markdown in the folder of the machine. The figures that a table of README.md or docs/ is
made of, those of run.py and account.py, are in one file, figures.json: {program: {what: figures}}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import machine
import timing
from cases import OURS, STEPS, Case, Row
from summary import LINES, MORE_LINES, summary
from tables import table

RESULTS = Path(__file__).parent / "results"
DIGITS = 5  # of a figure in figures.json

# {contestant: head of its column}, in the order of the table.
PEERS = {
    "torch dense": "dense",
    "bitsandbytes": "bnb",
    "bitsandbytes packed": "bnb packed",
    "torchao": "torchao",
    "decode, then dense": "decoded",
    "without LoRA": "no LoRA",
    "in NF4": "NF4",
    "PEFT unfused": "PEFT",
}
NOISY = 0.02  # if other programs used more of the processors, the figures are not to be trusted


def heading(result: dict) -> str:
    """The text about the machine and its limits."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    what = f"{machine.cpu_name(m)}, {m['threads']} of {m['cpus']} cpus; "
    what += f"qlora_native runs {m['isa']}, torch {m['torch_isa']}"
    if "gpu" in m:
        what = f"{m['gpu']}, {m['processors']} processors, L2 {m['l2_bytes'] / 2**20:.0f} MB; torch's CUDA {m['cuda']}"
    lines = [
        what,
        versions,
        limits(result["limits"], "limits"),
    ]
    lines += [f"{name}={value}" for name, value in m["variables"].items()]
    lines += [f"no {name}: {reason}" for name, reason in result["missing_peers"].items()]
    return "\n".join(lines)


def limits(found: dict[str, float], title: str) -> str:
    """The text about the result of machine.limits()."""
    rates = ", ".join(f"{name} {found[name] / 1e9:.0f} GFLOP/s" for name in ("bfloat16", "float32") if name in found)
    return f"{title}: read {found['read'] / 1e9:.1f} GB/s, copy {found['copy'] / 1e9:.1f} GB/s (in and out), {rates}"


def load_line(load: dict[str, float]) -> str:
    """The text about the result of machine.Others."""
    noisy = "NOT QUIET: " if load["others"] + load["stolen"] > NOISY else ""
    return f"{noisy}other programs used {load['others']:.1%} of the processors, other guests {load['stolen']:.1%}"


def line(row: Row, limits: dict[str, float], before: Row | None) -> str:
    """A row as text, below a heading unless the row before has the same shape; `limits` as of machine.limits()."""
    name, M, dtype, us, rate, limit, *peers = _cells(row, limits, list(PEERS))
    text = f"{name:<28} {M:>5} {dtype[:8]:<8} {us:>10} {rate:>16} {limit:>7} " + "".join(f"{p:>11}" for p in peers)
    if before is not None and before.shape == row.shape:
        return text
    head = f"{row.shape[0]}x{row.shape[1]:<17} {'M':>11} {'dtype':<8} {'µs':>10} {'rate':>16} {'limit':>7} "
    return f"\n{head}{''.join(f'{peer:>11}' for peer in PEERS.values())}\n{text}"


def _cells(row: Row, limits: dict[str, float], peers: list[str]) -> tuple[str, ...]:
    """A row's name, M, dtype, µs, rate in GB/s or GFLOP/s, share of the limit, and times as long as peers take."""
    us = row.us[OURS]
    bound = row.memory_bound(limits)
    rate = f"{(row.bytes if bound else row.flops) / us / 1e3:.1f} {'GB/s' if bound else 'GFLOP/s'}"
    shown = f"{us:.0f}" if us >= 100 else f"{us:.1f}"
    against = (f"{row.us[name] / us:.2f} ×" if name in row.us else "" for name in peers)
    return row.name, str(row.M or ""), row.dtype, shown, rate, f"{100 * row.limit_us(limits) / us:.0f} %", *against


def memory_line(row: dict) -> str:
    """The text about a row of memory.measure()."""
    lora = f" + LoRA r={row['rank']}" if row["rank"] else ""
    return (
        f"extra memory, {row['operation']}{lora} M={row['M']} {row['shape'][0]}x{row['shape'][1]}: "
        f"{row['bytes'] / 2**20:.1f} MB (bound {row['bound'] / 2**20:.0f} MB)"
    )


def _spread(step: dict) -> str:
    """The ratios of the processes of a step, if there were several."""
    ratios = step.get("ratios", ())
    return f", {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} processes" if len(ratios) > 1 else ""


# ---- pages -----------------------------------------------------------------------------------------------------------


def products(result: dict, folder: Path) -> str:
    """The report of run.py as Markdown, with the plots that are in `folder`/products."""
    m, limits = result["machine"], result["limits"]
    title = m["gpu"] if "gpu" in m else f"{machine.cpu_name(m)}, {m['threads']} threads, {m['isa']}"
    parts = [f"# {title}", f"Measured {m['date']} by `bench/run.py`."]
    parts += ["    " + heading(result).replace("\n", "\n    "), "    " + load_line(result["load"])]
    parts += ["## Summary", SUMMARY_NOTE, summary({"": result}, [*LINES, *MORE_LINES])]
    for name, caption in PLOTS.items():
        if (folder / f"products/{name}.png").exists():
            parts += [f"![{name}](products/{name}.png)", caption]
    steps = [result[name] for name in STEPS if name in result]
    if steps:
        parts += ["## A training step", training_steps(steps)]
    if result.get("optimizer"):
        parts += ["## A step of AdamW", optimizer(result["optimizer"])]
    if result["memory"]:
        parts += ["## Extra memory of one call", "\n".join(f"- {memory_line(row)}" for row in result["memory"])]
    if result["rows"]:
        parts += ["## Every row", ROWS_NOTE]
    for shape in dict.fromkeys(row.shape for row in result["rows"]):
        rows = [row for row in result["rows"] if row.shape == shape]
        peers = [name for name in PEERS if any(name in row.us for row in rows)]
        header = ("", "M", "dtype", "µs", "rate", "limit", *(PEERS[name] for name in peers))
        parts += [f"### {shape[0]}×{shape[1]}", table(header, (_cells(row, limits, peers) for row in rows))]
    return "\n\n".join(part.rstrip("\n") for part in parts)


def optimizer(measured: list[dict]) -> str:
    """The result of optimizer.measure()."""
    rows = []
    for row in measured:
        what = f"{row['parameters'] / 1e6:.1f} M parameters in {row['tensors']} tensor{'s' * (row['tensors'] > 1)}, "
        for name, us in row["us"].items():
            limit, ratio = f"{100 * row['limit_us'] / us:.0f} %", f"{us / row['us'][OURS]:.2f} ×"
            rows.append((what + row["dtype"], name, f"{us / 1e3:.2f}", limit, ratio))
    return table(("", "", "ms", "of our 8-bit step's limit", "times ours"), rows)


def training_steps(steps: list[dict]) -> str:
    """Results of step.measure()."""
    rows = []
    for step in steps:
        for name, found in step["contestants"].items():
            ratio = f"{step['ratio']:.2f} ×{_spread(step)}" if name == OURS and step.get("ratio") else ""
            losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
            rows.append((name, f"{step['dropout']:g}", step["memory"], f"{found['seconds']:.2f}",
                         f"{found['tokens_per_s']:.0f}", ratio, losses))  # fmt: skip
    first = steps[0]
    what = f"{first['model']}, {first['tokens']} tokens, LoRA r={first['rank']} on every linear, {first['dtype']}; "
    what += "the contestants of a step alternate in a process of its own, and where it has several, these are medians "
    what += 'of theirs. Memory "kept": by an allocator that gives nothing back.'
    header = ("", "LoRA dropout", "memory", "s", "tokens/s", "times as fast", "losses")
    return what + "\n\n" + table(header, rows)


SUMMARY_NOTE = (
    "Times as fast as what ours is compared with, or what a cell says. A range goes over shapes, and over the rows of "
    "X that its line names; its worst figure stands first."
)
ROWS_NOTE = (
    "Median µs of qlora_native; its rate; its share of the machine's limit (all threads); and how many times as long "
    "each peer takes. Weights are cold, the contestants alternate in one process."
)
# {plot of a page of run.py, which plots.py draws: its caption}.
PLOTS = {
    "speed": "Rate of the product with a 4096×4096 weight against the rows of activations, bf16, cold weights; the "
    "dotted line is the machine's limit for 4-bit weights. Higher is better.",
    "roofline": "Every product without an adapter at its arithmetic intensity (operations over the bytes of the weight "
    "in the form that the contestant keeps) under the machine's memory bandwidth and matrix rate, both measured "
    "in this run. The rate is that of bf16 or, if it is higher, of fp32.",
    "lora": "Time that a LoRA adapter adds to the product, against its rank: M=512, 4096×4096, bf16. Backward is that "
    "of autograd with respect to x. Lower is better.",
    "growth": "Time of a product against the width of a square weight, the rows of activations, and threads.",
}


# ---- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text.rstrip("\n") + "\n")
    os.replace(temporary, path)


def folder_of(description: dict[str, object]) -> Path:
    """The folder of a machine's reports: bench/results/<machine>."""
    return RESULTS / machine.folder_name(description)


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of a machine: {program: {what: figures}}."""
    path = folder / "figures.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for program in found.values():
        if "rows" in program:
            program["rows"] = [Row(**{**row, "shape": tuple(row["shape"])}) for row in program["rows"]]
    return found


def write_figures(folder: Path, program: str, found: dict[str, Any]) -> None:
    """Make `found` the figures of a program, with a line for each row, and DIGITS of a figure."""

    def compact(value: Any) -> str:
        if isinstance(value, Row):
            defaults = {field.name: field.default for field in dataclasses.fields(Case)}
            value = {name: each for name, each in vars(value).items() if each != defaults.get(name)}
        rounded = json.loads(json.dumps(value), parse_float=lambda text: _short(float(f"{float(text):.{DIGITS}g}")))
        return json.dumps(rounded, ensure_ascii=False, separators=(",", ":"))

    programs = []
    for name, each in (figures(folder) | {program: found}).items():
        fields = []
        for field, value in each.items():
            text = "[\n  " + ",\n  ".join(map(compact, value)) + "]" if isinstance(value, list) else compact(value)
            fields.append(f"{json.dumps(field)}: {text}")
        programs.append(f"{json.dumps(name)}: {{\n " + ",\n ".join(fields) + "}")
    write(folder / "figures.json", "{" + ",\n".join(programs) + "}")


def _short(value: float) -> float:
    return int(value) if value.is_integer() else value


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with --output, the option that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", action="store_true", help="write the report below bench/results/")
    return made


def head(description: dict[str, Any]) -> str:
    """The machine, in the first words of a page."""
    return (
        f"{machine.cpu_name(description)}, {description['isa']}, torch {description['versions']['torch']}, "
        f"{description['threads']} threads"
    )


def command_line(kind: str, description: str, measure: Callable[..., list[dict]], lines: Callable[[dict], str]) -> None:
    """The program of a benchmark that has no argument but --output: it measures, and prints its page.

    `measure` gets the clock and the probe of timing.Cpu.alternate().
    """
    args = parser(description).parse_args()
    torch.manual_seed(0)
    found = {"machine": machine.describe(), "measured": measure(timing.Cpu(), machine.Probes().read)}
    if args.output:
        write(folder_of(found["machine"]) / f"{kind}.md", lines(found))
    print(lines(found))


def write_products(folder: Path) -> None:
    """Write the report of a machine's products from its figures, if there are some."""
    if result := figures(folder).get("products"):
        write(folder / "products.md", products(result, folder))


def main() -> None:
    """The command line."""
    for path in sorted(RESULTS.glob("*/figures.json")):
        write_products(path.parent)


if __name__ == "__main__":
    main()
