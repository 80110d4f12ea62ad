"""Checks of the optimizers of optim.py: of the options of parameter groups, and of state dicts to be loaded."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from .._core.errors import bad, bad_type, check_memory
from .._core.formats import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP, is_dynamic_map
from .algorithms import BITSANDBYTES_ARGUMENTS, Algorithm, shapes_of

# bitsandbytes stores the quantized state of a parameter in a dict under this key.
_BITSANDBYTES_STATE = "__bnb_optimizer_quant_state__"
_MAPS = {"qmap1": DYNAMIC_MAP, "qmap2": UNSIGNED_DYNAMIC_MAP}
# bitsandbytes writes these options into the groups of every optimizer.
_ADEMAMIX_OPTIONS = ("alpha", "t_alpha", "t_beta3")


class UncastTensor:
    """A wrapper that hides a tensor from `Optimizer.load_state_dict`, which casts tensors to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def checked_state(
    name: str, saved: dict[str, Any], param: Tensor, copied: bool, algorithm: Algorithm, owner: str
) -> dict[str, UncastTensor]:
    """Check the saved state of a parameter, which errors call `name` of `owner`, and return its tensors.

    With `copied` they are copied to the device of `param`; otherwise they are the saved ones.
    """
    if not isinstance(saved, dict):
        raise bad_type(name, "a dict", type(saved).__name__)
    inner = saved.get(_BITSANDBYTES_STATE, {})
    if not isinstance(inner, dict):
        raise bad_type(f"{name}, {_BITSANDBYTES_STATE}", "a dict", type(inner).__name__)
    saved = {**saved, **inner}
    missing = [key for key in ("step", *algorithm.states) if key not in saved]
    if missing or ("state2" in saved and "state2" not in algorithm.states):
        wanted = "step and state1" if len(algorithm.states) == 1 else "step, state1 and state2"
        raise bad(name, f"{wanted} of {owner}", ", ".join(map(str, saved)))
    in_8_bits = isinstance(saved["state1"], Tensor) and saved["state1"].dtype == torch.uint8
    expected = shapes_of(algorithm, param, in_8_bits)
    state = {"step": torch.tensor(_checked_step(f"{name}.step", saved["step"]), device=param.device)}
    for key, (dtype, shape) in expected.items():
        tensor = saved.get(key)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise bad_type(f"{name}.{key}", f"a tensor of {dtype}", got)
        if tuple(tensor.shape) != shape:
            raise bad(f"{name}.{key}", f"shape {list(shape)}, as the parameter's", list(tensor.shape))
        check_memory(f"{name}.{key}", tensor, param)
        if dtype == torch.float32 and not tensor.isfinite().all():
            raise bad(f"{name}.{key}", "finite values", "NaN or Inf")
        if dtype == torch.float32 and key != "state1" and (tensor < 0).any():
            raise bad(f"{name}.{key}", "values >= 0", tensor.min().item())
        state[key] = tensor.to(param.device, copy=True).contiguous() if copied else tensor
    for key, levels in _MAPS.items():
        check_memory(f"{name}.{key}", saved.get(key), param)
        if in_8_bits and key in saved and not (isinstance(saved[key], Tensor) and is_dynamic_map(saved[key], levels)):
            raise bad(f"{name}.{key}", "the dynamic map of an 8-bit optimizer", "another map")
    return {key: UncastTensor(tensor) for key, tensor in state.items()}


def bitsandbytes_state(state: dict[str, Any], algorithm: Algorithm) -> dict[str, Any]:
    """The state of a parameter in bitsandbytes' form: the step is a number, and the maps stand beside the codes."""
    for key, tensor in state.items():
        check_memory(key, tensor)
    found = {**state, "step": int(state["step"])}
    if "absmax1" in state:
        for key in tuple(_MAPS)[: len(algorithm.states)]:
            found[key] = _MAPS[key].to(state["state1"].device, copy=True)
    return found


def check_bitsandbytes_arguments(
    arguments: dict[str, Any], algorithm: Algorithm, is_paged: bool, names: tuple[str, str]
) -> None:
    """Raise unless ours does what these additional arguments of bitsandbytes' optimizers request.

    `names` are those of the ordinary optimizer and of the paged one.
    """
    meanings = {name: BITSANDBYTES_ARGUMENTS[name] for name in algorithm.bitsandbytes_arguments}
    meanings["is_paged"] = (is_paged,)
    for name, value in arguments.items():
        if name not in meanings:
            raise TypeError(f"{name}: expected an argument of this optimizer, got another")
        if value not in meanings[name]:
            other = f"; the other of {names[0]} and {names[1]} is meant" if name == "is_paged" else ""
            raise bad(name, f"{meanings[name][0]}, as this optimizer has nothing else{other}", repr(value))


def _checked_step(name: str, step: Any) -> int:
    """Check a step count, which is a number or a tensor of one number, and return it."""
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_complex() or step.is_meta:
            raise bad(name, "an integer >= 0", f"{step.dtype} {list(step.shape)}")
        check_memory(name, step)
        step = step.item()
    if not isinstance(step, (int, float)):
        raise bad_type(name, "an integer >= 0", type(step).__name__)
    if not 0 <= step < 2**63 or step != int(step):
        raise bad(name, "an integer >= 0", step)
    return int(step)


def check_state_dict(state_dict: Any) -> None:
    """Raise unless it has the parts that every optimizer's state dict has, of the right types."""
    if not isinstance(state_dict, dict):
        raise bad_type("state_dict", "a dict", type(state_dict).__name__)
    for name, kind in (("state", dict), ("param_groups", list)):
        if name not in state_dict:
            raise bad("state_dict", f"the key {name!r}", f"only {', '.join(map(str, state_dict)) or 'no key'}")
        if not isinstance(state_dict[name], kind):
            raise bad_type(f"state_dict[{name!r}]", f"a {kind.__name__}", type(state_dict[name]).__name__)
    for index, group in enumerate(state_dict["param_groups"]):
        name = f"state_dict['param_groups'][{index}]"
        if not isinstance(group, dict):
            raise bad_type(name, "a dict", type(group).__name__)
        params = group.get("params")
        if not isinstance(params, list) or not all(type(i) in (int, str) for i in params):
            raise bad(f"{name}['params']", "a list of numbers or names", repr(params)[:80])


def options_of(group: dict[str, Any], algorithm: Algorithm) -> dict[str, Any]:
    """A saved parameter group without the options that bitsandbytes writes for other optimizers."""
    foreign = set(_ADEMAMIX_OPTIONS) - {*algorithm.numbers, *algorithm.steps}
    return {name: value for name, value in group.items() if name not in foreign}


def check_options(options: dict[str, Any], algorithm: Algorithm) -> None:
    """Raise unless a parameter group has every option, each within its range."""
    needed = (*algorithm.numbers, "betas", *algorithm.steps, "min_8bit_size")
    missing = [name for name in needed if name not in options]
    if missing:
        raise bad("param_groups", f"{missing[0]} in each", f"only {', '.join(options)}")
    for name in (*algorithm.numbers, *algorithm.steps):
        value = options[name]
        if value is None and name in algorithm.steps:
            continue
        if isinstance(value, Tensor):
            check_memory(name, value)
            value = value.item() if value.numel() == 1 and not value.is_meta else math.nan
        if not isinstance(value, (int, float)):
            raise bad_type(name, "a number", type(value).__name__)
        if not 0 <= value <= sys.float_info.max:
            raise bad(name, "a finite number >= 0", options[name])
    betas, count = options["betas"], {2: "two", 3: "three"}[algorithm.betas]
    if not isinstance(betas, (tuple, list)) or len(betas) != algorithm.betas:
        raise bad_type("betas", f"{count} numbers", betas)
    if not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
        raise bad("betas", f"{count} numbers in [0, 1)", betas)
    if options.get("t_beta3") and "t_beta3" in algorithm.steps and 0 in (betas[0], betas[2]):
        raise bad("betas", "the first and the third in (0, 1), as t_beta3 takes their logarithms", betas)
    if not isinstance(options["min_8bit_size"], int):
        raise bad_type("min_8bit_size", "an int", type(options["min_8bit_size"]).__name__)
