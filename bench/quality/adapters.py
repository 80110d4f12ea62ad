"""Held-out loss by rank and matrices, and of other ways to fine-tune: LoRA's tables 5, 6 and 2, at a small size.

    python bench/quality/adapters.py --output FILE.json [--rows "LoRA all r=8" ...] [--steps 24] [--seed 0]
    python bench/quality/adapters.py --table FILE.json

SmolLM2-135M-Instruct learns examples/finetune.py's pairs with its loop; the base is NF4 with double quantization, but
for full fine-tuning, which has no frozen weights: it is in fp32. Each method has the learning rates of ROWS; of several
the best counts. FILE.json is read first and keeps what it has, so the runs can be made in pieces. Beside it, FILE.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent.parent / "examples")]

import finetune  # noqa: E402
import qlora_native as qn  # noqa: E402
from pairs import encode, read_pairs, split  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from qlora_native.integrations.peft import register  # noqa: E402

import machine  # noqa: E402
import step  # noqa: E402

RANKS = (1, 2, 4, 8, 64)
MATRICES: dict[str, str | list[str]] = {
    "q": ["q_proj"],
    "q, v": ["q_proj", "v_proj"],
    "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": "all-linear",
}
SPLIT_SEED = 0
BOTTLENECK = 16  # width of an adapter layer
EVAL_PAIRS = 64
# As the papers print them (LoRA, tables 6 and 2): the claims that the figures here stand beside.
PUBLISHED_RANKS = {"q": (68.8, 69.6, 70.5, 70.4, 70.0), "q, v": (73.4, 73.3, 73.7, 73.8, 73.5),
                   "q, k, v, o": (74.1, 73.7, 74.0, 74.0, 73.9)}  # fmt: skip
PUBLISHED_METHODS = {"full": "86.4", "BitFit": "85.2", "adapters": "84.4, 85.4", "LoRA all r=8": "87.2"}


def base(dtype: torch.dtype = torch.bfloat16, quantized: bool = True) -> nn.Module:
    """The model, its linears in 4 bits or not, nothing of it trainable."""
    model = step.load().to(dtype)
    if quantized:
        qn.nn.quantize_model(model, skip=("lm_head",), progress=False)
    return model.requires_grad_(False)


def lora(targets: str | list[str], rank: int) -> nn.Module:
    """LoRA as finetune.py has it, with alpha = 2 * rank."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=targets)
    return get_peft_model(base(), register(config))


class Unwrapped(nn.Module):
    """What finetune.py asks of a PEFT model, around one that has no PEFT adapter."""

    def __init__(self, model: nn.Module) -> None:
        """Hold it."""
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        """The model itself."""
        return self.model

    def forward(self, **arguments: object) -> object:
        """The model's."""
        return self.model(**arguments)


def full() -> nn.Module:
    """Full fine-tuning of every parameter, in fp32."""
    return Unwrapped(base(torch.float32, quantized=False).requires_grad_(True))


def bitfit() -> nn.Module:
    """A trained bias for every quantized linear: Llama's have none, so they begin at zero."""
    model = base()
    for layer in model.modules():
        if isinstance(layer, qn.nn.Linear4bit):
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return Unwrapped(model)


class Bottleneck(nn.Module):
    """A layer and an adapter after it (Houlsby et al., 2019): y + up(gelu(down(y))), which begins as y."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        """`layer`: one whose output is `width` wide."""
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(width, BOTTLENECK), nn.Linear(BOTTLENECK, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., width]."""
        y = self.layer(x)
        return y + self.up(nn.functional.gelu(self.down(y.float()))).to(y.dtype)


def adapters() -> nn.Module:
    """An adapter layer after attention and after the MLP of every block."""
    model = base()
    for path, layer in list(model.named_modules()):
        if path.endswith(("self_attn.o_proj", "mlp.down_proj")):
            model.set_submodule(path, Bottleneck(layer, layer.out_features))
    return Unwrapped(model)


# name: (how the model is made, learning rates)
ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...]]] = {
    **{
        f"LoRA {matrices} r={rank}": (lambda targets=targets, rank=rank: lora(targets, rank), (1e-3,))
        for rank in RANKS
        for matrices, targets in MATRICES.items()
    },
    "full": (full, (3e-5, 1e-4)),
    "BitFit": (bitfit, (1e-3, 1e-2)),
    "adapters": (adapters, (1e-3, 3e-3)),
}


def run(name: str, lr: float, seed: int, steps: int) -> dict[str, object]:
    """Train and measure one row at one learning rate."""
    args = finetune.arguments(["--steps", str(steps), "--seed", str(seed), "--lr", str(lr)])
    pairs, held_pairs = split(read_pairs(None), SPLIT_SEED)
    tokenizer = step.tokenizer()
    torch.manual_seed(seed)
    model = ROWS[name][0]()
    held = encode(tokenizer, held_pairs[:EVAL_PAIRS], args.seq_len)
    before = finetune.held_out_loss(model, held, args.batch_size)
    torch.manual_seed(seed)
    started = time.perf_counter()
    finetune.train(model, encode(tokenizer, pairs, args.seq_len), args)
    seconds = time.perf_counter() - started
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    after = finetune.held_out_loss(model, held, args.batch_size)
    return {
        "row": name, "lr": lr, "seed": seed, "steps": steps, "batch_size": args.batch_size, "trainable": trainable,
        "before": before, "after": after, "training_seconds": seconds, "held_out_pairs": len(held),
    }  # fmt: skip


def table(report: dict) -> str:
    """Markdown: rank by matrices, then the methods, the published figures beside both."""
    best: dict[str, dict] = {}
    for found in report["runs"]:
        if found["row"] not in best or found["after"] < best[found["row"]]["after"]:
            best[found["row"]] = found
    m, first = report["machine"], report["runs"][0]
    lines = [
        f"Held-out loss (nats a token, {first['held_out_pairs']} pairs) of SmolLM2-135M-Instruct after "
        f"{first['steps']} steps of {first['batch_size']} pairs of examples/finetune.py, one seed. {m['cpu']}, "
        + ", ".join(f"{name} {version}" for name, version in m["versions"].items()) + ".",
        "", "## Rank and matrices", "",
        "LoRA over NF4 with double quantization. In brackets: accuracy on WikiSQL of GPT-3 175B (LoRA, table 6).", "",
        "| matrices | " + " | ".join(f"r={rank}" for rank in RANKS) + " |", "|---|" + "---|" * len(RANKS),
    ]  # fmt: skip
    for matrices in MATRICES:
        cells = []
        for i, rank in enumerate(RANKS):
            found = best.get(f"LoRA {matrices} r={rank}")
            published = f" ({PUBLISHED_RANKS[matrices][i]})" if matrices in PUBLISHED_RANKS else ""
            cells.append(f"{found['after']:.4f}{published}" if found else "–")
        lines.append(f"| {matrices} | " + " | ".join(cells) + " |")
    lines += [
        "", "## Methods", "", "Published: GLUE average of RoBERTa-base (LoRA, table 2).", "",
        "| method | trainable | learning rate | before | after | published |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, published in PUBLISHED_METHODS.items():
        if name in best:
            found = best[name]
            cells = [name, f"{found['trainable'] / 1e6:.2f} M", f"{found['lr']:g}", f"{found['before']:.4f}",
                     f"{found['after']:.4f}", published]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the figures; its tables go beside it, as .md")
    parser.add_argument("--table", type=Path, help="only print the tables of these figures")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    report: dict = {"runs": []}
    if args.output is not None and args.output.exists():
        report = json.loads(args.output.read_text())
    report["machine"] = machine.describe()
    for name in args.rows:
        for lr in ROWS[name][1]:
            wanted = {"row": name, "lr": lr, "seed": args.seed, "steps": args.steps}
            if any(all(found[k] == v for k, v in wanted.items()) for found in report["runs"]):
                continue
            done = run(name, lr, args.seed, args.steps)
            report["runs"].append(done)
            print(f"{name}, lr {lr:g}: {done['before']:.4f} -> {done['after']:.4f} "
                  f"({done['training_seconds']:.0f} s)", flush=True)  # fmt: skip
            if args.output is not None:
                args.output.write_text(json.dumps(report, indent=1) + "\n")
                args.output.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
