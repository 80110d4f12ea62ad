"""A step of the optimizers of optim.py: collects and checks the tensors and the options that the op takes."""

from __future__ import annotations

from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from .._core import ops as _ops  # noqa: F401  (the fake kernel)
from .._core.checked_devices import note_use
from .._core.errors import bad, bad_type, check_float_dtype, check_memory
from .algorithms import Algorithm
from .flat import FlatStates
from .sharded import is_sharded, local_pairs


def by_device(params: list[Tensor]) -> dict[torch.device, tuple[list[Tensor], list[Tensor]]]:
    """{device: (parameters that have gradients, their gradients)}, in order."""
    grads = [param.grad for param in params]  # whole lists are faster: see Batch
    if not all(map(is_not, grads, repeat(None))):
        params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    devices = dict.fromkeys([param.device for param in params])
    if len(devices) == 1:
        return dict.fromkeys(devices, (params, grads))
    return {
        device: (
            [param for param in params if param.device == device],
            [grad for param, grad in zip(params, grads, strict=True) if param.device == device],
        )
        for device in devices
    }


def check_tensors(params: list[Tensor], grads: list[Tensor]) -> None:
    """Raise TypeError unless all gradients are dense, and all tensors have a dtype that the op takes."""
    for layout in {grad.layout for grad in grads}:
        if layout is not torch.strided:
            raise bad_type("grad", "a dense gradient", layout)
    for name, tensors in (("params", params), ("grad", grads)):
        for dtype in {tensor.dtype for tensor in tensors}:
            check_float_dtype(name, dtype)


def _device_lr(lr: float | Tensor, device: torch.device) -> Tensor | None:
    """The learning rate as a tensor that the op reads on `device`, or None if the op takes it as a number."""
    if not isinstance(lr, Tensor):
        return None
    if lr.numel() != 1:
        raise bad("lr", "a number or a one-element tensor", f"shape {list(lr.shape)}")
    check_memory("lr", lr)
    if lr.device != device:
        return None
    if lr.dtype == torch.float32:
        return lr
    return lr.float() if device.type != "cpu" else None  # on the CPU the op takes the number, in float64


class Batch:
    """The arguments of the op for a step of the parameters on one device."""

    def __init__(self, algorithm: Algorithm, groups: int) -> None:
        """Start without tensors. `groups` is the number of parameter groups."""
        self.algorithm = algorithm
        self.sizes = [0] * groups
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.sharded: list[Tensor] = []  # the DTensors of which `params` has the shards of this process
        self.steps: list[Tensor] = []
        # {name: tensors}; a name that the algorithm does not use stays empty.
        self.moments: dict[str, list[Tensor]] = {name: [] for name in ("state1", "state2", "absmax1", "absmax2")}

    # One comprehension for each list: with hundreds of parameters this takes a fraction of the time of one loop.
    def add(self, group: int, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """Add parameters of a group, with their gradients and states."""
        self._add(group, params, grads)
        self.steps += [state["step"] for state in states]
        for name in self.algorithm.states:
            self.moments[name] += [state[name] for state in states]
        in_8_bits = [state for state in states if "absmax1" in state]
        for name in self.algorithm.scales:
            self.moments[name] += [state[name] for state in in_8_bits]

    def add_flat(self, group: int, params: list[Tensor], grads: list[Tensor], flat: FlatStates) -> None:
        """Add all parameters of a group, whose states are in the flat tensors."""
        self._add(group, [params[i] for i in flat.order], [grads[i] for i in flat.order])
        self.steps += flat.tensors["step"]
        for name, tensors in self.moments.items():
            tensors += flat.tensors.get(name, [])

    def _add(self, group: int, params: list[Tensor], grads: list[Tensor]) -> None:
        self.sizes[group] = len(params)
        shards, grads = local_pairs(params, grads)
        if shards is not params:
            self.sharded += filter(is_sharded, params)
        self.params += shards
        self.grads += grads

    def run(
        self,
        groups: list[dict[str, Any]],
        scaling: tuple[Tensor | None, Tensor | None],
        skipped: Tensor,
        check_only: bool = False,
    ) -> None:
        """Step all parameters, or raise and change nothing.

        Args:
            groups: the parameter groups of the optimizer.
            scaling: a factor of the gradients, and whether to skip the step; each a tensor or None.
            skipped: the count of skipped steps on this device.
            check_only: raise what the step would raise, and do nothing else.
        """
        if not torch.compiler.is_compiling():
            note_use(skipped)
        if check_only:
            check_tensors(self.params, self.grads)
        try:
            self._call(groups, scaling, skipped, check_only)
        except (RuntimeError, ValueError):
            check_tensors(self.params, self.grads)  # raises the same error in a user's words
            raise
        if not check_only:
            # Tells autograd that the parameters have changed, in case a graph has saved one.
            torch.autograd.graph.increment_version(self.params + self.sharded)

    def _call(self, groups: list[dict[str, Any]], scaling: tuple[Any, Any], skipped: Tensor, check_only: bool) -> None:
        rates = [_device_lr(group["lr"], skipped.device) for group in groups]
        torch.ops.qlora_native.optimizer_8bit_step.default(
            self.algorithm.name, self.params, self.grads, *self.moments.values(), self.steps, self.sizes,
            [float(group["lr"]) if rate is None else 0.0 for group, rate in zip(groups, rates, strict=True)],
            [float(group["betas"][0]) for group in groups],
            [float(group["betas"][1]) for group in groups],
            [float(group["eps"]) for group in groups],
            [float(group["weight_decay"]) for group in groups],
            *scaling,
            skipped,
            [rate for rate in rates if rate is not None],
            [index for index, rate in enumerate(rates) if rate is not None],
            *self._of_ademamix(groups),
            check_only=check_only,
        )  # fmt: skip

    def _of_ademamix(self, groups: list[dict[str, Any]]) -> tuple[list[float], ...]:
        """The options that only AdEMAMix has, each as a list over the groups: beta3, alpha, t_alpha, t_beta3."""
        if self.algorithm.betas < 3:
            return ()
        beta3 = [float(group["betas"][2]) for group in groups]
        return beta3, *([float(group[name] or 0.0) for group in groups] for name in ("alpha", "t_alpha", "t_beta3"))
