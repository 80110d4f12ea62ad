"""`replace` for experts that bitsandbytes has quantized as parameters (`bitsandbytes.nn.parametrize`)."""

from __future__ import annotations

import sys
import warnings

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.parametrize import (
    Bnb4bitParametrization,
    _disable_parametrization_cache,
    _enable_parametrization_cache,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..._core.errors import named
from ..._core.formats import codes_shape
from ..._core.weight import QuantizedWeight
from ..._layers.experts import Experts4bit


def from_quant_state(codes: Tensor, state: QuantState) -> QuantizedWeight:
    """Make a QuantizedWeight of a weight of bitsandbytes. The tensors are shared, not copied.

    Args:
        codes, state: the codes, and bitsandbytes' quant_state beside them.
    """
    shape = tuple(state.shape)
    return QuantizedWeight(
        codes=codes.reshape(-1).view(torch.uint8).view(codes_shape(*shape, bits=4)),
        absmax=state.absmax,
        nested_absmax=state.state2.absmax if state.nested else None,
        nested_code=state.state2.code if state.nested else None,
        offset=state.offset.float() if state.nested else None,
        code=state.code,
        shape=shape,
        blocksize=state.blocksize,
        format=state.quant_type,
        dtype=state.dtype,
    ).check_values()


def quantized_experts(model: nn.Module) -> list[tuple[nn.Module, dict[str, QuantizedWeight]]]:
    """Find modules with experts that can be replaced: (module, {name: weight}). Warns of experts that cannot."""
    found = []
    for path, module in model.named_modules():
        quantized = _quantized_parameters(module)
        if not quantized:
            continue
        names = _names(module)
        if names is None or getattr(module, "is_transposed", True) or not set(names) <= quantized.keys():
            warnings.warn(f"replace: left {', '.join(quantized)} of {path}, which is run in another way", stacklevel=3)
            continue
        weights = {}
        for name in names:
            with named(f"{path}.{name}, "):
                weights[name] = from_quant_state(*quantized[name])
        found.append((module, weights))
    return found


def put_experts(found: list[tuple[nn.Module, dict[str, QuantizedWeight]]]) -> None:
    """Replace the parameters by `Experts4bit`, and make transformers run them."""
    for module, weights in found:
        for name, q in weights.items():
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            del module._parameters[name]
            setattr(module, name, Experts4bit.from_quantized(q).train(module.training))
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if hook in _CACHE_HOOKS]:
                del hooks[key]
        from ..transformers._experts import run_quantized

        run_quantized(module)


_CACHE_HOOKS = (_enable_parametrization_cache, _disable_parametrization_cache)


def _quantized_parameters(module: nn.Module) -> dict[str, tuple[Tensor, QuantState]]:
    """The parameters of a module that bitsandbytes has quantized: {name: (codes, quant_state)}."""
    return {
        name: (parametrizations.original.data, parametrizations[0].quant_state)
        for name, parametrizations in getattr(module, "parametrizations", {}).items()
        if len(parametrizations) == 1 and isinstance(parametrizations[0], Bnb4bitParametrization)
    }


def _names(module: nn.Module) -> tuple[str, str] | None:
    if "transformers" not in sys.modules:
        return None
    from ..transformers._experts import names_of_experts

    return names_of_experts(module)
