"""Train one adapter in several processes, for finetune.py: each takes a share of a batch; gradients are added up."""

from __future__ import annotations

import atexit
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
    if count() == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise SystemExit(
            "accelerate launch: expected several processes, as --num_processes says, got one: on a CPU it starts "
            "several with --multi_gpu only. Or use torchrun --nproc-per-node"
        )
    if count() > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
        atexit.register(dist.destroy_process_group)
    return device


def rank() -> int:
    """The number of this process; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def add(tensors: Iterable[torch.Tensor | None]) -> None:
    """Add up each tensor over the processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values
