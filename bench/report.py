"""Show the figures of run.py as text, and as a report in Markdown with plots.

python bench/report.py FILE.json ...      write the Markdown and the plots of earlier runs again
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import machine
from cases import OURS, STEPS
from goals import targets

RESULTS = Path(__file__).parent / "results"

# {contestant: head of its column}, in the order of the table.
PEERS = {
    "torch dense": "dense",
    "bitsandbytes": "bnb",
    "bitsandbytes packed": "bnb packed",
    "torchao": "torchao",
    "ggml IQ4_NL": "ggml",
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


class Table:
    """Formats rows as they come, under a heading for each shape."""

    def __init__(self) -> None:
        """Start without rows."""
        self._shape: list[int] | None = None

    def line(self, row: dict) -> str:
        """One row as text, after a heading if its shape is new."""
        us = row["times"][OURS]["us"]
        memory = row["bound"] == "memory"
        rate = f"{_rate(row):8.1f} {'GB/s' if memory else 'GFLOP/s':<7}"
        peers = [f"{row['times'][n]['us'] / us:9.2f} ×" if n in row["times"] else f"{'':11}" for n in PEERS]
        text = (
            f"{row['name']:<28} {row['M'] or '':>5} {row['dtype'][:8]:<8} {_us(us):>10} {rate} "
            f"{100 * row['limit_us'] / us:5.0f} % {''.join(peers)}"
        )
        if tuple(row["shape"]) == self._shape:
            return text
        self._shape = tuple(row["shape"])
        head = (
            f"{self._shape[0]}x{self._shape[1]:<17} {'M':>11} {'dtype':<8} {'µs':>10} {'rate':>16} {'limit':>7} "
            f"{''.join(f'{head:>10}' for head in PEERS.values())}"
        )
        return f"\n{head}\n{text}"


def _us(us: float) -> str:
    """Microseconds with at least three digits, at most to tenths."""
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def _rate(row: dict) -> float:
    """The rate in GB/s if memory is the limit, else in GFLOP/s."""
    return row["bytes" if row["bound"] == "memory" else "flops"] / row["times"][OURS]["us"] / 1e3


def memory_line(row: dict) -> str:
    """The text about a row of memory.measure()."""
    lora = f" + LoRA r={row['rank']}" if row["rank"] else ""
    return (
        f"extra memory, {row['operation']}{lora} M={row['M']} {row['shape'][0]}x{row['shape'][1]}: "
        f"{row['bytes'] / 2**20:.1f} MB (bound {row['bound'] / 2**20:.0f} MB)"
    )


def step_lines(step: dict) -> str:
    """The text about the result of step.measure()."""
    lora = f"LoRA r={step['rank']}" + (f", dropout {step['dropout']}" if step["dropout"] else "")
    lora += ", kept memory" if _step_memory(step) == "kept" else ""
    lines = [f"\na training step of {step['model']}, {step['tokens']} tokens, {lora}, {step['dtype']}"]
    for name, found in step["contestants"].items():
        lines.append(
            f"  {name:<24} {found['seconds']:6.2f} s  {found['tokens_per_s']:6.0f} tokens/s  loss {found['losses']}"
        )
    if step.get("ratio"):
        lines.append(f"  {step['ratio']:.2f} x bitsandbytes + PEFT{_spread(step)}")
    return "\n".join(lines)


def _spread(step: dict) -> str:
    """The ratios of the processes of a step, if there were several."""
    ratios = step.get("ratios", ())
    return f", {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} processes" if len(ratios) > 1 else ""


def _step_memory(step: dict) -> str:
    return step.get("memory", "default")  # the first reports do not say


def optimizer_lines(row: dict) -> str:
    """The text about a row of optimizer.measure()."""
    us = row["times"][OURS]["us"]
    lines = [
        f"\na step of AdamW, {row['name']}: {row['parameters'] / 1e6:.1f} M parameters in {row['tensors']} tensors, "
        f"{row.get('dtype', 'float32')}; copy {row['bandwidth'] / 1e9:.1f} GB/s"
    ]
    for name, found in row["times"].items():
        ratio = f"{100 * row['limit_us'] / us:5.0f} % of the limit" if name == OURS else f"{found['us'] / us:7.2f} ×"
        lines.append(f"  {name:<24} {found['us'] / 1e3:9.2f} ms  {ratio}")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def path_of(kind: str, description: dict[str, object]) -> Path:
    """The path of a machine's report: bench/results/<machine>/<kind>.json."""
    return RESULTS / machine.folder_name(description) / f"{kind}.json"


def write_results(kind: str, found: dict, text: str) -> Path:
    """Write bench/results/<machine>/<kind>.json and .md. Returns the path of the JSON."""
    path = path_of(kind, found["machine"])
    write(path, json.dumps(found, indent=1))
    write(path.with_suffix(".md"), text.rstrip("\n"))
    return path


def command_line(kind: str, description: str, measure: Callable[[], list[dict]], lines: Callable[[dict], str]) -> None:
    """The program of a benchmark that has no argument but --output: it measures, and prints its report."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", action="store_true", help="write the report below bench/results/")
    args = parser.parse_args()
    found = {"machine": machine.describe(), "measured": measure()}
    if args.output:
        write_results(kind, found, lines(found))
    print(lines(found))


# ---------------------------------------------------------------------------------------------------------- report


def write_report(result: dict, path: Path) -> Path:
    """Write FILE.md beside the JSON at `path`, and its plots into the folder FILE. Returns the path of FILE.md."""
    folder = path.with_suffix("")
    try:
        import plots

        drawn = plots.draw(result, folder)
    except ModuleNotFoundError as error:
        drawn = []
        print(f"no plots: {error}")
    markdown = path.with_suffix(".md")
    write(markdown, report(result, [(f"{folder.name}/{name}", caption) for name, caption in drawn]))
    return markdown


def report(result: dict, images: Iterable[tuple[str, str]] = ()) -> str:
    """A whole run as Markdown. `images` are (path, caption)."""
    m = result["machine"]
    title = m["gpu"] if "gpu" in m else f"{machine.cpu_name(m)}, {m['threads']} threads, {m['isa']}"
    parts = [f"# {title}", f"Measured {m['date']} by `bench/run.py`."]
    parts += ["    " + heading(result).replace("\n", "\n    ")]
    parts += ["    " + load_line(result["load"])]
    parts += ["## Goals", "✔ aim reached, ○ must reached, ✘ missed; where a row covers several M, the worst decides."]
    parts += [targets(result)]
    for path, caption in images:
        parts += [f"![{Path(path).stem}]({path})", caption]
    steps = [result[name] for name in STEPS if name in result]
    if steps:
        parts += ["## A training step", _step_table(steps)]
    if result.get("optimizer"):
        parts += ["## A step of AdamW", _optimizer_table(result["optimizer"])]
    if result["memory"]:
        parts += ["## Extra memory of one call", "\n".join(f"- {memory_line(row)}" for row in result["memory"])]
    if result["rows"]:
        parts += ["## Every row", ROWS_NOTE]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in result["rows"]):
        parts += [f"### {shape[0]}×{shape[1]}", _rows_table([r for r in result["rows"] if tuple(r["shape"]) == shape])]
    return "\n\n".join(parts)


ROWS_NOTE = (
    "Median µs of qlora_native; its rate; its share of the machine's limit (all threads); and how many times as long "
    "each peer takes. Weights are cold, the contestants alternate in one process."
)


def _rows_table(rows: list[dict]) -> str:
    peers = [name for name in PEERS if any(name in row["times"] for row in rows)]
    heads = ["", "M", "dtype", "µs", "rate", "limit", *(PEERS[name] for name in peers)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        us = row["times"][OURS]["us"]
        unit = "GB/s" if row["bound"] == "memory" else "GFLOP/s"
        against = [f"{row['times'][n]['us'] / us:.2f} ×" if n in row["times"] else "" for n in peers]
        cells = [row["name"], str(row["M"] or ""), row["dtype"], _us(us), f"{_rate(row):.1f} {unit}",
                 f"{100 * row['limit_us'] / us:.0f} %", *against]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _optimizer_table(rows: list[dict]) -> str:
    lines = ["| | | ms | of our 8-bit step's limit | times ours |", "|---|---|---:|---:|---:|"]
    for row in rows:
        what = f"{row['parameters'] / 1e6:.1f} M parameters in {row['tensors']} tensor{'s' * (row['tensors'] > 1)}, "
        what += row.get("dtype", "float32")  # the first reports do not say
        for name, found in row["times"].items():
            us, ours = found["us"], row["times"][OURS]["us"]
            cells = [what, name, f"{us / 1e3:.2f}", f"{100 * row['limit_us'] / us:.0f} %", f"{us / ours:.2f} ×"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _step_table(steps: list[dict]) -> str:
    lines = ["| | LoRA dropout | memory | s | tokens/s | times as fast | losses |", "|---|---|---|---|---|---|---|"]
    for step in steps:
        for name, found in step["contestants"].items():
            ratio = f"{step['ratio']:.2f} ×{_spread(step)}" if name == OURS and step.get("ratio") else ""
            losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
            cells = [name, f"{step['dropout']:g}", _step_memory(step), f"{found['seconds']:.2f}"]
            cells += [f"{found['tokens_per_s']:.0f}", ratio, losses]
            lines.append("| " + " | ".join(cells) + " |")
    first = steps[0]
    what = f"{first['model']}, {first['tokens']} tokens, LoRA r={first['rank']} on every linear, {first['dtype']}; "
    what += "the contestants of a step take turns in a process of its own, and where it has several, these are medians "
    what += 'of theirs. Memory "kept": by an allocator that gives nothing back.'
    return "\n\n".join([what, "\n".join(lines)])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"wrote {write_report(json.loads(Path(name).read_text()), Path(name))}")
