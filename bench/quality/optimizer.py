"""Held-out loss after the same fine-tune with our AdamW8bit and with torch's AdamW, whose moments are fp32.

    python bench/quality/optimizer.py [--seeds 0 1 2] [--steps 24] [--output]

The run has all settings of `make finetune` except the number of steps. With the same seed both runs have the same
initial adapter, batches and dropout masks; only the optimizer differs. Exits 1 if a held-out loss differs from that of
fp32 by more than the goal.
"""

from __future__ import annotations

import argparse
import sys

import qlora_native as qn
import training
from torch import nn

import summary

OPTIMIZERS = {"torch AdamW, fp32 moments": training.finetune.ADAMW, "AdamW8bit": qn.optim.AdamW8bit}
GOAL = 0.005  # the allowed difference, relative to the held-out loss


def build(args: argparse.Namespace) -> nn.Module:
    """The model of examples/finetune.py."""
    return training.lora(training.base(**training.NF4), args)


def run(optimizer: str, seed: int, steps: int) -> dict[str, object]:
    """Train and measure."""
    return training.fine_tune(build, OPTIMIZERS[optimizer], eval_pairs=128, seed=seed, steps=steps)


def differences(runs: list[dict]) -> dict[int, float]:
    """{seed: relative difference of the held-out loss with 8-bit moments from that with fp32 moments}."""
    after = {(done["optimizer"], done["seed"]): done["after"] for done in runs}
    exact, ours = OPTIMIZERS
    return {
        seed: after[ours, seed] / loss - 1
        for (name, seed), loss in sorted(after.items())
        if name == exact and (ours, seed) in after
    }


def table(found: dict) -> str:
    """The table as Markdown, with a row for each seed."""
    after = {(done["optimizer"], done["seed"]): f"{done['after']:.4f}" for done in found["runs"]}
    rows = [
        (f"seed {seed}", *(after[name, seed] for name in OPTIMIZERS), f"{100 * difference:+.2f} %")
        for seed, difference in differences(found["runs"]).items()
    ]
    header = ("", *OPTIMIZERS, f"difference (goal: {100 * GOAL:g} % either way)")
    return f"{training.provenance(found)}\n\n{summary.table(header, rows)}"


if __name__ == "__main__":
    made = training.make_table("optimizer", __doc__, [{"optimizer": name} for name in OPTIMIZERS], run, table)
    sys.exit(any(abs(difference) > GOAL for difference in differences(made["runs"]).values()))
