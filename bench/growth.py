"""How the time of a product grows with its rows: by one thread, by all, and beside a process that is busy.

    python bench/growth.py [--output]

W is [4096, 4096] in NF4 with double quantization, and X is in bfloat16. Each condition is a run of run.py in a process
of its own, which also measures torch's dense product, and decoding W for it. --output writes
bench/results/<machine>/growth.md. It takes about ten minutes on two cores.
"""

from __future__ import annotations

from typing import Any

import machine
import report
import run
import timing
from cases import OURS, SQUARE
from tables import table

# {operation of run.py: title}
OPERATIONS = {"forward": "Y = X·Wᵀ", "dx": "dX = dY·W"}
PEERS = {"torch dense": "dense", "decode, then dense": "decoded"}
SELECTED = ("--operations", *OPERATIONS, "--shapes", "{}x{}".format(*SQUARE), "--dtypes", "bfloat16",
            "--peers", "torch_dense", "decoded")  # fmt: skip


def conditions(threads: int) -> dict[str, tuple[str, ...]]:
    """{condition: what the command line of run.py says more}."""
    return {"1 thread": ("--threads", "1"), f"{threads} threads": (), "beside a busy process": ("--busy",)}


def measure(threads: int) -> dict[str, list[dict[str, Any]]]:
    """{condition: rows}, as run.rows() gives them."""
    return {name: timing.in_own_process(run.rows, *SELECTED, *more) for name, more in conditions(threads).items()}


def is_plain(row: dict[str, Any]) -> bool:
    """Whether a row is a call of the function, without an adapter."""
    return (row["via"], row["memory"], row["format"], row["rank"]) == ("function", "default", "nf4", 0)


def cells(row: dict[str, Any]) -> list[str]:
    """Our milliseconds, and how many times as fast ours is as each peer."""
    us = row["us"]
    return [f"{us[OURS] / 1e3:.3g}", *(f"{us[peer] / us[OURS]:.2f} ×" for peer in PEERS)]


def page(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    parts = [
        "# How cost grows",
        f"{report.head(found['machine'])}; W {list(SQUARE)}, NF4 with double quantization, bfloat16, medians; "
        f"`bench/growth.py`. {found['machine']['date'].split()[0]}.",
        '"Dense" and "decoded": how many times as fast ours is as torch\'s dense product, and as decoding W and then '
        "that. The busy process multiplies dense matrices on all threads. Beside it times go in steps of the "
        "scheduler's slice, for a product ends when the last of its threads has had a core.",
    ]
    for operation, title in OPERATIONS.items():
        header = ["M"]
        rows: dict[int, list[str]] = {}
        for name, measured in found["conditions"].items():
            header += [f"{name}, ms", *PEERS.values()]
            for row in measured:
                if row["operation"] == operation and is_plain(row):
                    rows.setdefault(row["M"], [str(row["M"])]).extend(cells(row))
        parts += [f"## {title}", table(header, [rows[M] for M in sorted(rows)]).rstrip()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure, print and write."""
    args = report.parser(__doc__).parse_args()
    description = machine.describe()
    text = page({"machine": description, "conditions": measure(description["threads"])})
    if args.output:
        report.write(report.folder_of(description) / "growth.md", text)
    print(text)


if __name__ == "__main__":
    main()
