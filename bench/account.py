"""How the time of a training step divides: seconds by part, the limit of its products, and its memory.

    python bench/account.py [--rounds 5] [--repeats 3] [--output]

Two models: SmolLM2-135M with a batch of 4 x 256 tokens, and two layers of Llama-7B's shape, with its head, over 512
tokens. LoRA of rank 16 on all seven linears of a layer, bf16, each stack's own 8-bit AdamW. Contestants: ours with
`fuse_loss`, `fuse_blocks` and `fuse_attention`, ours without, and bitsandbytes under stock PEFT.

Each contestant trains in a process of its own, several times in turn with the others, and its fastest run counts: what
other programs take from the processors only makes a run slower. The time of a step is the median of several;
torch.profiler divides one more step into parts (step.part_of). The limit of a part is its operations over the machine's
matrix rate, measured in the same run. Memory is the growth of the process during a step. --output writes
bench/results/<machine>/account.md, its chart, and what the docs show of it into figures.json.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import large
import machine
import memory
import plots
import report
import step
import timing
from cases import OURS, matrix_rate
from tables import table

UNFUSED, BITSANDBYTES = f"{OURS}, nothing fused", "bitsandbytes + PEFT"
CONTESTANTS = [OURS, UNFUSED, *[BITSANDBYTES] * (importlib.util.find_spec("bitsandbytes") is not None)]
LAYERS, TOKENS = 2, 512  # of the 7B shape
ORDER = ("products", "adapters' gradients", "attention", step.HEAD, step.REST, "optimizer")
FIGURES = ("model", "contestant", "tokens", "seconds", "peak_bytes")  # which tables of the docs are made of
COLOURS = ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:gray", "tab:purple")


def smollm2() -> tuple[nn.Module, Tensor]:
    """The model in bf16, and tokens [batch, sequence]."""
    return step.load(), step.some_tokens()


def llama_7b(**changes: Any) -> tuple[nn.Module, Tensor]:
    """LAYERS layers of Llama-7B with random weights, and tokens. `changes` are other sizes for its config."""
    config = large.config_of("llama-7b", LAYERS, **changes)
    model = large.empty_model(config)
    large.fill(model)
    torch.manual_seed(0)
    return model, torch.randint(config.vocab_size, (1, TOKENS))


MODELS: dict[str, Callable[..., tuple[nn.Module, Tensor]]] = {"SmolLM2-135M": smollm2, "2 layers of Llama-7B": llama_7b}


def operations_of(model: nn.Module, tokens: int) -> dict[str, int]:
    """{part: operations in a step}: Y and dX with W and adapter; dA and dB; Y and dX of the head."""
    linears = [m for path, m in model.named_modules() if path.rpartition(".")[2] in step.LINEARS]
    products, gradients = step.operations(linears, tokens)
    head = model.get_output_embeddings()
    return {
        "products": products,
        "adapters' gradients": gradients,
        step.HEAD: 2 * tokens * 2 * head.in_features * head.out_features,
    }


def measure(name: str, contestant: str, rounds: int, **changes: Any) -> dict[str, Any]:
    """Train one contestant, in a process of its own so that its memory can be measured.

    Returns:
        seconds (median of a step), parts {part: seconds}, operations {part: number}, peak_bytes.

    Raises:
        RuntimeError: the loss does not fall.
    """
    with torch.enable_grad():
        model, tokens = MODELS[name](**changes)
        operations, vocabulary = operations_of(model, tokens.numel()), model.config.vocab_size
        if contestant == BITSANDBYTES:
            take = step.step_of_bitsandbytes(model, 0.0)
        else:
            take = step.step_of_ours(model, 0.0, fused=contestant == OURS)
        losses, seconds = [take(tokens)], []
        for _ in range(rounds):
            started = time.perf_counter()
            losses.append(take(tokens))
            seconds.append(time.perf_counter() - started)
        parts = step.seconds_by_part(lambda: take(tokens), vocabulary)
        peak = memory.peak(lambda: take(tokens))
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"{name}, {contestant}: expected losses that fall, got {losses}")
    median, total = statistics.median(seconds), sum(parts.values())
    return {
        "model": name,
        "contestant": contestant,
        "tokens": tokens.numel(),
        "seconds": median,
        "parts": {part: median * time / total for part, time in parts.items()},
        "operations": operations,
        "peak_bytes": peak,
    }


def lines(found: dict) -> str:
    """The report as Markdown."""
    rate = matrix_rate(found["limits"], "bfloat16")
    text = [
        "# Where a training step goes\n",
        f"{report.head(found['machine'])}, {rate / 1e9:.0f} GFLOP/s in products of bf16 or fp32. NF4 with "
        f"double quantization, LoRA of rank {step.RANK}, 8-bit AdamW; `bench/account.py` says how it is measured. "
        "Milliseconds:\n",
    ]
    for name in MODELS:
        rows = [row for row in found["measured"] if row["model"] == name]
        limits = {part: f"{1e3 * count / rate:.0f}" for part, count in rows[0]["operations"].items()}
        cells = [(part, *(f"{1e3 * row['parts'][part]:.0f}" for row in rows), limits.get(part, "")) for part in ORDER]
        cells.append(("**a step**", *(f"**{1e3 * row['seconds']:.0f}**" for row in rows), ""))
        cells.append(("memory of a step, MB", *(f"{row['peak_bytes'] / 1e6:.0f}" for row in rows), ""))
        text += [f"## {name}, {rows[0]['tokens']} tokens\n"]
        text += [table(("", *(row["contestant"] for row in rows), "limit"), cells)]
    text.append(
        "Under bitsandbytes, products hold the decoding of W and the adapters' gradients, which are products there. "
        "The limit is at the rate that torch's dense product reached, which ours may pass.\n\n"
        "![The parts of each step, as bars](account.png)"
    )
    return "\n".join(text)


def draw(found: dict, path: Path) -> None:
    """Draw the report: a bar for each contestant, divided into its parts."""
    figure, axes = plots.subplots(len(MODELS), 1, figsize=(9, 2.6 * len(MODELS)))
    for axis, name in zip(axes[:, 0], MODELS, strict=True):
        rows = [row for row in found["measured"] if row["model"] == name]
        for place, row in enumerate(rows):
            begin = 0.0
            for part, colour in zip(ORDER, COLOURS, strict=True):
                axis.barh(place, row["parts"][part], left=begin, color=colour, label=part if place == 0 else None)
                begin += row["parts"][part]
            axis.text(begin, place, f" {row['seconds']:.2f} s, {row['peak_bytes'] / 1e6:.0f} MB", va="center")
        axis.set_yticks(range(len(rows)), [row["contestant"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.25 * max((row["seconds"] for row in rows), default=1.0))
        axis.set_xlabel("seconds of a step")
        axis.set_title(name)
    axes[0, 0].legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.28))
    plots.save(figure, path)


def main() -> None:
    """Run the command line."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine.describe()}
    found["limits"] = machine.limits(machine.Probes(), ["bfloat16", "float32"], timing.Cpu())
    found["measured"] = []
    for name in MODELS:
        runs = [
            [timing.in_own_process(measure, name, contestant, args.rounds) for contestant in CONTESTANTS]
            for _ in range(args.repeats)
        ]
        found["measured"] += [min(of_one, key=lambda run: run["seconds"]) for of_one in zip(*runs, strict=True)]
    print(lines(found))
    if args.output:
        folder = report.folder_of(found["machine"])
        steps = [{field: row[field] for field in FIGURES} for row in found["measured"]]
        report.write_figures(folder, "account", {"machine": found["machine"], "measured": steps})
        report.write(folder / "account.md", lines(found))
        draw(found, folder / "account.png")


if __name__ == "__main__":
    main()
