"""Train SmolLM2 on the pairs of examples/finetune.py with its loop, for all tables here.

The key of a run is its method, seed and steps. out/quality/ keeps every run, so that a table can be made in pieces.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "examples")]

import finetune  # noqa: E402
import qlora_native as qn  # noqa: E402
from pairs import encode, read_pairs, split  # noqa: E402
from peft import get_peft_model  # noqa: E402

import machine  # noqa: E402
import report  # noqa: E402
import step  # noqa: E402

SPLIT_SEED = 0  # the same pairs are held out in every run
EVAL_PAIRS = 64
NF4 = {"format": "nf4", "double_quant": True}  # the base of QLoRA


def base(dtype: torch.dtype = torch.bfloat16, **quantization: object) -> nn.Module:
    """The frozen model. `quantization` (format, ...) quantizes its linears."""
    model = step.load().to(dtype)
    if quantization:
        qn.nn.quantize_model(model, skip=("lm_head",), progress=False, **quantization)
    return model.requires_grad_(False)


def lora(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model with examples/finetune.py's adapter."""
    return get_peft_model(model, finetune.lora_config(args))


class Unwrapped(nn.Module):
    """The interface of a PEFT model, as far as finetune.py uses it, for a model without a PEFT adapter."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`."""
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        """The model itself."""
        return self.model

    def forward(self, **arguments: object) -> object:
        """Call the model."""
        return self.model(**arguments)


def fine_tune(
    build: Callable[[argparse.Namespace], nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer] = finetune.ADAMW,
    *,
    measure_before: bool = True,
    eval_pairs: int = EVAL_PAIRS,
    **options: object,
) -> dict[str, object]:
    """Train a model and measure it.

    Args:
        build: makes the model from the settings. The random numbers are seeded before it and again before the training,
            so that what it draws changes neither batches nor dropout.
        optimizer: the class of the optimizer.
        measure_before: measure the untrained model too.
        eval_pairs: the number of held-out pairs on which the loss is measured.
        options: those of examples/finetune.py: seed=1, lr=1e-3, batch_size=4, ...

    Returns:
        `before` (or None) and `after`: held-out loss, nats a token; `trainable` parameters; `training_seconds`; and the
        settings.
    """
    argv = []
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    args = finetune.arguments(argv)
    pairs, held_pairs = split(read_pairs(None), SPLIT_SEED)
    tokenizer = step.tokenizer()
    torch.manual_seed(args.seed)
    model = build(args)
    held = encode(tokenizer, held_pairs[:eval_pairs], args.seq_len)
    before = finetune.held_out_loss(model, held, args.batch_size) if measure_before else None
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    finetune.train(model, encode(tokenizer, pairs, args.seq_len), args, optimizer)
    seconds = time.perf_counter() - started
    return {
        "before": before,
        "after": finetune.held_out_loss(model, held, args.batch_size),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "training_seconds": seconds,
        "held_out_pairs": len(held),
        **{name: getattr(args, name) for name in ("steps", "batch_size", "lr", "rank", "dropout", "seed")},
    }


def make_table(
    name: str,
    description: str | None,
    choices: Sequence[dict[str, object]],
    run: Callable[..., dict[str, object]],
    table: Callable[[dict], str],
    seeds: Sequence[int] = (0, 1, 2),
    draw: Callable[[dict, Path], None] | None = None,
) -> dict:
    """The program of a table: make the runs that out/quality/NAME.json lacks, and print the table.

    Args:
        name: of the table: --output writes it into bench/results/quality-NAME.md.
        description: the help text.
        choices: what is compared: the keyword arguments of `run` beside `seed` and `steps`.
        run: makes a run.
        table: makes Markdown of what this returns.
        seeds: the default of --seeds.
        draw: draws the chart of what this returns, which --output writes into bench/results/quality-NAME.png.

    Returns:
        {"machine": ..., "runs": [{arguments ..., what `run` returned ...}, ...]}
    """
    parser = report.parser(description)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    args = parser.parse_args()
    path = ROOT / f"out/quality/{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {"runs": []}
    found["machine"] = machine.describe()
    for seed, choice in itertools.product(args.seeds, choices):
        key = {**choice, "seed": seed, "steps": args.steps}
        if not any(key.items() <= done.items() for done in found["runs"]):
            found["runs"].append(key | run(**key))
            report.write(path, json.dumps(found, indent=1))
            print(f"{key}: {found['runs'][-1]['after']:.4f}", flush=True)
    found["runs"] = [done for done in found["runs"] if done["steps"] == args.steps]
    print(table(found))
    if args.output:
        report.write(report.RESULTS / f"quality-{name}.md", table(found))
        if draw is not None:
            draw(found, report.RESULTS / f"quality-{name}.png")
    return found


def provenance(found: dict) -> str:
    """A sentence or two on how and where the runs of a table were made."""
    m, first = found["machine"], found["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return (
        f"Held-out loss (nats a token, {first['held_out_pairs']} pairs) of SmolLM2-135M-Instruct after "
        f"{first['steps']} steps of {first['batch_size']} pairs of examples/finetune.py. "
        f"{machine.cpu_name(m)}, {m['threads']} thread{'s' * (m['threads'] > 1)}, {versions}."
    )
