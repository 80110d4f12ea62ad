"""Held-out loss by rank and by adapted matrices, and of other methods: tables 6 and 2 of LoRA, at a small size.

    python bench/quality/adapters.py [--seeds 0] [--steps 24] [--output]

The base is NF4 with double quantization, except for full fine-tuning, which has no frozen weights and is in fp32. Each
method has the learning rates of ROWS, of which the best one counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import qlora_native as qn
import torch
import training
from torch import Tensor, nn

import tables

RANKS = (1, 2, 4, 8, 64)
MATRICES = {
    "q": ["q_proj"],
    "q, v": ["q_proj", "v_proj"],
    "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["all-linear"],
}
BOTTLENECK = 16  # the width of an adapter layer
BATCH_SIZE = 4
# The published figures (LoRA, tables 6 and 2), which are shown beside ours.
PUBLISHED_RANKS = {"q": (68.8, 69.6, 70.5, 70.4, 70.0), "q, v": (73.4, 73.3, 73.7, 73.8, 73.5),
                   "q, k, v, o": (74.1, 73.7, 74.0, 74.0, 73.9)}  # fmt: skip
PUBLISHED_METHODS = {"full": "86.4", "BitFit": "85.2", "adapters": "84.4, 85.4", "LoRA all r=8": "87.2"}


def base() -> nn.Module:
    """The frozen model."""
    return training.base(**training.NF4)


def lora(args: argparse.Namespace) -> nn.Module:
    """LoRA as in examples/finetune.py."""
    return training.lora(base(), args)


def full(_args: argparse.Namespace) -> nn.Module:
    """Full fine-tuning of every parameter, in fp32."""
    return training.Unwrapped(training.base(torch.float32).requires_grad_(True))


def bitfit(_args: argparse.Namespace) -> nn.Module:
    """Train a bias for every quantized linear. Llama has none, so they start at zero."""
    model = base()
    for layer in model.modules():
        if isinstance(layer, qn.nn.Linear4bit):
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return training.Unwrapped(model)


class Bottleneck(nn.Module):
    """A layer followed by an adapter (Houlsby et al., 2019): y + up(gelu(down(y))), which is y at first."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        """Wrap `layer`, whose output has `width` columns."""
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(width, BOTTLENECK), nn.Linear(BOTTLENECK, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., width]."""
        y = self.layer(x)
        return y + self.up(nn.functional.gelu(self.down(y.float()))).to(y.dtype)


def adapters(_args: argparse.Namespace) -> nn.Module:
    """An adapter layer after attention and after the MLP of every block."""
    model = base()
    for path, layer in list(model.named_modules()):
        if path.endswith(("self_attn.o_proj", "mlp.down_proj")):
            model.set_submodule(path, Bottleneck(layer, layer.out_features))
    return training.Unwrapped(model)


# name: (how the model is made, learning rates, other settings of examples/finetune.py)
ROWS: dict[str, tuple[Callable[[argparse.Namespace], nn.Module], tuple[float, ...], dict[str, object]]] = {
    **{
        f"LoRA {matrices} r={rank}": (lora, (1e-3,), {"rank": rank, "alpha": 2 * rank, "target_modules": targets})
        for rank in RANKS
        for matrices, targets in MATRICES.items()
    },
    "full": (full, (3e-5, 1e-4), {}),
    "BitFit": (bitfit, (1e-3, 1e-2), {}),
    "adapters": (adapters, (1e-3, 3e-3), {}),
}


def run(row: str, lr: float, seed: int, steps: int) -> dict[str, object]:
    """Train and measure one row at one learning rate."""
    build, _, options = ROWS[row]
    return training.fine_tune(build, lr=lr, seed=seed, steps=steps, batch_size=BATCH_SIZE, **options)


def table(found: dict) -> str:
    """The tables as Markdown: rank by matrices, and the methods, each beside the published figures."""
    best: dict[str, dict] = {}
    for done in found["runs"]:
        if done["row"] not in best or done["after"] < best[done["row"]]["after"]:
            best[done["row"]] = done

    def loss(matrices: str, i: int) -> str:
        done = best.get(f"LoRA {matrices} r={RANKS[i]}")
        published = f" ({PUBLISHED_RANKS[matrices][i]})" if matrices in PUBLISHED_RANKS else ""
        return f"{done['after']:.4f}{published}" if done else "–"

    ranks = [(matrices, *(loss(matrices, i) for i in range(len(RANKS)))) for matrices in MATRICES]
    methods = [
        (name, f"{done['trainable'] / 1e6:.2f} M", f"{done['lr']:g}", f"{done['before']:.4f}", f"{done['after']:.4f}",
         published)
        for name, published in PUBLISHED_METHODS.items() if (done := best.get(name))
    ]  # fmt: skip
    ranks_header = ("matrices", *(f"r={rank}" for rank in RANKS))
    header = ("method", "trainable", "learning rate", "before", "after", "published")
    return (
        f"{training.provenance(found)} One seed.\n\n## Rank and matrices\n\nLoRA over NF4 with double quantization. In "
        f"brackets: accuracy on WikiSQL of GPT-3 175B (LoRA, table 6).\n\n{tables.table(ranks_header, ranks)}\n"
        "## Methods\n\nPublished: GLUE average of RoBERTa-base (LoRA, table 2).\n\n"
        f"{tables.table(header, methods)}"
    )


if __name__ == "__main__":
    rows = [{"row": row, "lr": lr} for row, (_, rates, _) in ROWS.items() for lr in rates]
    training.make_table("adapters", __doc__, rows, run, table, seeds=[0])
