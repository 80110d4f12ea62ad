"""A step of the optimizers of optim.py as the op takes it: which tensors, checked, and the learning rates."""

from __future__ import annotations

from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from . import _ops  # noqa: F401  (the fake kernel)
from ._errors import bad, bad_type, check_float_dtype
from ._flat import FlatStates


def by_device(params: list[Tensor]) -> dict[torch.device, tuple[list[Tensor], list[Tensor]]]:
    """Those that have gradients, and the gradients, of each device, in order."""
    grads = [param.grad for param in params]  # a list at a time: see Batch
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
    """Raise TypeError unless all are dense, and of dtypes that the op takes."""
    for layout in {grad.layout for grad in grads}:
        if layout is not torch.strided:
            raise bad_type("grad", "a dense gradient", layout)
    for name, tensors in (("params", params), ("grad", grads)):
        for dtype in {tensor.dtype for tensor in tensors}:
            check_float_dtype(name, dtype)


def _device_lr(lr: float | Tensor, device: torch.device) -> Tensor | None:
    """A learning rate that the op reads where the parameters are; None: it is told the number."""
    if not isinstance(lr, Tensor):
        return None
    if lr.numel() != 1:
        raise bad("lr", "a number or a one-element tensor", f"shape {list(lr.shape)}")
    if lr.device != device:
        return None
    if lr.dtype == torch.float32:
        return lr
    return lr.float() if device.type != "cpu" else None  # on the CPU its own precision is to be had


class Batch:
    """The tensors of one device's step, as the op takes them."""

    def __init__(self, groups: int) -> None:
        """No tensor yet, of so many parameter groups."""
        self.sizes = [0] * groups
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.state1: list[Tensor] = []
        self.state2: list[Tensor] = []
        self.absmax1: list[Tensor] = []
        self.absmax2: list[Tensor] = []

    # A list at a time: of hundreds of parameters, each comprehension is a fraction of a loop's body with all of it.
    def add(self, group: int, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """A group's parameters with their gradients and states."""
        self._add(group, params, grads)
        self.steps += [state["step"] for state in states]
        self.state1 += [state["state1"] for state in states]
        self.state2 += [state["state2"] for state in states]
        in_8_bits = [state for state in states if "absmax1" in state]
        self.absmax1 += [state["absmax1"] for state in in_8_bits]
        self.absmax2 += [state["absmax2"] for state in in_8_bits]

    def add_flat(self, group: int, params: list[Tensor], grads: list[Tensor], flat: FlatStates) -> None:
        """The same, with all their states."""
        self._add(group, [params[i] for i in flat.order], [grads[i] for i in flat.order])
        self.steps += flat.tensors["step"]
        self.state1 += flat.tensors["state1"]
        self.state2 += flat.tensors["state2"]
        self.absmax1 += flat.tensors.get("absmax1", [])
        self.absmax2 += flat.tensors.get("absmax2", [])

    def _add(self, group: int, params: list[Tensor], grads: list[Tensor]) -> None:
        self.sizes[group] = len(params)
        self.params += params
        self.grads += grads

    def run(self, groups: list[dict[str, Any]], scaling: tuple[Tensor | None, Tensor | None], skipped: Tensor) -> None:
        """Step them all. `groups`: the optimizer's."""
        rates = [_device_lr(group["lr"], skipped.device) for group in groups]
        torch.ops.qlora_native.adamw_8bit_step.default(
            self.params, self.grads, self.state1, self.state2, self.absmax1, self.absmax2, self.steps, self.sizes,
            [float(group["lr"]) if rate is None else 0.0 for group, rate in zip(groups, rates, strict=True)],
            [float(group["betas"][0]) for group in groups],
            [float(group["betas"][1]) for group in groups],
            [float(group["eps"]) for group in groups],
            [float(group["weight_decay"]) for group in groups],
            *scaling,
            skipped,
            [rate for rate in rates if rate is not None],
            [index for index, rate in enumerate(rates) if rate is not None],
        )  # fmt: skip
        # For autograd: a parameter that a graph has saved was changed.
        torch.autograd.graph.increment_version(self.params)
