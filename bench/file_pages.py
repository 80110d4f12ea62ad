"""The pages that show the figures of files.py: the report of a machine, and the tables of docs/numbers.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import machine
import report
from cases import OURS
from tables import table

# {bits of a code: the format of ours that a layer of a file is compared with}.
REFERENCES = {4: "nf4", 8: "int8"}
AGAIN = "nf4, a second time"
LLAMA_CPP, GPTQMODEL, DENSE, DECODED = "llama.cpp", "GPTQModel", "dense", "decode, then dense"
PEERS = (LLAMA_CPP, GPTQMODEL, DENSE, DECODED)
WITH_ERRORS = (OURS, LLAMA_CPP, GPTQMODEL)  # of Y, in the table; those of the others say nothing more
Q4_1_STEP, NF4_STEP = "Q4_1, as in the file", "NF4"
FEW = 8  # rows of X up to which a product takes as long as its bytes
# {bits of a code: how many times as long as its reference a layer of a file may take}. With few rows, codes of 4 bits
# may take a multiple of the ratio of their bytes.
ALLOWED = {4: 1.05, 8: 1.1}
ALLOWED_OF_FEW = 1.1
ALLOWED_STEP = 1.03


def layers(row: dict) -> list[str]:
    """The formats of a case but the references."""
    return [name for name in row["bits"] if name not in REFERENCES.values()]


def time_ratio(row: dict, name: str) -> float | None:
    """The time of a format in a case over that of its reference; None if one of the two has none."""
    seconds, reference = row["seconds"], REFERENCES[row["bits"][name]]
    return seconds[name] / seconds[reference] if name in seconds and reference in seconds else None


def bytes_ratio(row: dict, name: str) -> float:
    """The bytes of a format over those of its reference."""
    return row["nbytes"][name] / row["nbytes"][REFERENCES[row["bits"][name]]]


def slow(found: dict) -> list[str]:
    """What takes longer than this project allows, a line each."""
    lines = []
    for row in found["products"]:
        for name in layers(row):
            bits = row["bits"][name]
            few = row["M"] <= FEW and bits == 4
            allowed = ALLOWED_OF_FEW * bytes_ratio(row, name) if few else ALLOWED[bits]
            if (ratio := time_ratio(row, name)) and ratio > allowed:
                shape = "x".join(map(str, row["shape"]))
                lines.append(f"{row['operation']} of {row['M']} rows, {shape}, {name}: {ratio:.2f} × "
                             f"{REFERENCES[bits]}, {allowed:.2f} × allowed")  # fmt: skip
    if found["step"] and found["step"]["ratio"] > ALLOWED_STEP:
        lines.append(f"a training step: {found['step']['ratio']:.3f} × NF4's, {ALLOWED_STEP} × allowed")
    return lines


# ---- the report ------------------------------------------------------------------------------------------------------


def page(found: dict) -> str:
    """The report in Markdown."""
    versions = found["machine"]["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("transformers", "gptqmodel") if versions.get(name))
    parts = [
        "# Layers of quantized files",
        f"{report.head(found['machine'])}; `bench/files.py`. Activations are bfloat16, weights are cold, contestants "
        f"alternate in one process, figures are medians. {report.load_line(found['load']).capitalize()}. "
        f"{libraries}; {date_of(found)}.",
        "## Products, against NF4 and int8",
        "Time over that of `nf4` with double quantization (codes of 4 bits) or of `int8` (codes of 8 bits) with the "
        "same shape, and the same ratio of their bytes. The rows of `nf4` and `int8` are microseconds. `nf4` a second "
        "time shows how far equal contestants differ.",
    ]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in found["products"]):
        rows = [row for row in found["products"] if tuple(row["shape"]) == shape]
        parts += [f"### {shape[0]}×{shape[1]}", products_table(rows)]
    if found["peers"]:
        parts += ["## Products, against peers on the same weight", peers_note(found), peers_table(found["peers"])]
    if found["step"]:
        parts += ["## A training step of SmolLM2-135M", step_text(found["step"])]
    if found["wrong"]:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in found["wrong"])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def date_of(found: dict) -> str:
    """The day of the measurement."""
    return found["machine"]["date"].split()[0]


def products_table(rows: list[dict]) -> str:
    """The cases of one shape, a line for each format and a column for each product."""
    lines = []
    for name in rows[0]["bits"]:
        if name in REFERENCES.values():
            cells = [f"{1e6 * row['seconds'][name]:.0f}" if name in row["seconds"] else "" for row in rows]
            lines.append((f"`{name}`, µs", f"{8 * rows[0]['nbytes'][name] / elements(rows[0]):.2f}", "", *cells))
        else:
            cells = [_times(time_ratio(row, name)) for row in rows]
            bits = f"{8 * rows[0]['nbytes'][name] / elements(rows[0]):.2f}"
            lines.append((name, bits, f"{bytes_ratio(rows[0], name):.2f} ×", *cells))
    header = [f"{row['operation']}, {row['M']} row{'s' * (row['M'] > 1)}" for row in rows]
    return table(("", "bits a weight", "bytes", *header), lines)


def elements(row: dict) -> int:
    """The elements of the weight."""
    return row["shape"][0] * row["shape"][1]


def peers_note(found: dict) -> str:
    """What the contestants of the second part are."""
    repacked = [row["name"] for row in found["peers"] if row["M"] == 1 and "REPACK" in (row["buffer"] or "")]
    kernels = ", ".join(dict.fromkeys(f"`{row['kernel']}`" for row in found["peers"] if row.get("kernel")))
    gptqmodel = f"GPTQModel multiplies by the layer that it selects for this processor ({kernels}). " if kernels else ""
    return (
        f"{found['peers'][0]['shape'][0]}×{found['peers'][0]['shape'][1]}. llama.cpp "
        f"({', '.join(found['llama_cpp']) or 'no vector instructions'}; it repacks {', '.join(repacked) or 'nothing'}) "
        f"multiplies the same bytes, with fp32 activations that it rounds to 8 bits. {gptqmodel}Dense is torch's "
        "product with the decoded bf16 weight. Decode, then dense decodes the weight by our own `dequantize` at each "
        "call, as libraries do that have no product for a CPU. The error is that of Y against float64, relative to "
        "the norm; ours is that of a bf16 weight and result."
    )


def peers_table(rows: list[dict]) -> str:
    """The cases of the second part, a line each: microseconds, and how many times as fast ours is."""
    lines = []
    for row in rows:
        us = {name: 1e6 * seconds for name, seconds in row["seconds"].items()}
        against = (f"{us[name]:.0f} ({us[name] / us[OURS]:.2f} ×)" if name in us else "–"
                   for name in PEERS)  # fmt: skip
        errors = (f"{1e3 * row['errors'][name]:.1f}" if name in row["errors"] else "–" for name in WITH_ERRORS)
        lines.append((row["name"], row["M"], f"{us[OURS]:.0f}", *against, *errors))
    header = ("", "rows", "ours, µs", *(f"{name}, µs (ours is)" for name in PEERS))
    return table((*header, "error of ours, ‰", *(f"of {name}, ‰" for name in WITH_ERRORS[1:])), lines)


def step_text(found: dict) -> str:
    """The training step."""
    rows = [
        (name, f"{each['seconds']:.2f}", f"{each['tokens_per_s']:.0f}", ", ".join(f"{x:.4f}" for x in each["losses"]))
        for name, each in found["contestants"].items()
    ]
    ratios = found["ratios"]
    spread = f", {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} processes" if len(ratios) > 1 else ""
    return (
        f"{found['tokens']} tokens, LoRA r={found['rank']} on every linear, everything fused, AdamW8bit; the decoded "
        f"model's loss is {found['decoded_loss']:.4f}. A step over the file's weights takes {found['ratio']:.3f} × the "
        f"time of one over NF4{spread}.\n\n" + table(("", "s", "tokens/s", "losses"), rows)
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


# ---- docs/numbers.md -------------------------------------------------------------------------------------------------


def worst_first(values: Iterable[float | None], *, highest: bool) -> str:
    """The range of some ratios."""
    found = sorted((value for value in values if value is not None), reverse=highest)
    return " … ".join(dict.fromkeys((f"{found[0]:.2f} ×", f"{found[-1]:.2f} ×"))) if found else "–"


def numbers(found: dict) -> str:
    """The figures of a machine for docs/numbers.md."""
    groups: dict[str, Callable[[dict], bool]] = {
        f"Y, 1 … {FEW} rows": lambda row: row["operation"] == "Y" and row["M"] <= FEW,
        "Y, 16 … 512 rows": lambda row: row["operation"] == "Y" and row["M"] > FEW,
        "dX, 16 and 256 rows": lambda row: row["operation"] == "dX",
    }
    rows = found["products"]
    lines = [
        (name, REFERENCES[rows[0]["bits"][name]].upper(), f"{bytes_ratio(rows[0], name):.2f} ×",
         *(worst_first((time_ratio(row, name) for row in rows if has(row)), highest=True) for has in groups.values()))
        for name in layers(rows[0]) if name != AGAIN
    ]  # fmt: skip
    name = machine.cpu_name(found["machine"])
    parts = [
        f"{name}: the time of a product over that of the format against which it stands, and the ratio of their bytes, "
        f"over the shapes {' and '.join(shapes(rows))}.\n",
        table(("", "against", "bytes", *groups), lines),
    ]
    peers = [row for row in found["peers"] if LLAMA_CPP in row["seconds"]]
    if peers:
        Ms = list(dict.fromkeys(row["M"] for row in peers))
        lines = []
        for type in dict.fromkeys(row["name"] for row in peers):
            of_type = {row["M"]: row for row in peers if row["name"] == type}
            speed = (_as_fast(of_type.get(M)) for M in Ms)
            errors = (max(1e3 * row["errors"][who] for row in of_type.values()) for who in (OURS, LLAMA_CPP))
            lines.append((type, *speed, *(f"{error:.1f} ‰" for error in errors)))
        header = [f"{M} row{'s' * (M > 1)}" for M in Ms]
        parts += [
            f"\nTimes as fast as llama.cpp ({', '.join(found['llama_cpp'])}) over the same bytes, {shapes(peers)[0]}, "
            "and the relative error of each against float64; llama.cpp rounds activations to 8 bits.\n",
            table(("", *header, "error of ours", "of llama.cpp"), lines),
        ]
    if found["step"]:
        parts.append(
            f"\nA training step of SmolLM2-135M over its file's Q4_1 weights takes {found['step']['ratio']:.2f} × the "
            "time of one over NF4.\n"
        )
    return "\n".join(parts)


def shapes(rows: list[dict]) -> list[str]:
    """The shapes of some rows, in their order."""
    return list(dict.fromkeys("×".join(map(str, row["shape"])) for row in rows))


def _as_fast(row: dict | None) -> str:
    return "–" if row is None else f"{row['seconds'][LLAMA_CPP] / row['seconds'][OURS]:.2f} ×"
