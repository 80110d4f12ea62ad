"""Held-out loss after the same training: LoRA over bf16 weights, bitsandbytes + PEFT, and ours with two optimizers.

    python bench/quality/stacks.py [--seeds 0 1 2] [--steps 24] [--output]

With the same seed all stacks have the same initial adapter and the same batches. They differ in the weights, in where
the adapter's product is added, and in the optimizer: each has its own 8-bit AdamW, and bf16 has torch's AdamW. Each
stack draws its own dropout masks, but ours has the same ones with torch's AdamW, whose moments are fp32. Exits 1 if our
held-out loss differs from that by more than the goal.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys

import qlora_native as qn
import training
from qlora_native.integrations.peft import register
from torch import nn

import tables

STACKS = {
    "bf16": "LoRA over bf16 weights",
    "bitsandbytes": "bitsandbytes + PEFT",
    "ours": "qlora_native",
    "fp32 moments": "qlora_native, torch's AdamW",
}
GOAL = 0.005  # the allowed difference by the moments, relative to the held-out loss


def build(stack: str, args: argparse.Namespace) -> nn.Module:
    """The model with an adapter."""
    if stack in ("ours", "fp32 moments"):
        return training.step.with_adapter(training.base(**training.NF4), args.dropout, register, args.seed)
    model = training.step.in_bitsandbytes(training.step.load()) if stack == "bitsandbytes" else training.step.load()
    return training.step.with_adapter(model, args.dropout, seed=args.seed)


def run(stack: str, seed: int, steps: int) -> dict[str, object]:
    """Train and measure; the same `seed` gives every stack the same adapter and batches."""
    optimizer = training.finetune.ADAMW
    if stack == "ours":
        optimizer = qn.optim.AdamW8bit
    elif stack == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit as optimizer
    return training.fine_tune(
        functools.partial(build, stack),
        optimizer,
        # Not with bitsandbytes, where an evaluation repacks the weights for good (on CPUs with AVX512_BF16).
        measure_before=stack != "bitsandbytes",
        eval_pairs=128,
        seed=seed,
        steps=steps,
    )


def table(found: dict) -> str:
    """The table as Markdown, with a row for each stack and the spread over the seeds."""
    runs = {(done["stack"], done["seed"]): done for done in found["runs"]}
    seeds = sorted({seed for _, seed in runs})
    first = found["runs"][0]
    befores = [done["before"] for done in found["runs"] if done["stack"] == "bf16"]
    rows = []
    for stack, name in STACKS.items():
        after = [runs[stack, seed]["after"] for seed in seeds if (stack, seed) in runs]
        if len(after) < len(seeds):
            continue
        offsets = [runs[stack, seed]["after"] - runs["bf16", seed]["after"] for seed in seeds if ("bf16", seed) in runs]
        away = "–" if stack == "bf16" or not offsets else " … ".join(f"{f(offsets):+.4f}" for f in (min, max))
        losses = [f"{loss:.4f}" for loss in (*after, statistics.mean(after), max(after) - min(after))]
        rows.append((name, *losses, away))
    header = ("", *(f"seed {seed}" for seed in seeds), "mean", "spread", "from bf16, same seed")
    settings = f"LoRA r={first['rank']}, dropout {first['dropout']}, lr {first['lr']}. "
    before = f"Before training, in bf16: {befores[0]:.4f}." if befores else ""
    return f"{training.provenance(found)} {settings}{before}\n\n{tables.table(header, rows)}"


if __name__ == "__main__":
    made = training.make_table("stacks", __doc__, [{"stack": stack} for stack in STACKS], run, table)
    after = {(done["stack"], done["seed"]): done["after"] for done in made["runs"]}
    exact = {seed: loss for (stack, seed), loss in after.items() if stack == "fp32 moments"}
    sys.exit(any(abs(after["ours", seed] / loss - 1) > GOAL for seed, loss in exact.items()))
