"""What calibration gives back: the held-out loss of 16 bits, of NF4, and of NF4 calibrated by the training pairs.

    python bench/quality/calibration.py [--seeds 0 1 2] [--steps 24] [--output]

Before the fine-tune the loss is measured on three kinds of text: pairs that were held out, of the kind that calibrated;
English of another kind, which are the pages of this project; and another language, which are the French manual pages of
Debian's package manpages-fr, if it is installed. After the fine-tune it is measured on the held-out pairs, and again
after the adapter is merged: into 16 bits, and into NF4 by plain rounding and by calibration.
"""

from __future__ import annotations

import copy
import functools
import gzip
import itertools
import statistics
from pathlib import Path

import qlora_native as qn
import torch
import training
from torch import nn
from training import finetune

import tables

BASES = ("bf16", "nf4", "nf4, calibrated")
FRENCH = Path("/usr/share/man/fr/man7")
TEXTS = {"English": "another kind", "French": "another language"}
TOKENS, SEQUENCE = 8192, 512  # of a text
BATCH_SIZE = 4


@functools.cache
def text(name: str) -> torch.Tensor | None:
    """A text as token ids [n, SEQUENCE], or None if it is not there."""
    if name == "English":
        parts = [path.read_text(encoding="utf-8") for path in sorted((training.ROOT / "docs").glob("*.md"))]
    else:
        parts = [gzip.decompress(path.read_bytes()).decode() for path in sorted(FRENCH.glob("*.gz")) if path.is_file()]
    ids = training.step.tokenizer()("\n".join(parts), add_special_tokens=False).input_ids[:TOKENS]
    return torch.tensor(ids).view(-1, SEQUENCE) if len(ids) == TOKENS else None


@torch.inference_mode()
def loss_on(model: nn.Module, ids: torch.Tensor) -> float:
    """Mean loss, nats a token."""
    losses = [model(input_ids=rows, labels=rows, use_cache=False).loss.item() for rows in ids.split(BATCH_SIZE)]
    return statistics.mean(losses)


def training_pairs() -> list[dict[str, str]]:
    """The pairs that are not held out."""
    return training.split(training.read_pairs(None), training.SPLIT_SEED)[0]


@functools.cache
def calibrated_folder() -> Path:
    """The base that examples/finetune.py --calibrate saves."""
    args = finetune.arguments(["--calibrate", "--resume", "--output", str(training.ROOT / "out/quality/calibrated")])
    return finetune.save_calibrated(args, training_pairs())


def base(name: str) -> nn.Module:
    """The frozen model."""
    if name == "nf4, calibrated":
        args = finetune.arguments(["--model", str(calibrated_folder())])
        return finetune.load(args)[1].requires_grad_(False)
    return training.base(**({} if name == "bf16" else training.NF4))


@functools.cache
def losses_before(name: str) -> dict[str, float]:
    """{text: loss of the base on it}."""
    model = base(name).eval()
    return {kind: loss_on(model, ids) for kind in TEXTS if (ids := text(kind)) is not None}


def merged_losses(model: nn.Module) -> dict[str, float]:
    """{how: held-out loss of the model with its adapter merged}."""
    args = finetune.arguments([])
    tokenizer = training.step.tokenizer()
    held_pairs = training.split(training.read_pairs(None), training.SPLIT_SEED)[1]
    held = training.encode(tokenizer, held_pairs[: training.EVAL_PAIRS], args.seq_len)
    merged = training.base()
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().dequantize(torch.float32)
            merged.get_submodule(name).weight.data = (weight + layer.get_delta_weight("default")).to(torch.bfloat16)

    def loss_of(dense: nn.Module) -> float:
        return finetune.held_out_loss(training.Unwrapped(dense), held, BATCH_SIZE)

    losses = {"16 bits": loss_of(merged)}
    plain = qn.nn.quantize_model(copy.deepcopy(merged), progress=False, **training.NF4)
    losses["plain"] = loss_of(plain)
    qn.calibrate(merged, finetune.calibration_batches(args, merged, tokenizer, training_pairs()), progress=False)
    return losses | {"calibrated": loss_of(merged)}


def run(base_is: str, seed: int, steps: int) -> dict[str, object]:
    """Train, measure, merge and measure again."""
    made = []

    def build(args: object) -> nn.Module:
        made.append(training.lora(base(base_is), args))
        return made[0]

    done = losses_before(base_is) | training.fine_tune(build, seed=seed, steps=steps, batch_size=BATCH_SIZE)
    return done | ({} if base_is == "bf16" else {"merged": merged_losses(made[0])})


def table(found: dict) -> str:
    """The table as Markdown. In parentheses is the share of the gap between 16 bits and NF4 that is left."""
    runs = {name: [done for done in found["runs"] if done["base_is"] == name] for name in BASES}
    kinds = {kind: what for kind, what in TEXTS.items() if all(kind in done for done in found["runs"])}
    columns = [*sorted(kinds, reverse=True), "before", "after"]  # the farthest kind of text first
    losses = {
        (name, column): statistics.mean(done[column] for done in runs[name])
        for name, column in itertools.product(BASES, columns)
        if runs[name]
    }

    def cell(name: str, column: str) -> str:
        loss = losses[name, column]
        if name == "bf16":
            return f"{loss:.3f}"
        dense, plain = losses["bf16", column], losses["nf4", column]
        return f"{loss:.3f} ({(loss - dense) / (plain - dense):.0%})"

    def kept(name: str, how: str) -> str:
        """The loss after a merge, and how much of what training gained is kept."""
        parts = [(done["before"] - done["merged"][how]) / (done["before"] - done["after"]) for done in runs[name]]
        loss = statistics.mean(done["merged"][how] for done in runs[name])
        return f"{loss:.3f} ({statistics.mean(parts):.0%}; worst {min(parts):.0%})"

    header = ("linears in", *(f"before: {kinds[kind]} ({kind})" for kind in columns[:-2]))
    header = (*header, "before: the same kind", f"after the fine-tune, mean of {len(runs['nf4'])} seeds")
    rows = [(name, *(cell(name, column) for column in columns)) for name in BASES if runs[name]]
    note = "In parentheses: the part of the gap between NF4 and 16 bits that is left."
    merges = ("16 bits", "plain", "calibrated")
    merge_header = ("trained over", "merged into NF4 by plain rounding", "by calibration", "merged into 16 bits")
    merge_rows = [(name, *(kept(name, how) for how in (*merges[1:], merges[0]))) for name in BASES[1:] if runs[name]]
    kept_note = "The adapter merged. In parentheses: how much of what training gained is kept."
    tables_of = (tables.table(header, rows).rstrip(), kept_note, tables.table(merge_header, merge_rows))
    return "\n\n".join((f"{training.provenance(found)} {note}", *tables_of))


if __name__ == "__main__":
    training.make_table("calibration", __doc__, [{"base_is": name} for name in BASES], run, table)
