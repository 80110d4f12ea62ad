"""Train one adapter in several processes, for finetune.py: each takes a share of a batch; gradients are added up."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def count() -> int:
    """The number of processes that `torchrun` or `accelerate launch` started, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device: str) -> str:
    """Connect to the other processes, if there are any, and return the device of this one."""
    if count() == 1:
        # accelerate sets an address for several processes on a CPU, but starts only one without --multi_gpu.
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
            raise SystemExit(
                "accelerate launch: expected several processes, as --num_processes says, got one: on a CPU it starts "
                "several with --multi_gpu only. Or use torchrun --nproc-per-node"
            )
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return device


def leave() -> None:
    """End the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(batch: list[Any]) -> list[Any]:
    """The share of this process in a batch. It is empty if there are more processes than items."""
    return batch[rank() :: dist.get_world_size()] if dist.is_initialized() else batch


def add(values: list[float], device: torch.device) -> list[float]:
    """Each value, added up over the processes."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def add_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of the processes, so that all of them make the same step."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
