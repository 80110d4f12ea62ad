"""Sharded parameters (DTensors, as FSDP2 makes them) in an 8-bit optimizer: each process steps the shard that it has.

The blocks of 8-bit moments are those of a shard, not of the whole parameter. The optimizer holds plain tensors, the
states of the shard. Its state dict has them as DTensors, so that torch.distributed.checkpoint saves every shard:

    state1, state2       the shape and the placements of the parameter
    absmax1, absmax2     [shards along dim 0, shards along dim 1, ..., blocks of the largest shard], with the placements
                         of the parameter. So the scales of another sharding have another shape or other placements
    step                 a plain tensor, which is the same in every process

AdEMAMix's state1 and absmax1 have an axis of two moments before these.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._core.blocks import ceil_div
from .._core.errors import bad, bad_type
from .algorithms import BLOCKSIZE, Algorithm

_WHOLE = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor. (To import the class takes most of a second.)"""
    return type(tensor) not in _WHOLE and isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor: its shard of a DTensor, and any other as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def local_pairs(params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What this process has of parameters and of their gradients: the very same lists if none is sharded."""
    if _WHOLE.issuperset(map(type, params)) or not any(map(is_sharded, params)):
        return params, grads
    return list(map(local, params)), list(map(_local_grad, params, grads))


def _local_grad(param: Any, grad: Any) -> Tensor:
    if is_sharded(param) != is_sharded(grad):
        kinds = ["a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (param, grad)]
        raise bad_type("grad", f"{kinds[0]}, as its parameter is", kinds[1])
    if is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def check_placements(param: Any) -> None:
    """Raise ValueError if `param` is a DTensor whose states would have no form in a state dict."""
    for placement in param.placements if is_sharded(param) else ():
        if not placement.is_replicate() and type(placement).__name__ != "Shard":
            raise bad("params", "DTensors whose placements are Shard and Replicate", placement)


def any_unusable(
    params: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, device: torch.device
) -> Tensor:
    """Whether this process, or one that shares one of the parameters, has to skip the step: fp32 [1] on `device`."""
    largest = torch.nn.utils.get_total_norm([grad for grad in grads if grad.numel() > 0], math.inf)
    scaled = largest.to(device, torch.float32) * (1.0 if inv_scale is None else inv_scale)
    unusable = (~(scaled * scaled).isfinite()).float().reshape(1)  # the core's criterion
    if found_inf is not None:
        unusable = torch.maximum(unusable, found_inf)
    for mesh in dict.fromkeys(param.device_mesh for param in params):
        unusable = unusable.to(mesh.device_type)  # with offloading, parameters are elsewhere
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(unusable, torch.distributed.ReduceOp.MAX, mesh.get_group(dim))
    return unusable.to(device)


def to_global(state: dict[str, Any], param: Any, algorithm: Algorithm) -> dict[str, Any]:
    """The state of a parameter as a state dict has it: DTensors if the parameter is one."""
    if not is_sharded(param) or not state:
        return state
    layouts = _layouts(param, algorithm)
    return {name: layouts[name].to_global(tensor) if name in layouts else tensor for name, tensor in state.items()}


def to_local(name: str, saved: Any, param: Any, algorithm: Algorithm) -> Any:
    """What this process has of a saved state, which errors call `name`; the reverse of `to_global`."""
    if not isinstance(saved, dict):
        return saved
    if is_sharded(param):
        layouts = _layouts(param, algorithm)
        return {
            key: layouts[key].to_local(f"{name}.{key}", tensor, local(param)) if key in layouts else tensor
            for key, tensor in saved.items()
        }
    for key, tensor in saved.items():
        if is_sharded(tensor):
            raise bad(f"{name}.{key}", "a plain tensor, as the parameter is", "a DTensor")
    return saved


def _layouts(param: Any, algorithm: Algorithm) -> dict[str, _Layout]:
    """{name of a state or of scales: how it stands in a state dict}."""
    return {
        name: _Layout(param, count, name in algorithm.scales)
        for names in (algorithm.states, algorithm.scales)
        for name, count in zip(names, algorithm.moments, strict=True)
    }


class _Layout:
    """How a state of a sharded parameter stands in a state dict."""

    def __init__(self, param: Any, count: int, is_scales: bool) -> None:
        """See the class."""
        self.mesh, self.is_scales = param.device_mesh, is_scales
        self.first = (count,) if count > 1 else ()
        shards, largest = [1] * param.dim(), list(param.shape)
        for placement, size in zip(param.placements, self.mesh.shape, strict=True):
            if placement.is_shard():
                shards[placement.dim] *= size
                largest[placement.dim] = ceil_div(largest[placement.dim], size)
        self.blocks = ceil_div(math.prod(largest), BLOCKSIZE)
        self.shape = (*self.first, *((*shards, self.blocks) if is_scales else param.shape))
        moved = len(self.first)
        self.placements = tuple(type(p)(p.dim + moved) if p.is_shard() else p for p in param.placements)

    def to_global(self, tensor: Tensor) -> Tensor:
        """A copy of the state of this process, as a DTensor. (DTensors over views of flat tensors cannot be saved.)"""
        from torch.distributed.tensor import DTensor

        tensor = tensor.clone()
        if self.is_scales:  # a DTensor has the same size in each process: a smaller shard has zeros at the end
            tensor = torch.nn.functional.pad(tensor, (0, self.blocks - tensor.shape[-1]))
            tensor = tensor.view(*self.first, *[1] * (len(self.shape) - len(self.first) - 1), self.blocks)
        strides = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return DTensor.from_local(tensor, self.mesh, self.placements, shape=torch.Size(self.shape), stride=strides)

    def to_local(self, name: str, saved: Any, shard: Tensor) -> Any:
        """The state of this process, from the saved one, if that is sharded as it should be."""
        if not isinstance(saved, Tensor):
            return saved
        wanted = _described(self.shape, self.placements, self.mesh)
        got = _described(saved.shape, saved.placements, saved.device_mesh) if is_sharded(saved) else "a plain tensor"
        if got != wanted:
            raise bad(name, f"{wanted}, as the blocks of 8-bit moments belong to shards", got)
        tensor, blocks = local(saved), ceil_div(shard.numel(), BLOCKSIZE)
        return tensor.reshape(*self.first, self.blocks)[..., :blocks] if self.is_scales else tensor


def _described(shape: Any, placements: Any, mesh: Any) -> str:
    return f"a DTensor {list(shape)} with placements {placements} on {tuple(mesh.shape)} processes"
