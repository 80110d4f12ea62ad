"""Held-out loss after the same fine-tune with our AdamW8bit and with torch's AdamW, whose moments are fp32.

    python bench/quality/optimizer.py [--seeds 0 1] [--steps 40] --output bench/results/MACHINE-optimizer-quality.json

The run is examples/finetune.py's (`make finetune`), all of its settings but the number of steps: the same pairs held
out, and for a seed the same adapter at the start, batches and dropout masks. Only the optimizer differs.

The file is read first and keeps what it has, so that the runs can be made in pieces. Exits 1 if a held-out loss is
further from fp32's than the goal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent.parent / "examples")]

import finetune  # noqa: E402
import qlora_native as qn  # noqa: E402
from pairs import encode, read_pairs, split  # noqa: E402
from peft import get_peft_model  # noqa: E402

import machine  # noqa: E402
import report  # noqa: E402

OPTIMIZERS = {"torch AdamW fp32": finetune.ADAMW, "AdamW8bit": qn.optim.AdamW8bit}
GOAL = 0.005  # of the held-out loss


def run(name: str, seed: int, steps: int) -> dict[str, object]:
    """Train and measure, as examples/finetune.py does."""
    args = finetune.arguments(["--steps", str(steps), "--seed", str(seed)])
    torch.manual_seed(seed)
    tokenizer, model, _, _ = finetune.load_quantized(args)
    model = get_peft_model(model, finetune.lora_config(args))
    pairs, held_pairs = split(read_pairs(None), args.seed)
    held = encode(tokenizer, held_pairs[: args.eval_pairs], args.seq_len)
    before = finetune.held_out_loss(model, held, args.batch_size)
    started = time.perf_counter()
    losses, _ = finetune.train(model, encode(tokenizer, pairs, args.seq_len), args, OPTIMIZERS[name])
    seconds = time.perf_counter() - started
    return {
        "optimizer": name, "seed": seed, "steps": steps, "before": before,
        "after": finetune.held_out_loss(model, held, args.batch_size), "losses": losses, "training_seconds": seconds,
        "held_out_pairs": len(held), "lr": args.lr, "dropout": args.dropout, "batch_size": args.batch_size,
        "rank": args.rank, "dtype": args.dtype,
    }  # fmt: skip


def differences(runs: list[dict]) -> dict[str, float]:
    """By seed, how far the held-out loss with 8-bit moments is from that with fp32 ones, as a part of the latter."""
    after = {(found["optimizer"], found["seed"]): found["after"] for found in runs}
    exact, ours = OPTIMIZERS
    return {
        str(seed): after[ours, seed] / loss - 1
        for (name, seed), loss in sorted(after.items())
        if name == exact and (ours, seed) in after
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True, help="file for the figures")
    args = parser.parse_args()
    found: dict = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    found |= {"machine": machine.describe(), "goal": GOAL}
    for seed in args.seeds:
        for name in OPTIMIZERS:
            if any((r["optimizer"], r["seed"], r["steps"]) == (name, seed, args.steps) for r in found["runs"]):
                continue
            done = run(name, seed, args.steps)
            found["runs"] = [r for r in found["runs"] if (r["optimizer"], r["seed"]) != (name, seed)] + [done]
            found["differences"] = differences(found["runs"])
            report.write(args.output, json.dumps(found, indent=1))
            print(f"{name}, seed {seed}: held-out loss {done['before']:.4f} -> {done['after']:.4f}", flush=True)
    for seed, difference in found["differences"].items():
        print(f"seed {seed}: AdamW8bit {100 * difference:+.2f} % of fp32's (goal {100 * GOAL:g} % either way)")
    return int(any(abs(difference) > GOAL for difference in found["differences"].values()))


if __name__ == "__main__":
    sys.exit(main())
