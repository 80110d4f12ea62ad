"""AdamW with its moments in 8 bits: `AdamW8bit`, and `PagedAdamW8bit`, whose moments can leave the GPU's memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._errors import bad, check_float_dtype
from ._flat import FlatStates, are_states
from ._optim_state import Kept, check_bitsandbytes_arguments, check_options, check_state_dict, checked_state, shapes_of
from ._optim_step import Batch, by_device, check_tensors
from ._paged import Rooms, is_pageable

__all__ = ["AdamW8bit", "PagedAdamW8bit"]

_BITSANDBYTES_GROUP = ("alpha", "t_alpha", "t_beta3")  # what it writes into groups for optimizers that are not AdamW


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with both moments in 8 bits a parameter (Dettmers et al., 2022).

    One native call a step, for all parameters of a device. Moments are quantized in blocks of 256 with the dynamic maps
    and one fp32 absmax each, as bitsandbytes' AdamW8bit does: 2.03 bytes a parameter instead of AdamW's 8. Small
    tensors keep fp32 moments. The arithmetic is fp32, whatever the dtypes of parameters and gradients (fp32, bf16,
    fp16, also mixed); the results are the same bits for any number of threads.

    A step in which a gradient is NaN, infinite or above 1.8e19 is skipped as a whole: no parameter, moment or step
    count changes. `stats()["skipped_steps"]` counts them.

    The state of a parameter p, under bitsandbytes' names:

        step                 int64 [], steps taken
        state1, state2       uint8, the shape of p: codes of the first and second moment; fp32 of a small tensor
        absmax1, absmax2     fp32 [ceil(p.numel() / 256)]; not with fp32 moments

    From the first step on these are views: the states of a parameter group lie side by side in a few tensors.

    `load_state_dict` also takes a state dict of bitsandbytes' AdamW8bit.

    Args:
        params: parameters, or dicts of parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a one-element tensor. A tensor is read at each step, and where the parameters
            are, if it is there too: a CUDA graph that has captured a step takes the value at its replay, and skips
            the step if that is negative or not finite.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: p is first multiplied by 1 - lr * weight_decay.
        min_8bit_size: tensors with fewer elements keep fp32 moments. Applies when a parameter is first stepped.
        bitsandbytes_arguments: what bitsandbytes' optimizers take on top (amsgrad, optim_bits, args, is_paged, and of
            older versions block_wise and percentile_clipping), with the values that mean what this one does.

    Raises:
        TypeError, ValueError: an option out of its range; a parameter that is to be trained and is not fp32, bf16 or
            fp16. In `step`: a sparse gradient, or one of another dtype, or an option that is out of its range by now;
            no parameter and no moment has changed then.
    """

    # torch's GradScaler then leaves gradients as they are, and hands over its scale and whether it found an infinity.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        **bitsandbytes_arguments: Any,
    ) -> None:
        """See the class."""
        check_bitsandbytes_arguments(bitsandbytes_arguments, isinstance(self, PagedAdamW8bit))
        self._skipped: dict[torch.device, Tensor] = {}  # int64 [1], by the device whose steps it counts
        self._flats: dict[tuple[int, torch.device], FlatStates] = {}  # by group and device
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        check_options(options)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own if wanted: {"params": [...], "lr": ...}.

        Raises:
            TypeError, ValueError: as the class; the optimizer is as it was.
        """
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                if param.requires_grad:
                    check_float_dtype("params", param.dtype)
        except TypeError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches: dict[torch.device, Batch] = {}
        for index, group in enumerate(self.param_groups):
            for device, (params, grads) in by_device(group["params"]).items():
                batch = batches.setdefault(device, Batch(len(self.param_groups)))
                states = [self.state.get(param) for param in params]
                if not all(states):
                    check_tensors(params, grads)  # before anything is made of them
                    states = [self.state[param] or self._init_state(index, param) for param in params]
                flat = self._flat(index, device, params, states)
                if flat is not None:
                    batch.add_flat(index, params, grads, flat)
                else:
                    batch.add(index, params, grads, states)
        if len(batches) > 1:  # what one device refuses would come after the step of another
            for batch in batches.values():
                check_tensors(batch.params, batch.grads)
        for device, batch in batches.items():
            if device not in self._skipped:
                self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
            try:
                batch.run(self.param_groups, self._scaling(device), self._skipped[device])
            except (RuntimeError, ValueError):
                check_tensors(batch.params, batch.grads)  # which the op has done as well, but not in a user's words
                raise
        return loss

    def stats(self) -> dict[str, int]:
        """What the optimizer did and holds.

        Returns:
            skipped_steps: steps that did not happen because a gradient, or a learning rate in a GPU's memory, was not
                usable, or a GradScaler's found_inf set.
            state_bytes: bytes of all moments and scales.
        """
        tensors = (t for state in self.state.values() for name, t in state.items() if name != "step")
        return {
            "skipped_steps": max((int(count) for count in self._skipped.values()), default=0),
            "state_bytes": sum(tensor.nbytes for tensor in tensors),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of bitsandbytes' AdamW8bit returned. All of it, or nothing.

        Raises:
            TypeError, ValueError: it is of other parameters (number, shapes), of another optimizer, or damaged.
        """
        check_state_dict(state_dict)
        # The last hook, so that it sees what the user's own made of the state dict.
        handle = self.register_load_state_dict_pre_hook(AdamW8bit._checked)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy keep."""
        return {**super().__getstate__(), "_skipped": self._skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """End of unpickling, and of loading a state dict."""
        super().__setstate__(state)
        self._flats = {}
        for values in self.state.values():
            values.update({name: kept.tensor for name, kept in values.items() if isinstance(kept, Kept)})

    def _init_state(self, group: int, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
        state.update(self._moments(group, param))
        return state

    def _moments(self, group: int, param: Tensor) -> dict[str, Tensor]:
        """Moments and scales of a parameter that begins, all zero."""
        in_8_bits = param.numel() >= self.param_groups[group]["min_8bit_size"]
        shapes = shapes_of(param, in_8_bits)
        return {name: torch.zeros(shape, dtype=dtype, device=param.device) for name, (dtype, shape) in shapes.items()}

    def _flat(
        self, group: int, device: torch.device, params: list[Tensor], states: list[dict[str, Tensor]]
    ) -> FlatStates | None:
        """What holds the states of these parameters and of no others, if anything does.

        Made once, of the parameters of a group's first step: those of which only some take part in later steps, or
        whose state somebody replaces, are stepped from their own tensors.
        """
        if self._is_paged(device):
            return None
        flat = self._flats.get((group, device))
        if flat is None and are_states(params, states):
            flat = self._flats[group, device] = FlatStates(params, states)
        return flat if flat is not None and flat.hold(params, states) else None

    def _is_paged(self, device: torch.device) -> bool:
        """Whether moments of parameters there live in an arena."""
        return False

    def _scaling(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """(inv_scale, found_inf) of a GradScaler's step, else (None, None)."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:  # in double, as GradScaler.unscale_ does: both ways give the same bits
            scale = torch.as_tensor(scale, device=device).double().reciprocal().float()
        if found_inf is not None:
            found_inf = torch.as_tensor(found_inf, device=device).float()
        return scale, found_inf

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict as torch may load it: checked, and its tensors out of the reach of torch's casts."""
        check_state_dict(state_dict)
        ours, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in ours]:
            return state_dict  # torch says what is wrong with it
        groups = []
        for group, own in zip(saved, ours, strict=True):
            options = {name: value for name, value in group.items() if name not in _BITSANDBYTES_GROUP}
            options.setdefault("min_8bit_size", own["min_8bit_size"])
            check_options(options)
            groups.append(options)
        params = [param for group in ours for param in group["params"]]
        ids = [i for group in saved for i in group["params"]]
        if twice := [i for i in ids if ids.count(i) > 1] if len(set(ids)) < len(ids) else []:
            raise bad("state_dict", "each parameter once", f"{twice[0]!r} twice")
        states = {
            i: checked_state(f"state[{i}]", state_dict["state"][i], param, not self._is_paged(param.device))
            for i, param in zip(ids, params, strict=True)
            if state_dict["state"].get(i, {}) != {}
        }
        return {**state_dict, "state": states, "param_groups": groups}


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose moments live in memory that GPU and host share, and move to the GPU just before they are used.

    The moments of a parameter group lie in one arena, in update order. A step goes through it in stretches of 32 MB:
    while one is updated the next is fetched, and where the GPU's memory is short the one before goes back. Small
    parameters are paged too. What is loaded from a state dict is paged again.

    Where there is no GPU it is AdamW8bit, with ordinary memory, and says so once. Arguments, state and state dict are
    AdamW8bit's, and so are the results, bit for bit.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """As AdamW8bit."""
        self._rooms: dict[tuple[int, torch.device], Rooms] = {}  # by group and device
        super().__init__(*args, **options)
        if not torch.cuda.is_available() and not is_pageable(torch.device("cpu")):
            _warn_once("PagedAdamW8bit: no GPU on this machine; the moments stay in ordinary memory, as AdamW8bit's")

    def stats(self) -> dict[str, int]:
        """What AdamW8bit.stats returns, and of the paging (its counts begin again when a state dict is loaded):

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
        """As AdamW8bit, and the moments are paged again: what was loaded or copied lies in ordinary memory."""
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
        rooms = Rooms(states, device)
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
