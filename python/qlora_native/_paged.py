"""Paged optimizers: where their moments live, tensors in an arena of the C++ core (paged.h), and `Paged`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._optim_base import Optimizer8bit
from ._optim_state import Algorithm, shapes_of


def is_pageable(device: torch.device) -> bool:
    """Whether there are arenas for parameters there: on GPUs, and on the one that the CPU emulates for tests."""
    return device.type == "cuda" or (device.type == "cpu" and _C.cpu_tensors_backend() == "cuda_emulated")


class Rooms:
    """An arena with room for the moments of some parameters.

    Args:
        algorithm: the optimizer's.
        in_8_bits: of each parameter, in the order in which they will be updated, whether its moments are.
        device: theirs.

    Attributes:
        arena: the core's.
        free: the rooms that nobody has taken, all zero: by parameter, its moments and scales by name. Each of these
            tensors keeps the arena alive.
    """

    def __init__(self, algorithm: Algorithm, in_8_bits: Mapping[Tensor, bool], device: torch.device) -> None:
        """See the class."""
        states = [(param.numel(), flag) for param, flag in in_8_bits.items()]
        self.arena = _C.PagedArena(states, device.type == "cuda", device.index or 0, algorithm.name)
        self.free: dict[Tensor, dict[str, Tensor]] = {}
        for index, (param, flag) in enumerate(in_8_bits.items()):
            arrays = map(torch.from_dlpack, self.arena.arrays(index))
            shapes = shapes_of(algorithm, param, flag)
            self.free[param] = {
                name: array.view(shape) for array, (name, (_, shape)) in zip(arrays, shapes.items(), strict=True)
            }


class Paged(Optimizer8bit):
    """Moments in memory that GPU and host share, which move to the GPU just before they are used.

    The moments of a parameter group lie in one arena, in update order. A step goes through it in stretches of 32 MB:
    while one is updated the next is fetched, and where the GPU's memory is short the one before goes back. Small
    parameters are paged too. What is loaded from a state dict is paged again.

    Where there is no GPU the memory is ordinary, and the optimizer says so once.
    """

    is_paged = True

    def __init__(self, *args: Any, **options: Any) -> None:
        """As the optimizer that is paged."""
        self._rooms: dict[tuple[int, torch.device], Rooms] = {}  # by group and device
        super().__init__(*args, **options)
        if not torch.cuda.is_available() and not is_pageable(torch.device("cpu")):
            name = type(self).__name__
            ordinary = name.removeprefix("Paged")
            _warn_once(f"{name}: no GPU on this machine; the moments stay in ordinary memory, as {ordinary}'s")

    def stats(self) -> dict[str, int]:
        """What the ordinary optimizer's are, and of the paging (its counts begin again when a state dict is loaded):

        bytes_managed: bytes that can move between host and GPU; 0 where nothing is paged.
        bytes_resident: bytes of the state in the memory where parameters are updated.
        prefetches: stretches of state that were asked for ahead of their use.
        stalls: of those, how many the update had to wait for.
        """
        stats = super().stats()
        paged = {"bytes_managed": 0, "bytes_resident": 0, "prefetches": 0, "stalls": 0}
        for rooms in self._rooms.values():
            for name, count in rooms.arena.stats().items():
                paged[name] += count
        ordinary = (s for p, s in self.state.items() if not self._is_paged(p.device))
        paged["bytes_resident"] += sum(t.nbytes for state in ordinary for name, t in state.items() if name != "step")
        return stats | paged

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As the ordinary optimizer. What was loaded or copied lies in ordinary memory, and is paged again."""
        super().__setstate__(state)
        self._rooms = {}
        for index, group in enumerate(self.param_groups):
            for device in {param.device for param in group["params"] if self.state.get(param)}:
                if self._is_paged(device):
                    self._page(index, device)

    def _is_paged(self, device: torch.device) -> bool:
        return is_pageable(device)

    def _moments(self, group: int, param: Tensor) -> dict[str, Tensor]:
        if not self._is_paged(param.device):
            return super()._moments(group, param)
        rooms = self._rooms.get((group, param.device))
        if rooms is None or param not in rooms.free:
            rooms = self._page(group, param.device, param)
        return rooms.free.pop(param)

    def _page(self, index: int, device: torch.device, asked: Tensor | None = None) -> Rooms:
        """Make an arena for all of a group that is trained, and for `asked`, and move what has moments there."""
        group, states = self.param_groups[index], {}
        for param in group["params"]:
            moments = self.state.get(param)
            if param.device == device and (moments or param.requires_grad or param is asked):
                in_8_bits = param.numel() >= group["min_8bit_size"]
                if moments and "state1" in moments:
                    in_8_bits = moments["state1"].dtype == torch.uint8
                states[param] = in_8_bits
        rooms = Rooms(self.algorithm, states, device)
        for param in states:
            moments = self.state.get(param)
            if moments and "state1" in moments:
                for name, room in rooms.free.pop(param).items():
                    moments[name] = room.copy_(moments[name])
        self._rooms[index, device] = rooms
        return rooms


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
