"""What calibration gives back: the held-out loss of 16 bits, of NF4, and of NF4 calibrated by the training pairs.

    python bench/quality/calibration.py [--seeds 0 1 2] [--steps 24] [--output]

Before the fine-tune the loss is measured on three kinds of text: pairs that were held out, of the kind that calibrated;
English of another kind, which are the pages of this project; and another language, which are the French manual pages of
Debian's package manpages-fr, if it is installed. After the fine-tune it is measured on the held-out pairs, and again
after the adapter is merged: into 16 bits, and into NF4 by plain rounding and by calibration.

Over plain NF4 the adapter starts with B = 0, with LoftQ's values, and with those of CLoQ for the training pairs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import statistics
import textwrap
from pathlib import Path

import qlora_native as qn
import torch
import training
from qlora_native.integrations.cloq import initialize_cloq
from qlora_native.integrations.loftq import initialize_loftq
from torch import nn
from training import finetune

import plots
import tables

BASES = ("bf16", "nf4", "nf4, LoftQ", "nf4, CLoQ", "nf4, calibrated")
FRENCH = Path("/usr/share/man/fr/man7")
TEXTS = {"English": "another kind", "French": "another language"}
TOKENS, SEQUENCE = 8192, 512  # of a text
BATCH_SIZE = 4
MERGES = {
    "plain": "merged into NF4 by plain rounding",
    "calibrated": "by calibration",
    "16 bits": "merged into 16 bits",
}
COLOURS = ("tab:blue", "tab:orange")  # of what is left, and of what is kept


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


def start(name: str, args: argparse.Namespace) -> nn.Module:
    """The model with its adapter before training."""
    model = training.lora(base(name), args)
    if name == "nf4, LoftQ":
        initialize_loftq(model, training.base().state_dict())
    elif name == "nf4, CLoQ":
        texts = finetune.calibration_batches(args, model, training.step.tokenizer(), training_pairs())
        initialize_cloq(model, training.base().state_dict(), texts, progress=False)
    return model


@functools.cache
def losses_before(name: str) -> dict[str, float]:
    """{text: loss on it before training}."""
    model = start(name, finetune.arguments([])).eval()
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

    def build(args: argparse.Namespace) -> nn.Module:
        made.append(start(base_is, args))
        return made[0]

    done = losses_before(base_is) | training.fine_tune(build, seed=seed, steps=steps, batch_size=BATCH_SIZE)
    return done | ({} if base_is == "bf16" else {"merged": merged_losses(made[0])})


def runs_of(found: dict, name: str) -> list[dict]:
    """The runs over a base."""
    return [done for done in found["runs"] if done["base_is"] == name]


def columns(found: dict) -> dict[str, str]:
    """{where the loss was measured: its title}, the farthest kind of text first."""
    kinds = sorted((kind for kind in TEXTS if all(kind in done for done in found["runs"])), reverse=True)
    titles = {kind: f"before: {TEXTS[kind]} ({kind})" for kind in kinds}
    after = f"after the fine-tune, mean of {len(runs_of(found, 'nf4'))} seeds"
    return titles | {"before": "before: the same kind", "after": after}


def loss(found: dict, name: str, column: str) -> float:
    """The mean over the seeds."""
    return statistics.mean(done[column] for done in runs_of(found, name))


def left(found: dict, name: str, column: str) -> float:
    """The part of the gap between 16 bits and NF4 that is left."""
    dense, plain = loss(found, "bf16", column), loss(found, "nf4", column)
    return (loss(found, name, column) - dense) / (plain - dense)


def kept(found: dict, name: str, how: str) -> list[float]:
    """How much of what training gained a merge keeps, for each seed."""
    return [(done["before"] - done["merged"][how]) / (done["before"] - done["after"]) for done in runs_of(found, name)]


def table(found: dict) -> str:
    """The tables as Markdown."""

    def loss_cell(name: str, column: str) -> str:
        text = f"{loss(found, name, column):.3f}"
        return text if name == "bf16" else f"{text} ({left(found, name, column):.0%})"

    def kept_cell(name: str, how: str) -> str:
        merged = statistics.mean(done["merged"][how] for done in runs_of(found, name))
        parts = kept(found, name, how)
        return f"{merged:.3f} ({statistics.mean(parts):.0%}; worst {min(parts):.0%})"

    bases = [name for name in BASES if runs_of(found, name)]
    rows = [(name, *(loss_cell(name, column) for column in columns(found))) for name in bases]
    merge_rows = [(name, *(kept_cell(name, how) for how in MERGES)) for name in bases if name != "bf16"]
    return "\n\n".join((
        f"{training.provenance(found)} In parentheses: the part of the gap between NF4 and 16 bits that is left.",
        tables.table(("linears in", *columns(found).values()), rows).rstrip(),
        "The adapter merged. In parentheses: how much of what training gained is kept.",
        tables.table(("trained over", *MERGES.values()), merge_rows).rstrip(),
        "![The parts of the gap that are left, and of the training that are kept, as bars](quality-calibration.png)\n",
    ))  # fmt: skip


def draw(found: dict, path: Path) -> None:
    """The chart: a bar for each base, by where the loss was measured, and by the kind of merge."""
    bases = [name for name in BASES if name != "bf16" and runs_of(found, name)]
    panels = [
        [(title, [left(found, name, column) for name in bases]) for column, title in columns(found).items()],
        [(title, [statistics.mean(kept(found, name, how)) for name in bases]) for how, title in MERGES.items()],
    ]
    labels = ("% of NF4's gap left: less is better", "% of the training kept: more is better")
    figure, axes = plots.subplots(2, max(map(len, panels)), figsize=(12, 1.8 + 0.6 * len(bases)))
    for axis in axes.flat:
        axis.set_visible(False)
    for row, parts in enumerate(panels):
        for column, (title, shares) in enumerate(parts):
            axis = axes[row, column]
            bars = axis.barh(bases, [100 * share for share in shares], color=COLOURS[row])
            axis.bar_label(bars, fmt="%.0f", padding=3)
            axis.invert_yaxis()
            axis.set(visible=True, title=textwrap.fill(title, 26), xlabel=labels[row], xlim=(0, 119))
            axis.tick_params(labelleft=column == 0)
            axis.spines[["top", "right"]].set_visible(False)
    plots.save(figure, path)


if __name__ == "__main__":
    training.make_table("calibration", __doc__, [{"base_is": name} for name in BASES], run, table, draw=draw)
