"""Replace bitsandbytes' layers by ours."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

from ..._core.versions import require

require("bitsandbytes")

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import nn

from ..._core.errors import bad, bad_type, named
from ..._core.weight import QuantizedWeight
from ..._layers.adapters import is_of_peft
from ..._layers.hooks import take_over_hooks
from ...nn import Linear4bit
from ._experts import from_quant_state, put_experts, quantized_experts

# Fields of transformers' config for how bitsandbytes stores and places weights. Ours takes one value of each.
_NOT_OURS = ("bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload")


def replace(model: nn.Module) -> nn.Module:
    """Replace every `bitsandbytes.nn.Linear4bit` in a model, in place, by a `qlora_native.nn.Linear4bit`.

    Parameters of experts that `bitsandbytes.nn.parametrize.replace_parameter_4bit` has quantized become `Experts4bit`
    if they are [experts, N, K] and transformers' registry runs them; others stay, with a warning.

    The codes, the scales and the bias are shared, not copied, and `compute_dtype` keeps its meaning. LoRA layers of
    PEFT keep their adapter parameters, so an optimizer that holds these stays valid. A model of transformers is saved
    as before, in bitsandbytes' format. Layers that bitsandbytes has repacked for evaluation (on CPUs with AVX512_BF16)
    are unpacked into new memory, with the bf16 scales that the repacking left.

    Args:
        model: any module, PEFT's models included.

    Returns:
        `model`. Warns if it contains no such layer.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: a layer is not quantized yet (bitsandbytes does that in `.to(device)`), an adapter is merged into a
            layer, or `model` is itself such a layer. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "an nn.Module", type(model).__name__)
    if isinstance(model, bitsandbytes.nn.Linear4bit):
        raise bad("model", "a module that contains bitsandbytes layers", "one: use quantized_weight and from_quantized")
    named = list(model.named_modules(remove_duplicate=False))
    found = [(name, module) for name, module in named if isinstance(module, bitsandbytes.nn.Linear4bit)]
    experts = quantized_experts(model)
    if not found and not experts:
        others = Counter(f"{type(m).__module__}.{type(m).__name__}" for _, m in named if isinstance(m, nn.Linear))
        instead = ", ".join(f"{count} {name}" for name, count in others.items()) or "no linear layer either"
        warnings.warn(f"replace: found no bitsandbytes.nn.Linear4bit, but {instead}", stacklevel=2)
        return model
    has_adapters = any(map(is_of_peft, model.modules()))
    if has_adapters:
        from ..peft._lora import adopt_layers, check_layers

        check_layers(model, {id(module.weight) for _, module in found})
    layers: dict[int, Linear4bit] = {}
    for name, module in found:
        if id(module) not in layers:
            layers[id(module)] = _layer(name, module)
    blocksizes = {key: layer.blocksize for key, layer in layers.items()}
    blocksizes |= {id(module): next(iter(weights.values())).blocksize for module, weights in experts}
    configs = _configs(model, blocksizes)
    put_experts(experts)
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(module)])
    if has_adapters:
        adopt_layers(model)
    for module, config in configs:
        _tell_transformers(module, config)
    return model


def quantized_weight(layer: nn.Module) -> QuantizedWeight:
    """Read the weight of a layer of bitsandbytes. Its tensors are shared, not copied.

    Args:
        layer: a `bitsandbytes.nn.Linear4bit`.

    Raises:
        TypeError, ValueError: the layer is not quantized yet, or a tensor is damaged (see QuantizedWeight).
    """
    state: QuantState | None = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise bad("weight", "one that is quantized, which bitsandbytes does in .to(device)", f"{layer.weight.dtype}")
    codes = layer.weight.data
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse

        state = copy.copy(state)
        absmax = state.absmax.t().reshape(-1).float()
        state.original_nested = False  # keep the bf16 scales: do not quantize them once more
        codes, state = _convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = absmax
    return from_quant_state(codes, state)


def _layer(name: str, module: nn.Module) -> Linear4bit:
    with named(f"{name}."):
        layer = Linear4bit.from_quantized(quantized_weight(module), module.bias)
    # As in bitsandbytes' forward, x decides the dtype unless a compute_dtype is set. fp32 counts as not set.
    if module.compute_type_is_set and module.compute_dtype != torch.float32:
        layer.compute_dtype = module.compute_dtype
    take_over_hooks(layer, module)
    return layer.train(module.training)


def _configs(model: nn.Module, blocksizes: dict[int, int]) -> list[tuple[nn.Module, Any]]:
    """The modules that transformers has loaded and that are changed, each with the config that it gets.

    Args:
        model: the model, before it is changed.
        blocksizes: {id of a module: the blocksize of the layers that replace it, or its experts}.
    """
    configs = []
    for module in model.modules():
        own: Any = vars(module).get("hf_quantizer")  # not getattr, which PEFT's wrappers forward
        if type(own).__name__ == "Bnb4BitHfQuantizer":
            from ..transformers._config import BitsAndBytesConfig

            fields = own.quantization_config.to_dict()
            for name in _NOT_OURS:
                fields.pop(name, None)
            blocksize = next((blocksizes[id(each)] for each in module.modules() if id(each) in blocksizes), None)
            if blocksize is not None:
                configs.append((module, BitsAndBytesConfig(**fields, blocksize=blocksize)))
    return configs


def _tell_transformers(model: nn.Module, config: Any) -> None:
    """Give a model that transformers has loaded our quantizer."""
    from ..transformers._quantizer import Quantizer, adopt

    model.is_loaded_in_4bit = False
    adopt(model, Quantizer(config))
