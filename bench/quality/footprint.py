"""Bytes of fine-tuning LLaMA 7B … 65B by part: in 16 bits, with LoRA, with QLoRA; and a chart.

    python bench/quality/footprint.py [--output]

Nothing of that size is allocated. The model, its adapter, the optimizer and a step run on torch's fake tensors, which
have shapes but no memory, so every figure comes from the library itself. The same code with real tensors, at a size
that fits, checks it: the sum of the parts must be what torch's allocator has allocated.

Full fine-tuning is in bf16 with AdamW's fp32 moments. LoRA has fp32 adapters of rank 16 on every linear over bf16
weights, and AdamW's fp32 moments. QLoRA has the same adapters over NF4 with double quantization, and AdamW8bit. A step
has one sequence, with gradient checkpointing; "activations" is the peak of forward and backward beside the gradients.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qlora_native as qn
import torch
from peft import LoraConfig, get_peft_model
from qlora_native.integrations.peft import register
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import plots
import report
import tables

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
PEAK_TOLERANCE = 0.01  # memory that an operation needs internally is not seen


def outline(size: tuple[int, int, int, int], method: str) -> nn.Module:
    """A LLaMA on the meta device."""
    width, inner, layers, heads = size
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        for path, module in list(model.named_modules()):
            if method == "QLoRA" and isinstance(module, nn.Linear) and path != "lm_head":
                layer = qn.nn.Linear4bit(module.in_features, module.out_features, False, dtype=torch.bfloat16)
                model.set_submodule(path, layer)
        if method != "16 bits":
            lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model.requires_grad_(False), register(lora))
    return model.train()


def build(size: tuple[int, int, int, int], method: str) -> nn.Module:
    """A LLaMA of zeros, real or fake."""
    model = outline(size, method)
    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.__init__(module.config)  # its buffers are computed
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(_zeros(parameter), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, _zeros(buffer))
    return model


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and the largest number of bytes that live at once."""

    def __init__(self, model: nn.Module) -> None:
        """Start to count. The tensors of `model` do not count."""
        super().__init__()
        self.now = self.max = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run the operation, and count its results."""
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in self._alive:
                storage = result.untyped_storage()
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.max = max(self.max, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return results

    def _freed(self, address: int, nbytes: int) -> None:
        self._alive.discard(address)
        self.now -= nbytes


def forward_and_backward(model: nn.Module) -> None:
    """With gradient checkpointing."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def stepped(model: nn.Module, method: str) -> torch.optim.Optimizer:
    """An optimizer that has taken a step. Parameters without a gradient get one of zeros."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Full fine-tuning and LoRA keep fp32 moments, of every tensor.
    optimizer = qn.optim.AdamW8bit(trained, min_8bit_size=4096 if method == "QLoRA" else 1 << 62)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def parts_of(size: tuple[int, int, int, int], method: str) -> dict[str, int]:
    """Bytes by part, of fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # the table of double-quantized scales is real
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
        with Peak(model) as peak:
            forward_and_backward(model)
        return {
            "weights": whole - scales - adapters,
            "scales": scales,
            "adapters": adapters,
            "gradients": trained,
            "optimizer": sum(t.nbytes for state in stepped(model, method).state.values() for t in state.values()),
            "activations": max(0, peak.max - trained),
        }


def allocated(size: tuple[int, int, int, int], method: str) -> dict[str, int]:
    """The same model with real tensors, one training step: what torch's allocator has handed out.

    Returns:
        `kept`: bytes in use after the step; `peak`: the maximum above that of the model, in forward and backward.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as made:
        model = build(size, method)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as used:
        forward_and_backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as updated:
        optimizer = stepped(model, method)
    del optimizer  # only now, because its state is counted
    phases = [list(itertools.accumulate(_allocations(profile))) for profile in (made, used, updated)]
    return {"kept": sum(phase[-1] for phase in phases), "peak": max(phases[1])}


def _allocations(profile: torch.profiler.profile) -> list[int]:
    """The bytes of every allocation, in order of time; a release has negative bytes."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def measure() -> dict[str, Any]:
    """All sizes and methods, and the check.

    Raises:
        RuntimeError: the parts are not what was allocated.
    """
    found: dict[str, Any] = {"tokens": TOKENS, "rank": RANK, "rows": [], "checks": []}
    for method in METHODS:
        parts, real = parts_of(CHECKED, method), allocated(CHECKED, method)
        kept = sum(parts.values()) - parts["activations"]
        during = parts["gradients"] + parts["activations"]
        found["checks"].append({"method": method, "kept": kept, "during": during, "allocated": real})
        if abs(real["kept"] / kept - 1) > KEPT_TOLERANCE or abs(real["peak"] / during - 1) > PEAK_TOLERANCE:
            raise RuntimeError(f"{method}: computed {kept} bytes kept, {during} in a step; allocated {real}")
        for name, size in SIZES.items():
            found["rows"].append({"size": name, "method": method, "parts": parts_of(size, method)})
    return found


def table(found: dict[str, Any]) -> str:
    """The table as Markdown, with a row for each size and method in GB, the published figures, and the check."""
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
        tables.table(("LLaMA", "method", *PARTS, "sum", "published"), rows),
        f"The check: width {width}, MLP {inner}, {layers} layers, with real tensors, MB (10⁶ bytes). Kept: weights, "
        "scales, adapters, gradients and the optimizer's state after a step. In a step: gradients and activations.", "",
        tables.table(("method", "kept: computed", "allocated", "in a step: computed", "peak allocated"), checks),
    ])  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """The chart: a bar a size and method, stacked by part."""
    figure, axes = plots.subplots(1, len(SIZES), figsize=(12, 4.2))
    for axis, size in zip(axes[0], SIZES, strict=True):
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
    axes[0, 0].set_ylabel("GB; dotted: cards of 24, 48 and 80 GB")
    axes[0, 0].legend(frameon=False)
    plots.save(figure, path)


if __name__ == "__main__":
    arguments = report.parser(__doc__).parse_args()
    made = measure()
    print(table(made))
    if arguments.output:
        report.write(report.RESULTS / "quality-footprint.md", table(made))
        draw(made, report.RESULTS / "quality-footprint.png")
