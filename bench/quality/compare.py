"""Held-out loss after the same training: LoRA over bf16 weights, bitsandbytes + PEFT, and qlora_native.

    python bench/quality/compare.py [--seeds 0 1 2] [--stacks ours bitsandbytes bf16] [--steps 24] --output FILE.json
    python bench/quality/compare.py --table FILE.json

SmolLM2-135M-Instruct learns examples/finetune.py's pairs with its loop: the same pairs held out for all, and for a seed
the same adapter at the start and the same batches. The stacks differ in the weights, in where the adapter's product is
added, and in the optimizer: each has its own 8-bit AdamW, bf16 torch's AdamW. Dropout masks are each stack's own draw.

FILE.json is read first and keeps what it has, so the nine runs can be made in pieces. Beside it, FILE.md is the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent.parent / "examples")]

import finetune  # noqa: E402
from pairs import encode, read_pairs, split  # noqa: E402

import machine  # noqa: E402
import step  # noqa: E402

STACKS = {"bf16": "LoRA over bf16 weights", "bitsandbytes": "bitsandbytes + PEFT", "ours": "qlora_native"}
SPLIT_SEED = 0  # which pairs are held out is the same for all


def build(stack: str, args: argparse.Namespace) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer]]:
    """(the model with an adapter, its optimizer's class)."""
    import qlora_native as qn
    from qlora_native.integrations.peft import register

    model = step.load()
    if stack == "ours":
        qn.nn.quantize_model(model, skip=("lm_head",), progress=False)
        return step.with_adapter(model, args.dropout, register, args.seed), qn.optim.AdamW8bit
    if stack == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit

        return step.with_adapter(step.in_bitsandbytes(model), args.dropout, seed=args.seed), AdamW8bit
    return step.with_adapter(model, args.dropout, seed=args.seed), finetune.ADAMW


def run(stack: str, seed: int, steps: int) -> dict[str, object]:
    """Train and measure; the same `seed` gives every stack the same adapter and batches."""
    args = finetune.arguments(["--steps", str(steps), "--seed", str(seed), "--dtype", "bfloat16"])
    tokenizer = step.tokenizer()
    pairs, held_pairs = split(read_pairs(None), SPLIT_SEED)
    model, optimizer = build(stack, args)
    held = encode(tokenizer, held_pairs[: args.eval_pairs], args.seq_len)
    # Not of bitsandbytes: there, an evaluation repacks the weights for good (CPUs with AVX512_BF16).
    before = None if stack == "bitsandbytes" else finetune.held_out_loss(model, held, args.batch_size)
    torch.manual_seed(seed)
    started = time.perf_counter()
    losses, rate = finetune.train(model, encode(tokenizer, pairs, args.seq_len), args, optimizer)
    seconds = time.perf_counter() - started
    after = finetune.held_out_loss(model, held, args.batch_size)
    return {
        "stack": stack, "seed": seed, "steps": steps, "before": before, "after": after, "losses": losses,
        "tokens_per_second": rate, "training_seconds": seconds, "held_out_pairs": len(held), "lr": args.lr,
        "dropout": args.dropout, "batch_size": args.batch_size, "rank": args.rank,
    }  # fmt: skip


def table(report: dict) -> str:
    """Markdown: a row a stack, with the spread over the seeds."""
    runs = {(found["stack"], found["seed"]): found for found in report["runs"]}
    seeds = sorted({seed for _, seed in runs})
    m, first = report["machine"], report["runs"][0]
    befores = [found["before"] for found in report["runs"] if found["stack"] == "bf16"]
    lines = [
        f"Held-out loss (nats a token) of SmolLM2-135M-Instruct after {first['steps']} steps of {first['batch_size']} "
        f"pairs of examples/finetune.py, LoRA r={first['rank']}, dropout {first['dropout']}, lr {first['lr']}; "
        f"{first['held_out_pairs']} pairs held out. "
        + (f"Before training, in bf16: {befores[0]:.4f}. " if befores else "")
        + f"{m['cpu']}, {m['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in m["versions"].items()) + ".",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | spread | from bf16, same seed |",
        "|" + "---|" * (len(seeds) + 4),
    ]  # fmt: skip
    for stack, name in STACKS.items():
        found = [runs[stack, seed]["after"] for seed in seeds if (stack, seed) in runs]
        if len(found) < len(seeds):
            continue
        offsets = [runs[stack, seed]["after"] - runs["bf16", seed]["after"] for seed in seeds if ("bf16", seed) in runs]
        away = "–" if stack == "bf16" or not offsets else " … ".join(f"{f(offsets):+.4f}" for f in (min, max))
        lines.append(
            f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in found)
            + f" | {statistics.mean(found):.4f} | {max(found) - min(found):.4f} | {away} |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stacks", nargs="+", choices=list(STACKS), default=list(STACKS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, help="file for the figures; its table goes beside it, as .md")
    parser.add_argument("--table", type=Path, help="only print the table of these figures")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    report = {"runs": []}
    if args.output is not None and args.output.exists():
        report = json.loads(args.output.read_text())
    report["machine"] = machine.describe()
    for seed in args.seeds:
        for stack in args.stacks:
            done = run(stack, seed, args.steps)
            same = [found for found in report["runs"] if (found["stack"], found["seed"]) == (stack, seed)]
            report["runs"] = [found for found in report["runs"] if found not in same] + [done]
            print(f"{STACKS[stack]}, seed {seed}: {done['after']:.4f} ({done['training_seconds']:.0f} s)", flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(report, indent=1) + "\n")
                args.output.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
