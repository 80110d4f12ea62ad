"""`Optimizer8bit`: all of the optimizers of optim.py but their arguments and their arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._errors import bad, check_float_dtype
from ._flat import FlatStates, are_states
from ._optim_state import (
    Algorithm,
    Kept,
    bitsandbytes_state,
    check_bitsandbytes_arguments,
    check_options,
    check_state_dict,
    checked_state,
    options_of,
    shapes_of,
)
from ._optim_step import Batch, by_device, check_tensors


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

    A learning rate that is a tensor is read at each step, and where the parameters are, if it is there too: a CUDA
    graph that has captured a step takes the value at its replay, and skips the step if that is negative or not finite.
    """

    algorithm: ClassVar[Algorithm]
    is_paged: ClassVar[bool] = False

    # torch's GradScaler then leaves gradients as they are, and hands over its scale and whether it found an infinity.
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], options: dict[str, Any], bitsandbytes_arguments: dict[str, Any]) -> None:
        """`options`: the defaults of a parameter group."""
        name = type(self).__name__.removeprefix("Paged")
        check_bitsandbytes_arguments(bitsandbytes_arguments, self.algorithm, self.is_paged, (name, f"Paged{name}"))
        self._skipped: dict[torch.device, Tensor] = {}  # int64 [1], by the device whose steps it counts
        self._flats: dict[tuple[int, torch.device], FlatStates] = {}  # by group and device
        check_options(options, self.algorithm)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own if wanted: {"params": [...], "lr": ...}.

        Raises:
            TypeError, ValueError: as the class; the optimizer is as it was.
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
                batch = batches.setdefault(device, Batch(self.algorithm, len(self.param_groups)))
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
        """Load what `state_dict` of this class or of bitsandbytes' of the same name returned. All of it, or nothing.

        Raises:
            TypeError, ValueError: it is of other parameters (number, shapes), of another optimizer, or damaged.
        """
        check_state_dict(state_dict)
        # The last hook, so that it sees what the user's own made of the state dict.
        handle = self.register_load_state_dict_pre_hook(Optimizer8bit._checked)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def to_bitsandbytes(self) -> dict[str, Any]:
        """A state dict for bitsandbytes' optimizer of the same name, which continues from here.

        Returns:
            What `state_dict` returns, and the same tensors; but the learning rate and the steps are numbers, and the
            dynamic maps lie beside the codes (qmap1, qmap2).
        """
        found = self.state_dict()
        groups = [{**group, "lr": float(group["lr"])} for group in found["param_groups"]]
        states = {key: bitsandbytes_state(state, self.algorithm) for key, state in found["state"].items()}
        return {**found, "state": states, "param_groups": groups}

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
        shapes = shapes_of(self.algorithm, param, in_8_bits)
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
        if flat is None and are_states(self.algorithm, params, states):
            flat = self._flats[group, device] = FlatStates(self.algorithm, params, states)
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
            options = options_of(group, self.algorithm)
            options.setdefault("min_8bit_size", own["min_8bit_size"])
            check_options(options, self.algorithm)
            groups.append(options)
        params = [param for group in ours for param in group["params"]]
        ids = [i for group in saved for i in group["params"]]
        if twice := [i for i in ids if ids.count(i) > 1] if len(set(ids)) < len(ids) else []:
            raise bad("state_dict", "each parameter once", f"{twice[0]!r} twice")
        owner = type(self).__name__.removeprefix("Paged")
        states = {
            i: checked_state(
                f"state[{i}]", state_dict["state"][i], param, not self._is_paged(param.device), self.algorithm, owner
            )
            for i, param in zip(ids, params, strict=True)
            if state_dict["state"].get(i, {}) != {}
        }
        return {**state_dict, "state": states, "param_groups": groups}
