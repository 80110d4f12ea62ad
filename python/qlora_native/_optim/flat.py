"""Flat storage for the moments of an 8-bit optimizer: a few tensors hold those of all parameters of a group."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .._core.blocks import ceil_div
from .._core.errors import check_memory
from .algorithms import BLOCKSIZE, Algorithm, shapes_of
from .sharded import local


class FlatStates:
    """The states of several parameters, moved into one flat tensor for each name; the states become views of it.

    The op then takes a few flat tensors instead of five for each parameter. With hundreds of small parameters that is
    faster: torch's bookkeeping of each tensor has left the caches by the time a backward pass is over.

    Args:
        algorithm: the algorithm of the optimizer.
        params: the parameters, in the order in which they are stepped.
        states: their states, which `are_states` has checked. Their tensors are replaced by views.

    Attributes:
        order: the order in which the op takes the parameters: those with 8-bit moments are first.
        tensors: {name: flat tensors}. A name has one for 8-bit moments, then one for fp32 moments, if there are any.
    """

    def __init__(self, algorithm: Algorithm, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """See the class."""
        # {name: elements that it has for each block of a parameter}.
        units = {"step": 0, **dict(zip(algorithm.scales, algorithm.moments, strict=True))}
        units |= {name: BLOCKSIZE * count for name, count in zip(algorithm.states, algorithm.moments, strict=True)}
        parts = [[i for i, state in enumerate(states) if ("absmax1" in state) is flag] for flag in (True, False)]
        self.order = parts[0] + parts[1]
        self.tensors: dict[str, list[Tensor]] = {}
        for part in filter(None, parts):
            for name in list(states[part[0]]):
                self.tensors.setdefault(name, []).append(
                    _move(name, units[name], [(params[i], states[i]) for i in part])
                )
        self._params = params
        self._views = list(chain.from_iterable(map(dict.values, states)))
        self._moments = [state["state1"] for state in states]
        self._pointers = [moment.data_ptr() for moment in self._moments]

    def hold(self, params: list[Tensor], states: list[dict[str, Tensor]]) -> bool:
        """Whether these are the same parameters, and their states still the views that were made of them.

        Only the memory of state1 is compared: code that gives a state other memory (`tensor.data = ...`, to move it to
        another device) does so for all of its tensors.
        """
        return (
            len(params) == len(self._params)
            and sum(map(len, states)) == len(self._views)
            and all(map(is_, params, self._params))
            and all(map(is_, chain.from_iterable(map(dict.values, states)), self._views))
            and list(map(Tensor.data_ptr, self._moments)) == self._pointers
        )


def are_states(algorithm: Algorithm, params: list[Tensor], states: list[dict[str, Any]]) -> bool:
    """Whether the states have the names, dtypes, shapes and devices that the optimizer gives them."""

    def is_state(param: Tensor, state: dict[str, Any]) -> bool:
        expected = shapes_of(algorithm, local(param), "absmax1" in state) | {"step": (torch.int64, ())}
        return state.keys() == expected.keys() and all(
            isinstance(tensor := state[name], Tensor)
            and (tensor.dtype, tuple(tensor.shape), tensor.device) == (*wanted, param.device)
            for name, wanted in expected.items()
        )

    return all(map(is_state, params, states))


def _move(name: str, unit: int, items: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
    """Move the tensors `name` of the states into one flat tensor. Each parameter gets whole blocks, at least one."""
    sizes = [max(1, ceil_div(local(param).numel(), BLOCKSIZE)) * unit or 1 for param, _ in items]
    first = items[0][1][name]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    for place, (_, state) in zip(flat.split(sizes), items, strict=True):
        tensor = state[name]
        check_memory(name, tensor)
        state[name] = place[: tensor.numel()].view(tensor.shape)
        state[name].copy_(tensor)
    return flat
