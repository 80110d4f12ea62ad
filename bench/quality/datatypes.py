"""The error of data types: of the weights, and of the held-out loss before and after a fine-tune (QLoRA, tables 3, 4).

    python bench/quality/datatypes.py [--seeds 0 1 2] [--steps 24] [--output]

SmolLM2's linears are in each format, in blocks of 64, with LoRA of rank 16. With the same seed every type has the same
initial adapter, batches and dropout masks.
"""

from __future__ import annotations

import functools
import math
import statistics

import qlora_native as qn
import torch
import training
from torch import nn

import tables

# name: how quantize_model() is called; nothing: the weights stay in bf16
TYPES: dict[str, dict[str, object]] = {
    "bf16": {},
    "int8": {"format": "int8", "double_quant": False},
    "int4": {"format": "int4", "double_quant": False},
    "fp4": {"format": "fp4", "double_quant": False},
    "nf4": {"format": "nf4", "double_quant": False},
    "nf4 + double quantization": training.NF4,
}
BATCH_SIZE = 4
# QLoRA, as the paper prints them: RougeL of T5-80M ... 11B (table 3), and the mean accuracy on MMLU of LLaMA 7B ... 65B
# (table 4). A dash: the table has no such row.
PUBLISHED = {
    "bf16": ("40.5 42.6 47.1 55.4 60.7", "53.0"),
    "int8": ("40.4 42.9 45.4 56.5 60.7", "–"),
    "int4": ("–", "–"),
    "fp4": ("40.3 42.4 47.5 55.6 60.9", "52.2"),
    "nf4": ("–", "–"),
    "nf4 + double quantization": ("40.4 42.7 47.7 55.3 60.9", "53.1"),
}


@functools.cache
def weights(name: str) -> dict[str, float]:
    """The linears of the model in one type.

    Returns:
        `bits_per_weight`, and `error`: the Frobenius norm of what quantizing changed, over that of the weights.
    """
    if not TYPES[name]:
        return {"bits_per_weight": 16.0, "error": 0.0}
    changed = total = bits = count = 0.0
    for path, module in training.step.load().named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            quantized = qn.quantize(module.weight.data, **TYPES[name])
            difference = qn.dequantize(quantized, dtype=torch.float32) - module.weight.data.float()
            changed += difference.square().sum(dtype=torch.float64).item()
            total += module.weight.data.float().square().sum(dtype=torch.float64).item()
            bits += 8 * quantized.nbytes
            count += module.weight.numel()
    return {"bits_per_weight": bits / count, "error": math.sqrt(changed / total)}


def run(datatype: str, seed: int, steps: int) -> dict[str, object]:
    """Quantize, train and measure."""
    done = training.fine_tune(
        lambda args: training.lora(training.base(**TYPES[datatype]), args),
        seed=seed,
        steps=steps,
        batch_size=BATCH_SIZE,
    )
    return weights(datatype) | done


def table(found: dict) -> str:
    """The table as Markdown, with a row for each type and the published figures beside it."""
    rows = []
    for name in TYPES:
        runs = sorted((done for done in found["runs"] if done["datatype"] == name), key=lambda done: done["seed"])
        if runs:
            after = [done["after"] for done in runs]
            rows.append((
                name, f"{runs[0]['bits_per_weight']:.3f}", f"{100 * runs[0]['error']:.2f} %",
                f"{math.exp(runs[0]['before']):.2f}", f"{math.exp(statistics.mean(after)):.2f}",
                " ".join(f"{math.exp(loss):.2f}" for loss in after), *PUBLISHED[name],
            ))  # fmt: skip
    header = ("linears in", "bits a weight", "error", "perplexity before", "after", "each seed", "T5 RougeL", "MMLU")
    published = (
        "Published (QLoRA): RougeL on Super-NaturalInstructions of T5 with 80M, 250M, 780M, 3B and 11B parameters "
        "(table 3), mean MMLU accuracy of LLaMA (table 4)."
    )
    return f"{training.provenance(found)} Perplexity is exp(loss).\n\n{published}\n\n{tables.table(header, rows)}"


if __name__ == "__main__":
    training.make_table("datatypes", __doc__, [{"datatype": name} for name in TYPES], run, table)
