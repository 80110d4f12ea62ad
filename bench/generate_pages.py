"""The pages that show the figures of generate.py: the report of a machine, and the tables of docs/numbers.md."""

from __future__ import annotations

from typing import Any

import machine
import report
from tables import table

BF16, BITSANDBYTES, LLAMA_CPP = "bf16", "bitsandbytes, NF4", "llama.cpp, Q4_1"
PEERS = (BF16, BITSANDBYTES, LLAMA_CPP)
FIRST, GENERATED = "generate(): first token", "generate(): a token"


def prompt_of(P: int) -> str:
    """The name of a figure: the forward pass over P tokens."""
    return f"prompt of {P}"


def after(P: int) -> str:
    """The name of a figure: the forward pass over one token after P others."""
    return f"a token after {P}"


def groups(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{what the contestants have in common: {name: row}}."""
    titles = {False: "Without an adapter", True: f"With a LoRA adapter, r={found['rank']} on every linear"}
    rows = found["contestants"]
    of = {title: {row["name"]: row for row in rows if row["adapter"] == has} for has, title in titles.items()}
    return {title: named for title, named in of.items() if named}


def group_table(rows: dict[str, dict[str, Any]], *, errors: bool) -> str:
    """A line for each contestant: milliseconds, and how many times as fast as bf16 it is."""
    columns = list(rows[BF16]["seconds"])
    lines = []
    for name, row in rows.items():
        cells = [_cell(row["seconds"].get(what), rows[BF16]["seconds"][what]) for what in columns]
        lines.append((name, *cells, *[f"{1e3 * row['error']:.1f}"] * errors))
    header = ("", *(f"{what}, ms" for what in columns), *["error, ‰"] * errors)
    return table(header, lines)


def _cell(seconds: float | None, of_bf16: float) -> str:
    if seconds is None:
        return "–"
    ms = 1e3 * seconds
    return f"{ms:.0f} ({of_bf16 / seconds:.2f} ×)" if ms >= 100 else f"{ms:.3g} ({of_bf16 / seconds:.2f} ×)"


def faster_peers(found: dict[str, Any]) -> list[str]:
    """Where a peer is faster than each of ours, a line each."""
    lines = []
    for title, rows in groups(found).items():
        for what in rows[BF16]["seconds"]:
            ours = {name: row["seconds"][what] for name, row in rows.items() if name not in PEERS}
            best = min(ours, key=lambda name: ours[name])
            for peer in PEERS:
                if peer in rows and rows[peer]["seconds"].get(what, float("inf")) < ours[best]:
                    ratio = ours[best] / rows[peer]["seconds"][what]
                    lines.append(f"{title}, {what}: {peer} is {ratio:.2f} × as fast as {best}")
    return lines


def page(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    versions = found["machine"]["versions"]
    parts = [
        "# Generating with SmolLM2-135M",
        f"{report.head(found['machine'])}; `bench/generate.py`. {report.load_line(found['load']).capitalize()}. "
        f"transformers {versions['transformers']}, bitsandbytes {versions['bitsandbytes']}; "
        f"{found['machine']['date'].split()[0]}.",
        "Milliseconds, medians, and in parentheses how many times as fast as bf16. A prompt and a token after it are "
        "forward passes of the model with its cache; `generate()` is greedy, after the longer prompt, and its figures "
        "are what its caller waits for. The error is that of the logits against those of the fp32 model with the same "
        f"weights, relative to the norm. llama.cpp ({', '.join(found['llama_cpp']) or 'no vector instructions'}) reads "
        "the same file, and rounds activations to 8 bits. The file has the embedding, which is the output layer too, "
        "in Q8_0.",
    ]
    for title, rows in groups(found).items():
        parts += [f"## {title}", group_table(rows, errors=True)]
    parts += ["## Where a peer is faster than each of ours"]
    parts += ["\n".join(f"- {line}" for line in faster_peers(found)) or "Nowhere."]
    if found["wrong"]:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in found["wrong"])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def numbers(found: dict[str, Any]) -> str:
    """The figures of a machine for docs/numbers.md."""
    name, instructions = machine.cpu_name(found["machine"]), ", ".join(found["llama_cpp"])
    return "\n".join(
        f"{name}{f', llama.cpp with {instructions}' if LLAMA_CPP in rows else ''}. {title}:\n\n"
        + group_table(rows, errors=False)
        for title, rows in groups(found).items()
    )
