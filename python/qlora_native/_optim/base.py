"""`Optimizer8bit`, the base of the optimizers of optim.py, which add only their arguments and their algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._core.errors import bad, check_float_dtype, check_memory
from .algorithms import Algorithm, shapes_of
from .flat import FlatStates, are_states
from .sharded import any_unusable, check_placements, is_sharded, local, to_global, to_local
from .state import (
    UncastTensor,
    bitsandbytes_state,
    check_bitsandbytes_arguments,
    check_options,
    check_state_dict,
    checked_state,
    options_of,
)
from .step import Batch, by_device

Scaling = tuple[Tensor | None, Tensor | None]  # of gradients: see Optimizer8bit._scaling


class Optimizer8bit(torch.optim.Optimizer):
    """A torch optimizer with moments in 8 bits: one native call a step, for all parameters of a device.

    Moments are quantized in blocks of 256 with bitsandbytes' dynamic maps and one fp32 absmax each (Dettmers et al.,
    2022). Small tensors keep fp32 moments. The arithmetic is fp32, whatever the dtypes of parameters and gradients
    (fp32, bf16, fp16, also mixed); the results are the same bits for any number of threads.

    A step in which a gradient is NaN, infinite or above 1.8e19 is skipped as a whole: no parameter, moment or step
    count changes. `stats()["skipped_steps"]` counts them.

    The state of a parameter p, under bitsandbytes' names:

        step                 int64 [], steps taken
        state1, state2       uint8, the shape of p: codes of moments; fp32 of a small tensor
        absmax1, absmax2     fp32 [ceil(p.numel() / 256)]; not with fp32 moments

    From the first step on these are views: the states of a parameter group lie side by side in a few tensors.

    Parameters may be DTensors, as FSDP2 makes them. Each process then steps its shards, whose blocks are their own, and
    holds their states; p is the shard in the table above, and `min_8bit_size` is compared with the whole parameter. All
    processes skip a step together. `state_dict` has the states as DTensors, which torch.distributed.checkpoint saves;
    they can be loaded for the same sharding only.

    A learning rate that is a tensor is read at each step, and where the parameters are, if it is there too: a CUDA
    graph that has captured a step takes the value at its replay, and skips the step if that is negative or not finite.
    """

    algorithm: ClassVar[Algorithm]
    is_paged: ClassVar[bool] = False

    # Tells torch's GradScaler to leave the gradients alone and to set grad_scale and found_inf on this optimizer.
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], options: dict[str, Any], bitsandbytes_arguments: dict[str, Any]) -> None:
        """Make the optimizer.

        Args:
            params: parameters, or dicts of parameter groups, as for every torch optimizer.
            options: the defaults of a parameter group.
            bitsandbytes_arguments: further arguments of bitsandbytes' optimizer, which are checked.
        """
        name = type(self).__name__.removeprefix("Paged")
        check_bitsandbytes_arguments(bitsandbytes_arguments, self.algorithm, self.is_paged, (name, f"Paged{name}"))
        self._skipped: dict[torch.device, Tensor] = {}  # {device: int64 [1], steps skipped there}
        self._flats: dict[tuple[int, torch.device], FlatStates] = {}  # by (group, device)
        check_options(options, self.algorithm)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which may have options of their own.

        Args:
            param_group: {"params": [...], "lr": ...}; an option that is missing has its default.

        Raises:
            TypeError, ValueError: an option or a parameter is refused, as by the constructor. The optimizer is then
                unchanged.
        """
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group}, self.algorithm)
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
            closure: a function that evaluates the model again and returns the loss, or None.

        Returns:
            What `closure` returned, or None.

        Raises:
            TypeError, ValueError: a parameter, a gradient or an option is refused; nothing has changed on any device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        new: list[tuple[int, Tensor]] = []  # (group, parameter) of the states that this step makes
        try:
            batches = self._batches(new)
            for device in batches if len(batches) > 1 else ():  # one must not step if another refuses
                self._run(device, batches[device], (None, None), check_only=True)
            scaling = self._scaling(batches)
            for device, batch in batches.items():
                self._run(device, batch, scaling)
                new = [(group, param) for group, param in new if param.device != device]
        except BaseException:
            self._forget(new)
            raise
        return loss

    def stats(self) -> dict[str, int]:
        """Count what the optimizer did and holds.

        Returns:
            {"skipped_steps": steps that were skipped because of a gradient, of a learning rate in a GPU's memory or of
            a GradScaler's found_inf, "state_bytes": bytes of all moments and scales}.
        """
        tensors = (t for state in self.state.values() for name, t in state.items() if name != "step")
        return {
            "skipped_steps": max((int(count) for count in self._skipped.values()), default=0),
            "state_bytes": sum(tensor.nbytes for tensor in tensors),
        }

    def state_dict(self) -> dict[str, Any]:
        """Make the state dict, as every torch optimizer does.

        Returns:
            {"state": {number of the parameter: its state}, "param_groups": the groups}. The states of parameters that
            FSDP2 has sharded are DTensors, so that torch.distributed.checkpoint saves what each process has.
        """
        found = super().state_dict()
        params = dict(enumerate(param for group in self.param_groups for param in group["params"]))
        states = {key: to_global(state, params.get(key), self.algorithm) for key, state in found["state"].items()}
        return {**found, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of bitsandbytes' class of the same name: all of it, or nothing.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            TypeError, ValueError: it belongs to other parameters (by number, shapes or sharding) or to another
                optimizer, or it is damaged. The optimizer is then unchanged.
        """
        check_state_dict(state_dict)
        # Registered last, so that it checks the state dict that a user's own hooks return.
        handle = self.register_load_state_dict_pre_hook(Optimizer8bit._checked)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def to_bitsandbytes(self) -> dict[str, Any]:
        """Make a state dict with which bitsandbytes' optimizer of the same name continues.

        Returns:
            The state dict with the same tensors, where the learning rate and the steps are numbers, and the dynamic
            maps stand beside the codes (qmap1, qmap2).

        Raises:
            ValueError: a parameter is sharded (a DTensor): that optimizer has no form for blocks of shards.
        """
        if any(is_sharded(param) for group in self.param_groups for param in group["params"]):
            raise bad("params", "plain tensors, as bitsandbytes takes their states", "DTensors")
        found = self.state_dict()
        groups = [{**group, "lr": float(group["lr"])} for group in found["param_groups"]]
        states = {key: bitsandbytes_state(state, self.algorithm) for key, state in found["state"].items()}
        return {**found, "state": states, "param_groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and copy store: all but the flat tensors, which are made again."""
        return {**super().__getstate__(), "_skipped": self._skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the optimizer, at the end of unpickling, of copying and of loading a state dict."""
        super().__setstate__(state)
        self._flats = {}
        for values in self.state.values():
            values.update({name: value.tensor for name, value in values.items() if isinstance(value, UncastTensor)})

    def _batches(self, new: list[tuple[int, Tensor]]) -> dict[torch.device, Batch]:
        """What a step updates on each device. States are made for parameters that have none, and listed in `new`."""
        batches: dict[torch.device, Batch] = {}
        for index, group in enumerate(self.param_groups):
            for device, (params, grads) in by_device(group["params"]).items():
                batch = batches.setdefault(device, Batch(self.algorithm, len(self.param_groups)))
                states = [self.state.get(param) for param in params]
                if not all(states):
                    without = [param for param, state in zip(params, states, strict=True) if not state]
                    new += [(index, param) for param in without]
                    for param in without:
                        self._init_state(index, param)
                    states = [self.state[param] for param in params]
                flat = self._flat(index, device, params, states)
                if flat is not None:
                    batch.add_flat(index, params, grads, flat)
                else:
                    batch.add(index, params, grads, states)
        return batches

    def _run(self, device: torch.device, batch: Batch, scaling: Scaling, check_only: bool = False) -> None:
        """Step the parameters on a device, or with `check_only` raise what the step would raise."""
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
        skipped = self._skipped[device]
        scale, found_inf = (None if tensor is None else tensor.to(device) for tensor in scaling)
        batch.run(self.param_groups, (scale, found_inf), skipped, check_only)

    def _forget(self, new: list[tuple[int, Tensor]]) -> None:
        """Remove states that a failed step has made."""
        for index, param in new:
            self.state.pop(param, None)
            self._flats.pop((index, param.device), None)

    def _init_state(self, group: int, param: Tensor) -> None:
        check_placements(param)
        state = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
        state.update(self._moments(group, param))

    def _moments(self, group: int, param: Tensor) -> dict[str, Tensor]:
        """Make the moments and scales of a new parameter, all zero."""
        in_8_bits = param.numel() >= self.param_groups[group]["min_8bit_size"]
        shapes = shapes_of(self.algorithm, local(param), in_8_bits)
        return {name: torch.zeros(shape, dtype=dtype, device=param.device) for name, (dtype, shape) in shapes.items()}

    def _flat(
        self, group: int, device: torch.device, params: list[Tensor], states: list[dict[str, Tensor]]
    ) -> FlatStates | None:
        """The flat tensors that hold the states of exactly these parameters, or None.

        They are made once, for the parameters of a group's first step. When a later step has other parameters, or
        somebody has replaced a state, the step takes the tensors of each parameter.
        """
        if self._is_paged(device):
            return None
        flat = self._flats.get((group, device))
        if flat is None and are_states(self.algorithm, params, states):
            flat = self._flats[group, device] = FlatStates(self.algorithm, params, states)
        return flat if flat is not None and flat.hold(params, states) else None

    def _is_paged(self, device: torch.device) -> bool:
        """Whether the moments of parameters on `device` live in an arena."""
        return False

    def _scaling(self, batches: dict[torch.device, Batch]) -> Scaling:
        """The (inv_scale, found_inf) of a step, each None if there is none.

        A GradScaler sets both. Devices, and the processes that share a parameter, skip a step together.
        """
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for name, tensor in (("grad_scale", scale), ("found_inf", found_inf)):
            check_memory(name, tensor)
        if not batches:
            return None, None
        device = next(iter(batches))
        if scale is not None:  # in float64, so that the bits are those of GradScaler.unscale_
            scale = torch.as_tensor(scale, device=device).double().reciprocal().float()
        if found_inf is not None:
            found_inf = torch.as_tensor(found_inf, device=device).float()
        sharded = [param for batch in batches.values() for param in batch.sharded]
        if sharded or len(batches) > 1:
            grads = [grad for batch in batches.values() for grad in batch.grads]
            found_inf = any_unusable(sharded, grads, scale, found_inf, device)
        return scale, found_inf

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check a state dict, and wrap its tensors so that torch does not cast them."""
        check_state_dict(state_dict)
        ours, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in ours]:
            return state_dict  # torch raises its own error
        groups = []
        for group, own in zip(saved, ours, strict=True):
            options = options_of(group, self.algorithm)
            options.setdefault("min_8bit_size", own["min_8bit_size"])
            check_options(options, self.algorithm)
            groups.append(options)
        params = [param for group in ours for param in group["params"]]
        ids = [i for group in saved for i in group["params"]]
        if twice := [i for i in ids if ids.count(i) > 1] if len(set(ids)) < len(ids) else []:
            raise bad("state_dict", "each parameter once", f"{twice[0]!r} twice")
        owner = type(self).__name__.removeprefix("Paged")
        states = {}
        for i, param in zip(ids, params, strict=True):
            if (saved := state_dict["state"].get(i, {})) != {}:
                name, copied = f"state[{i}]", not self._is_paged(param.device)
                saved = to_local(name, saved, param, self.algorithm)
                states[i] = checked_state(name, saved, local(param), copied, self.algorithm, owner)
        return {**state_dict, "state": states, "param_groups": groups}
