"""`Paged`, the base of the paged optimizers, whose moments live in arenas of the C++ core (paged.h)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._core.errors import check_memory
from .._core.paging import is_pageable
from .algorithms import Algorithm, shapes_of
from .base import Optimizer8bit
from .sharded import local


class MomentArena:
    """An arena for the moments and scales of some parameters.

    Args:
        algorithm: the algorithm of the optimizer.
        in_8_bits: {parameter: whether its moments are in 8 bits}, in the order in which they will be updated.
        device: the device of the parameters.

    Attributes:
        arena: the arena of the C++ core.
        unused: {parameter: {name: tensor of zeros}}, the moments and scales that no state holds yet. Each tensor keeps
            the arena alive.
    """

    def __init__(self, algorithm: Algorithm, in_8_bits: Mapping[Tensor, bool], device: torch.device) -> None:
        """See the class."""
        states = [(local(param).numel(), flag) for param, flag in in_8_bits.items()]
        self.arena = _C.PagedArena(states, device.type == "cuda", device.index or 0, algorithm.name)
        self.unused: dict[Tensor, dict[str, Tensor]] = {}
        for index, (param, flag) in enumerate(in_8_bits.items()):
            arrays = map(torch.from_dlpack, self.arena.arrays(index))
            shapes = shapes_of(algorithm, local(param), flag)
            self.unused[param] = {
                name: array.view(shape) for array, (name, (_, shape)) in zip(arrays, shapes.items(), strict=True)
            }


class Paged(Optimizer8bit):
    """Moments in memory that GPU and host share, which move to the GPU just before they are used.

    The moments of a parameter group lie in one arena, in update order. A step goes through it in segments of 32 MB:
    while one is updated, the next is fetched, and if the GPU's memory is short, the one before goes back to the host.
    Small parameters are paged too. Moments that are loaded from a state dict are moved into an arena.

    Without a GPU the moments are in ordinary memory, and the optimizer warns once.
    """

    is_paged = True

    def __init__(self, *args: Any, **options: Any) -> None:
        """Make the optimizer, with the arguments of the ordinary one."""
        self._arenas: dict[tuple[int, torch.device], MomentArena] = {}  # by (group, device)
        super().__init__(*args, **options)
        if not torch.cuda.is_available() and not is_pageable(torch.device("cpu")):
            name = type(self).__name__
            ordinary = name.removeprefix("Paged")
            _warn_once(f"{name}: no GPU on this machine; the moments stay in ordinary memory, as {ordinary}'s")

    def stats(self) -> dict[str, int]:
        """Count what the optimizer did and holds, and what was paged.

        Returns:
            The counts of the ordinary optimizer, and four of the paging, of which the last two start again at 0 when a
            state dict is loaded: "bytes_managed", bytes that can move between host and GPU, 0 if nothing is paged;
            "bytes_resident", bytes of the state in the memory where parameters are updated; "prefetches", segments of
            state that were requested ahead of their use; "stalls", the prefetches that an update had to wait for.
        """
        stats = super().stats()
        paged = {"bytes_managed": 0, "bytes_resident": 0, "prefetches": 0, "stalls": 0}
        for arena in self._arenas.values():
            for name, count in arena.arena.stats().items():
                paged[name] += count
        ordinary = (s for p, s in self.state.items() if not self._is_paged(p.device))
        paged["bytes_resident"] += sum(t.nbytes for state in ordinary for name, t in state.items() if name != "step")
        return stats | paged

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the optimizer, and move the moments, which were loaded into ordinary memory, into arenas."""
        super().__setstate__(state)
        self._arenas = {}
        for index, group in enumerate(self.param_groups):
            for device in {param.device for param in group["params"] if self.state.get(param)}:
                if self._is_paged(device):
                    self._page(index, device)

    def _is_paged(self, device: torch.device) -> bool:
        return is_pageable(device)

    def _moments(self, group: int, param: Tensor) -> dict[str, Tensor]:
        if not self._is_paged(param.device):
            return super()._moments(group, param)
        arena = self._arenas.get((group, param.device))
        if arena is None or param not in arena.unused:
            arena = self._page(group, param.device, param)
        return arena.unused.pop(param)

    def _page(self, index: int, device: torch.device, new: Tensor | None = None) -> MomentArena:
        """Make an arena for the trained parameters of a group, and for `new`, and move existing moments into it."""
        group, states = self.param_groups[index], {}
        for param in group["params"]:
            moments = self.state.get(param)
            if param.device == device and (moments or param.requires_grad or param is new):
                in_8_bits = param.numel() >= group["min_8bit_size"]
                if moments and "state1" in moments:
                    in_8_bits = moments["state1"].dtype == torch.uint8
                states[param] = in_8_bits
        arena = MomentArena(self.algorithm, states, device)
        for param in states:
            moments = self.state.get(param)
            if moments and "state1" in moments:
                for name, tensor in arena.unused.pop(param).items():
                    check_memory(name, moments[name])
                    moments[name] = tensor.copy_(moments[name])
        self._arenas[index, device] = arena
        return arena


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
