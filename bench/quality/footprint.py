"""Bytes of fine-tuning LLaMA 7B … 65B by part: in 16 bits, with LoRA, with QLoRA; and a chart.

    python bench/quality/footprint.py --output bench/results/quality-footprint.json

Nothing of that size is allocated: the model, its adapter, the optimizer and one forward run on torch's fake tensors,
which have shapes and no memory, so that every figure is the library's own. The same code with real tensors, at a size
that fits, is what checks it: the sum of the parts must be what torch's allocator handed out.

Full fine-tuning is in bf16 with AdamW's fp32 moments; LoRA has fp32 adapters of rank 16 on every linear over bf16
weights, and torch's AdamW; QLoRA the same over NF4 with double quantization, and AdamW8bit. One sequence, with gradient
checkpointing: what is kept is each layer's input, and what one layer and the loss keep for their backward.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qlora_native as qn
import torch
import training
from peft import LoraConfig, get_peft_model
from qlora_native.integrations.peft import register
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import machine
import report

# name: (width, width of the MLP, layers, heads), of LLaMA (Touvron et al., 2023, table 2)
SIZES = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}
CHECKED = (512, 1376, 3, 4)  # small enough for real tensors
VOCABULARY = 32_000
TOKENS = 512
RANK = 16
METHODS = ("16 bits", "LoRA", "QLoRA")
PARTS = ("weights", "scales", "adapters", "gradients", "optimizer", "activations")
CARDS = (24, 48, 80)  # GB of memory
# QLoRA, abstract and section 1, figure 6: GB.
PUBLISHED = {("65B", "16 bits"): "> 780", ("65B", "QLoRA"): "< 48", ("33B", "QLoRA"): "< 24"}
KEPT_TOLERANCE = 0.001  # position tables and other small buffers
MOST_TEMPORARY = 1.5  # what a step needs for a moment (gradients of activations, temporaries of the loss) is no part


def build(size: tuple[int, int, int, int], method: str) -> nn.Module:
    """A LLaMA whose weights are never looked at."""
    width, inner, layers, heads = size
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=heads, vocab_size=VOCABULARY, attn_implementation="sdpa")  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if method == "QLoRA" and isinstance(module, nn.Linear) and path != "lm_head":
            layer = qn.nn.Linear4bit(module.in_features, module.out_features, False, "cpu", torch.bfloat16)
            model.set_submodule(path, layer)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
            module.register_parameter(name, nn.Parameter(values))
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cpu")
    if method != "16 bits":
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model.requires_grad_(False), register(lora))
    return model.train()


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Gathers the bytes that autograd keeps for the backward, each storage once, without the model's own tensors."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}
    total = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # kept, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total[0] = sum(storage.nbytes() for storage in storages.values())


def activations(size: tuple[int, int, int, int], method: str) -> int:
    """Bytes kept for a backward with gradient checkpointing: every layer's input, and what a layer or the loss keeps."""
    width, inner, layers, heads = size
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    kept = []
    for count in (0, 1):
        model = build((width, inner, count, heads), method)
        with saved_bytes(model) as total:
            model(input_ids=ids, labels=ids, use_cache=False)
        kept.append(total[0])
    return layers * TOKENS * width * torch.bfloat16.itemsize + max(kept[0], kept[1] - kept[0])


def step(model: nn.Module, method: str) -> int:
    """A step of the optimizer with gradients of zero; returns the bytes of its state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Full fine-tuning and LoRA keep fp32 moments, of every tensor.
    optimizer = qn.optim.AdamW8bit(trained, min_8bit_size=4096 if method == "QLoRA" else 1 << 62)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.stats()["state_bytes"]


def parts_of(size: tuple[int, int, int, int], method: str) -> dict[str, int]:
    """Bytes by part, of fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # the library's tables are real
        model = build(size, method)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        scales = sum(
            tensor.nbytes
            for module in model.modules() if isinstance(module, qn.nn.Linear4bit)
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if name != "weight"
        )  # fmt: skip
        adapters = 0 if method == "16 bits" else trained
        whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        return {
            "weights": whole - scales - adapters,
            "scales": scales,
            "adapters": adapters,
            "gradients": trained,
            "optimizer": step(model, method),
            "activations": activations(size, method),
        }


def allocated(size: tuple[int, int, int, int], method: str) -> dict[str, int]:
    """The same model with real tensors, one training step: what torch's allocator has handed out.

    Returns:
        `kept`: bytes in use after the step; `peak`: most bytes in use above that of the model, during forward and
        backward.
    """
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as made:
        model = build(size, method)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as used:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as stepped:
        step(model, method)
    phases = [list(itertools.accumulate(_allocations(profile))) for profile in (made, used, stepped)]
    return {"kept": sum(phase[-1] for phase in phases), "peak": max(phases[1])}


def _allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes of every allocation, and less than 0 of every release, in the order of time."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def measure() -> dict[str, Any]:
    """All sizes and methods, and the check.

    Raises:
        RuntimeError: the parts are not what was allocated.
    """
    found: dict[str, Any] = {"machine": machine.describe(), "tokens": TOKENS, "rank": RANK, "rows": [], "checks": []}
    for method in METHODS:
        parts, real = parts_of(CHECKED, method), allocated(CHECKED, method)
        kept = sum(parts.values()) - parts["activations"]
        during = parts["gradients"] + parts["activations"]
        found["checks"].append({"method": method, "kept": kept, "during": during, "allocated": real})
        if abs(real["kept"] / kept - 1) > KEPT_TOLERANCE or not 1 <= real["peak"] / during <= MOST_TEMPORARY:
            raise RuntimeError(f"{method}: computed {kept} bytes kept, {during} in a step; allocated {real}")
        for name, size in SIZES.items():
            found["rows"].append({"size": name, "method": method, "parts": parts_of(size, method)})
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a size and method, in GB, the published figures beside it; and the check."""
    rows = []
    for size, method in itertools.product(SIZES, METHODS):
        (parts,) = (row["parts"] for row in found["rows"] if (row["size"], row["method"]) == (size, method))
        figures = [*(parts[part] for part in PARTS), sum(parts.values())]
        rows.append((size, method, *(f"{n / 1e9:.2f}" for n in figures), PUBLISHED.get((size, method), "–")))
    checks = [
        (c["method"], *(f"{n / 1e6:.2f}" for n in (c["kept"], c["allocated"]["kept"], c["during"],
                                                 c["allocated"]["peak"])))
        for c in found["checks"]
    ]  # fmt: skip
    width, inner, layers, _ = CHECKED
    return "\n".join([
        f"GB (10⁹ bytes) of fine-tuning LLaMA with one sequence of {found['tokens']} tokens, gradient checkpointing, "
        f"adapters of rank {found['rank']} on every linear. Sizes as the library makes them, on fake tensors "
        "(`bench/quality/footprint.py`). Published: QLoRA, abstract and figure 6.", "",
        "![bytes by part](quality-footprint.png)", "",
        *training.markdown(("LLaMA", "method", *PARTS, "sum", "published"), rows), "",
        f"The check: width {width}, MLP {inner}, {layers} layers, with real tensors, MB (10⁶ bytes). Kept: weights, "
        "scales, adapters, gradients and the optimizer's state after a step. In a step: gradients and activations, to "
        "which the allocator's peak adds what is needed for a moment.", "",
        *training.markdown(("method", "kept: computed", "allocated", "in a step: computed", "peak allocated"), checks),
    ])  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """The chart: a bar a size and method, stacked by part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SIZES), figsize=(12, 4.2), layout="constrained")
    for axis, size in zip(axes, SIZES, strict=True):
        bottom = [0.0] * len(METHODS)
        for part in PARTS:
            heights = [
                row["parts"][part] / 1e9 for m in METHODS for row in found["rows"]
                if (row["size"], row["method"]) == (size, m)
            ]  # fmt: skip
            axis.bar(METHODS, heights, bottom=bottom, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for x, total in enumerate(bottom):
            axis.annotate(f"{total:.0f}", (x, total), ha="center", va="bottom")
        for card in CARDS:
            axis.axhline(card, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=f"LLaMA {size}", yscale="linear", ylim=(0, 1.12 * max(bottom)))
    axes[0].set_ylabel("GB; dotted: cards of 24, 48 and 80 GB")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the figures; beside it the table (.md) and chart (.png)")
    args = parser.parse_args()
    found = measure()
    print(table(found))
    if args.output is not None:
        report.write(args.output, json.dumps(found, indent=1))
        report.write(args.output.with_suffix(".md"), table(found))
        draw(found, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
