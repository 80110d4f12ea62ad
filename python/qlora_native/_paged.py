"""Where the moments of PagedAdamW8bit live: tensors in an arena of the C++ core (paged.h)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _C
from ._optim_state import shapes_of


def is_pageable(device: torch.device) -> bool:
    """Whether there are arenas for parameters there: on GPUs, and on the one that the CPU emulates for tests."""
    return device.type == "cuda" or (device.type == "cpu" and _C.cpu_tensors_backend() == "cuda_emulated")


class Rooms:
    """An arena with room for the moments of some parameters.

    Args:
        in_8_bits: of each parameter, in the order in which they will be updated, whether its moments are.
        device: theirs.

    Attributes:
        arena: the core's.
        free: the rooms that nobody has taken, all zero: by parameter, its moments and scales by name. Each of these
            tensors keeps the arena alive.
    """

    def __init__(self, in_8_bits: Mapping[Tensor, bool], device: torch.device) -> None:
        """See the class."""
        states = [(param.numel(), flag) for param, flag in in_8_bits.items()]
        self.arena = _C.PagedArena(states, device.type == "cuda", device.index or 0)
        self.free: dict[Tensor, dict[str, Tensor]] = {}
        for index, (param, flag) in enumerate(in_8_bits.items()):
            arrays = map(torch.from_dlpack, self.arena.arrays(index))
            shapes = shapes_of(param, flag)
            self.free[param] = {
                name: array.view(shape) for array, (name, (_, shape)) in zip(arrays, shapes.items(), strict=True)
            }
