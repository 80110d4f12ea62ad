"""Where the moments of an 8-bit optimizer live: those of a group's parameters side by side in a few tensors."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ._optim_state import BLOCKSIZE, Algorithm, shapes_of
from ._weight import ceil_div


class FlatStates:
    """States of several parameters, which become views of a few tensors: one a name, with a place for each in turn.

    The op takes these instead of five tensors a parameter. Hundreds of tensors cost it more than small parameters do:
    what torch keeps about each of them is no longer in the caches after a backward.

    Args:
        algorithm: the optimizer's.
        params: as they are stepped.
        states: theirs, well-formed (`are_states`); what they hold is moved, and replaced by the views.

    Attributes:
        order: the order in which the op takes the parameters: first those with moments in 8 bits.
        tensors: by name, as the op takes them: in 8 bits, then in fp32, where there are any.
    """

    def __init__(self, algorithm: Algorithm, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """See the class."""
        # Elements that each block of a parameter has of a name.
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
        """Whether these are the parameters, and their states still the views.

        Who gives a view other memory (`tensor.data = ...`, to bring a state to a device) does so with all of a state.
        """
        return (
            len(params) == len(self._params)
            and sum(map(len, states)) == len(self._views)
            and all(map(is_, params, self._params))
            and all(map(is_, chain.from_iterable(map(dict.values, states)), self._views))
            and list(map(Tensor.data_ptr, self._moments)) == self._pointers
        )


def are_states(algorithm: Algorithm, params: list[Tensor], states: list[dict[str, Any]]) -> bool:
    """Whether states are what the optimizer makes of them, and nobody has put something else there."""

    def is_state(param: Tensor, state: dict[str, Any]) -> bool:
        expected = shapes_of(algorithm, param, "absmax1" in state) | {"step": (torch.int64, ())}
        return state.keys() == expected.keys() and all(
            isinstance(tensor := state[name], Tensor)
            and (tensor.dtype, tuple(tensor.shape), tensor.device) == (*wanted, param.device)
            for name, wanted in expected.items()
        )

    return all(map(is_state, params, states))


def _move(name: str, unit: int, items: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
    """One tensor for what states have under a name. A parameter has room for whole blocks there, one at least."""
    sizes = [max(1, ceil_div(param.numel(), BLOCKSIZE)) * unit or 1 for param, _ in items]
    first = items[0][1][name]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    for place, (_, state) in zip(flat.split(sizes), items, strict=True):
        tensor = state[name]
        state[name] = place[: tensor.numel()].view(tensor.shape)
        state[name].copy_(tensor)
    return flat
