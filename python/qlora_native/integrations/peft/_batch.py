"""PEFT's `adapter_names=`, which gives each sample of a batch its own adapter: one product over the 4-bit weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._layers.adapters import dropout_of

BASE = "__base__"  # PEFT's name for no adapter


def distinct(names: Sequence[str], layer: nn.Module) -> list[str]:
    """The names that `layer` has an adapter for, each once, in order of appearance."""
    return [name for name in dict.fromkeys(names) if name != BASE and name in layer.lora_A]


def can_be_stacked(layer: nn.Module, names: Sequence[str]) -> bool:
    """Whether the adapters share a dtype and a dropout probability. They may differ in rank and scaling."""
    dtypes = {layer.lora_A[name].weight.dtype for name in names} | {layer.lora_B[name].weight.dtype for name in names}
    return len(dtypes) == 1 and len({dropout_of(layer, name) for name in names}) == 1


def stacked(layer: nn.Module, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Stack the adapters as A [count, rank, K] and s * B [count, N, rank], padded with zeros to the largest rank."""
    rank = max(layer.lora_A[name].weight.shape[0] for name in names)

    def missing(name: str) -> int:
        return rank - layer.lora_A[name].weight.shape[0]

    a = [F.pad(layer.lora_A[name].weight, (0, 0, 0, missing(name))) for name in names]
    b = [F.pad(layer.lora_B[name].weight * layer.scaling[name], (0, missing(name))) for name in names]
    return torch.stack(a), torch.stack(b)


def index_of_rows(x: Tensor, sample_names: Sequence[str], names: Sequence[str]) -> Tensor:
    """The index in `names` of the adapter of each row of x [samples, ..., K], or -1 for none: int64 [samples, ...]."""
    of_name = {name: i for i, name in enumerate(names)}
    of_sample = torch.tensor([of_name.get(name, -1) for name in sample_names], device=x.device)
    return of_sample.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
