"""Figures of a run of finetune.py: parameters, the peak of memory, and a plot of the loss."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch
from torch import nn

import qlora_native as qn


def parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, where a quantized weight counts its elements, not its bytes."""
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype != torch.uint8)
    total += sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, qn.nn.Linear4bit))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), total


def start_peak_memory(device: str) -> None:
    """Reset the peak of memory, if the system can do so; otherwise it is the peak of the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: "5" resets the resident set's high-water mark


def peak_memory(device: str) -> int:
    """The peak of memory in bytes: allocated by torch on a GPU, or resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plot(losses: list[float], before: float, after: float, path: Path) -> None:
    """Write the loss curve as a PNG, which needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    smooth = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="0.75", linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color="C0", linewidth=2, label="training, mean of 10 steps")
    axes.plot([0, len(losses)], [before, after], "o", color="C3", label="held out, before and after")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="QLoRA fine-tune")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, format="png")
